"""On nft a jump is put back without a process, and nobody can tell it from one that iptables put back.

Each disturbance is repaired twice: by the guard as it is, and by one whose every commit goes through iptables-restore.
"""

import random
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import pytest
from kernel_ns import argv, in_own_namespace
from live import WriteLog, at_rest, events, our_rules, wait_events, wait_in_force
from test_plan import SEED_002, desired

from lab.daemon import Daemon
from lab.layout import FAMILIES, FamilyName
from lab.node import TOOLS, Node
from nodewalld.core.config import Anchor, AnchorKind, Place, Position
from nodewalld.core.desired import Desired, DesiredTable, Placement
from nodewalld.core.observed import Observed
from nodewalld.core.plan import TablePlan
from nodewalld.core.words import Family, Table
from nodewalld.guard import Guard, Settled
from nodewalld.kernel.firewall import FirewallError, NftFirewall
from nodewalld.kernel.nftables import NftablesReader
from nodewalld.kernel.nftevents import GenerationEvents

JUMP = Placement("FORWARD", Position(), (0, 9), "", "-j DOCKER-USER", ("jump/docker-user",), "", "DOCKER-USER")
POSITIONS = (Position(Place.FIRST), Position(), SEED_002, Position(Place.LAST))
BEFORE_UDP = Position(Place.BETWEEN, (), (Anchor(AnchorKind.RULE, "-p udp -j RETURN"),))
PODS = {Family.IPV4: "10.42.0.0/16", Family.IPV6: "fd42::/64"}
FOREIGN = ("-s {pods} -j ACCEPT", "-j DOCKER-USER", "-p udp -j RETURN", "-d {pods} -j ACCEPT", "-i eth7 -j DROP")


def wanted() -> DesiredTable:
    """Every kind of position, and a `[[jump]]`; in IPv6 an anchor of seed 002 is never there."""
    table = desired(*POSITIONS, BEFORE_UDP)
    return DesiredTable(table.chains, (*table.placements, JUMP))


class Slow(NftFirewall):
    """Whatever is written is written by iptables-restore."""

    def apply(self, planned: TablePlan, observed: Observed, stamp: int) -> int:
        return self.commit(planned.script)


class Counted(NftFirewall):
    """Counts the programs it starts, and does something just before it commits; none works while it is `broken`."""

    started = 0
    broken = False
    before_commit: Callable[[], object] | None = None

    def _run(self, action: str, *arguments: str, **more: object):  # type: ignore[no-untyped-def,override]
        self.started += 1
        if self.broken:
            raise FirewallError("broken")
        return super()._run(action, *arguments, **more)

    def apply(self, planned: TablePlan, observed: Observed, stamp: int) -> int:
        if act := self.before_commit:
            act()
        return super().apply(planned, observed, stamp)


@dataclass
class World:
    """A FORWARD chain with foreign rules, and one guard of each kind that knows it."""

    family: Family
    fast: Counted = field(init=False)
    guards: Mapping[str, Guard] = field(init=False)

    @property
    def tool(self) -> str:
        return f"{self.family.tool}-nft"

    def restore(self, *lines: str) -> None:
        argv([f"{self.tool}-restore", "--noflush"], stdin="\n".join(("*filter", *lines, "COMMIT", "")))

    def run(self, *commands: str) -> None:
        for command in commands:
            argv(["sh", "-ec", command.format(t=self.tool, pods=PODS[self.family])])

    def saved(self) -> str:
        """The filter table, without times and counters."""
        text = argv([f"{self.tool}-save", "-t", "filter"])
        return "\n".join(line.partition(" [")[0] for line in text.splitlines() if line[:1] != "#")

    def foreign(self) -> list[str]:
        rules = argv([self.tool, "-S", "FORWARD"]).splitlines()
        return [line for line in rules if "nodewalld:" not in line and line != "-A FORWARD -j DOCKER-USER"]

    def begin(self) -> None:
        """FORWARD as at the beginning, ours settled."""
        rules = [f"-A FORWARD {text}".format(pods=PODS[self.family]) for text in FOREIGN]
        self.restore(":DOCKER-USER - [0:0]", "-F FORWARD", *rules)
        self.settle("fast")

    def settle(self, kind: str) -> Settled:
        settled = self.guards[kind].settle(Table.FILTER)
        assert self.guards[kind].preview(Table.FILTER)[0].steps == ()
        assert not settled.restless
        return settled


@contextmanager
def world(family: Family, table: DesiredTable | None = None) -> Iterator[World]:
    made = World(family)
    made.fast = Counted(family, NftablesReader())
    made.guards = {"fast": Guard(made.fast), "slow": Guard(Slow(family, NftablesReader()))}
    for guard in made.guards.values():
        guard.desired = Desired(family, {Table.FILTER: table or wanted()}, (), ("cali-*",))
    made.begin()
    try:
        yield made
    finally:
        for guard in made.guards.values():
            guard.firewall.close()


DISTURBANCES = {
    "a jump deleted": ("{t} -D FORWARD -m comment --comment nodewalld:at/early-1 -j NODEWALL-1",),
    "the first rule deleted": ("{t} -D FORWARD 1",),
    "a rule on top": ("{t} -I FORWARD -j ACCEPT",),
    "two rules on top": ("{t} -I FORWARD -j ACCEPT", "{t} -I FORWARD -p udp"),
    "a rule at the end": ("{t} -A FORWARD -j LOG",),
    "a rule in the middle": ("{t} -I FORWARD 3 -p tcp -j ACCEPT",),
    "a jump doubled": ("{t} -A FORWARD -m comment --comment nodewalld:at/early-1 -j NODEWALL-1",),
    "a jump doubled on top": ("{t} -I FORWARD -m comment --comment nodewalld:at/last-3 -j NODEWALL-3",),
    "a bare jump doubled": ("{t} -I FORWARD 2 -j DOCKER-USER",),
    "a bare jump deleted": ("{t} -D FORWARD -j DOCKER-USER",),
    "a jump of ours left over": ("{t} -I FORWARD 2 -m comment --comment nodewalld:at/gone -j ACCEPT",),
    "the chain flushed": ("{t} -F FORWARD",),
    "the chain flushed and filled": ("{t} -F FORWARD", "{t} -A FORWARD -p udp -j RETURN"),
    "an anchor moved": ("{t} -D FORWARD -p udp -j RETURN", "{t} -I FORWARD -p udp -j RETURN"),
    "ours in another order": (
        "{t} -D FORWARD -m comment --comment nodewalld:at/first-0 -j NODEWALL-0",
        "{t} -A FORWARD -m comment --comment nodewalld:at/first-0 -j NODEWALL-0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", list(Family))
@in_own_namespace
def test_without_a_process_the_ruleset_is_the_one_that_the_tool_would_leave(family: Family) -> None:
    with world(family) as here:
        for name, commands in DISTURBANCES.items():
            left = {}
            for kind in ("slow", "fast"):
                here.begin()
                here.run(*commands)
                foreign, started = here.foreign(), here.fast.started
                settled = here.settle(kind)
                assert settled.commits == 1, name
                assert here.foreign() == foreign, name
                left[kind] = here.saved()
                assert kind == "slow" or here.fast.started <= started + 1, name  # -S of foreign rules never seen before
            assert left["fast"] == left["slow"], name


@pytest.mark.parametrize("family", list(Family))
@in_own_namespace
def test_what_is_written_without_a_process_is_iptables_own(family: Family) -> None:
    """Listed, saved, found and deleted by the tool as the rule that it wrote itself; nft shows its comment, too."""
    with world(family) as here:
        show = ["nft", "-s", "list", "chain", "ip" if family is Family.IPV4 else "ip6", "filter", "FORWARD"]
        by_tool = [line.strip() for line in argv(show).splitlines()]
        started = here.fast.started
        for number in (1, 2):
            here.run(f"{{t}} -D FORWARD {number}")
            here.settle("fast")
        assert here.fast.started == started
        shown = [line.strip() for line in argv(show).splitlines()]
        assert [re.sub(' comment "nodewalld:[^"]*"', "", line) for line in shown] == by_tool
        assert 'counter jump NODEWALL-1 comment "nodewalld:at/early-1"' in shown
        rule = ["-m", "comment", "--comment", "nodewalld:at/early-1", "-j", "NODEWALL-1"]
        argv([here.tool, "-C", "FORWARD", *rule])
        text = '-A FORWARD -m comment --comment "nodewalld:at/early-1" -j NODEWALL-1'
        assert text in argv([here.tool, "-S", "FORWARD"]).splitlines()
        assert text in here.saved().splitlines()
        argv([here.tool, "-D", "FORWARD", *rule])
        assert text not in here.saved()
        here.restore(f"-D{text[2:].replace('early-1', 'first-0').replace('NODEWALL-1', 'NODEWALL-0')}")


@in_own_namespace
def test_counters_are_not_written_again() -> None:
    """The daemon learns the rule as it finds it after a restart, when packets have passed."""
    rule = "-m comment --comment nodewalld:at/first-0 -j NODEWALL-0"
    script = f"*filter\n-D FORWARD {rule}\n[5:500] -I FORWARD 1 {rule}\nCOMMIT\n"
    with world(Family.IPV4) as here:
        argv(["iptables-nft-restore", "--noflush", "-c"], stdin=script)
        assert "[5:500] -A FORWARD" in argv(["iptables-nft-save", "-c"])
        late = Counted(Family.IPV4, NftablesReader())
        guard = Guard(late, here.guards["fast"].learned)
        guard.desired = here.guards["fast"].desired
        assert guard.settle(Table.FILTER).commits == 0
        started = late.started
        here.run("{t} -D FORWARD 1")
        assert guard.settle(Table.FILTER).commits == 1
        assert late.started == started
        assert "[5:500]" not in argv(["iptables-nft-save", "-c"])
        late.close()


@pytest.mark.parametrize("family", list(Family))
@in_own_namespace
def test_its_counters_begin_at_zero_and_its_event_is_our_own(family: Family) -> None:
    with world(family) as here, GenerationEvents() as heard:
        here.run("{t} -I FORWARD -j ACCEPT")
        heard.read()
        here.guards["fast"].own_pids.clear()
        here.settle("fast")
        (event,) = heard.read().events
        assert {event.port_id} == here.guards["fast"].own_pids
        counted = argv([f"{here.tool}-save", "-c", "-t", "filter"])
        assert '[0:0] -A FORWARD -m comment --comment "nodewalld:at/first-0" -j NODEWALL-0' in counted


INTRUSIONS = {
    "a rule on top": "{t} -I FORWARD -p icmp -j ACCEPT",
    "the foreign rule below which ours was to go": "{t} -D FORWARD -p udp -j RETURN",
    "the rule that was to be deleted": "{t} -D FORWARD -m comment --comment nodewalld:at/first-0 -j NODEWALL-0",
    "a flush": "{t} -F FORWARD",
    "something elsewhere": "{t} -t nat -N ELSEWHERE",
}


@pytest.mark.parametrize("family", list(Family))
@in_own_namespace
def test_a_plan_that_somebody_overtakes_is_made_anew_and_touches_nothing_of_theirs(family: Family) -> None:
    with world(family) as here:
        for name, command in INTRUSIONS.items():
            here.begin()
            here.run("{t} -I FORWARD -p tcp -j ACCEPT")
            expected: list[list[str]] = []

            def intrude(command: str = command, expected: list[list[str]] = expected) -> None:
                here.fast.before_commit = None
                here.run(command)
                expected.append(here.foreign())

            here.fast.before_commit = intrude
            settled = here.settle("fast")
            assert settled.commits == 1, name
            assert here.foreign() == expected[0], name
        argv([here.tool, "-t", "nat", "-X", "ELSEWHERE"])


class Interrupted(Slow):
    """Somebody does something just before iptables-restore writes."""

    intrusions: Sequence[Callable[[], object]] = ()

    def apply(self, planned: TablePlan, observed: Observed, stamp: int) -> int:
        if self.intrusions:
            self.intrusions[0]()
            self.intrusions = self.intrusions[1:]
        return super().apply(planned, observed, stamp)


@in_own_namespace
def test_a_plan_of_which_the_tool_finds_nothing_any_more_is_made_anew_at_once() -> None:
    """And not after a second: the flush that overtook it may have been the last event."""
    with world(Family.IPV4) as here:
        slow = Interrupted(Family.IPV4, NftablesReader())
        guard = Guard(slow)
        guard.desired = here.guards["fast"].desired
        guard.settle(Table.FILTER)
        here.run("{t} -I FORWARD -j ACCEPT")
        slow.intrusions = [lambda: here.run("{t} -F FORWARD")]
        assert guard.settle(Table.FILTER).commits == 1
        assert guard.settle(Table.FILTER).commits == 0
        assert not slow.intrusions
        slow.close()


@in_own_namespace
def test_who_is_overtaken_again_and_again_leaves_it_to_the_tool() -> None:
    with world(Family.IPV4) as here:
        here.fast.before_commit = lambda: here.run("{t} -A DOCKER-USER -j RETURN")
        here.run("{t} -I FORWARD -p tcp -j ACCEPT")
        started = here.fast.started
        here.guards["fast"].settle(Table.FILTER)
        assert here.fast.started > started
        here.fast.before_commit = None
        here.settle("fast")


COMMANDS = (
    "{t} -F FORWARD",
    "{t} -I FORWARD -j ACCEPT",
    "{t} -A FORWARD -j LOG",
    "{t} -I FORWARD -j DOCKER-USER",
    "{t} -D FORWARD 1",
    "{t} -D FORWARD 3",
    "{t} -I FORWARD 2 -p udp -j RETURN",
    "{t} -A FORWARD -s {pods} -j ACCEPT",
    "{t} -I FORWARD -d {pods} -j ACCEPT",
    "{t} -A FORWARD -m comment --comment nodewalld:at/early-1 -j NODEWALL-1",
    "{t} -I FORWARD -m comment --comment nodewalld:at/last-3 -j NODEWALL-3",
    "{t} -F NODEWALL-2",
    "{t} -I NODEWALL-0 -j RETURN",
)
ROUNDS = 60


@pytest.mark.parametrize("family", list(Family))
@in_own_namespace
def test_whatever_neighbours_do_either_way_of_repair_ends_in_force(family: Family) -> None:
    """What fails (no rule of that number) changes nothing; the repair must leave what is foreign as it was."""
    dice = random.Random(f"chaos {family}")
    with world(family) as here:
        for number in range(ROUNDS):
            commands = [f"{command} || :" for command in dice.choices(COMMANDS, k=dice.randint(1, 3))]
            here.run(*commands)
            foreign = here.foreign()
            here.settle(dice.choice(("fast", "slow")))
            assert here.foreign() == foreign, f"round {number}: {commands}"
            if number % 20 == 19:
                here.begin()


@pytest.mark.parametrize("family", list(Family))
@in_own_namespace
def test_beside_a_hasty_writer_no_foreign_rule_is_lost_or_moved(family: Family) -> None:
    """The writer never looks; its twin, the other family, has the same rules and nobody beside them."""
    lines = [
        f"{{t}} {'-I' if number % 3 else '-A'} FORWARD -p tcp --dport {number} -j ACCEPT"
        for number in range(1, 41)
    ]  # fmt: skip
    twin = {Family.IPV4: "ip6tables-nft", Family.IPV6: "iptables-nft"}[family]
    with world(family) as here:
        here.restore("-F FORWARD")
        here.settle("fast")
        script = "\n".join(line.format(t=here.tool) for line in lines)
        guard = here.guards["fast"]
        with subprocess.Popen(["sh", "-ec", script]) as writer:
            while writer.poll() is None:
                for table in guard.drifted():
                    with suppress(FirewallError):  # "changes faster than it can be read"
                        guard.settle(table)
        assert writer.returncode == 0
        here.settle("fast")
        argv(["sh", "-ec", "\n".join(line.format(t=twin) for line in lines)])
        assert here.foreign() == argv([twin, "-S", "FORWARD"]).splitlines()


CONFIG = """
[daemon]
resync = "1h"

[[port]]
name = "vault"
ports = [31002]

[[forward]]
name = "transit"
protocol = "tcp"
ports = [31002]
action = "reject"
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_the_daemon_starts_no_process_to_put_its_jumps_back(laboratory: None, captures, family: FamilyName) -> None:
    with Node("nft") as node:
        node.load(captures / "kp126-{backend}-3svc")
        log = WriteLog(node)
        daemon = Daemon(node, CONFIG, env=log.env).wait_ready()
        at_rest(daemon)
        tool, written = TOOLS[family], len(log)
        (rule,) = our_rules(node, "filter", "FORWARD", family)
        node.run(f"{tool} -I FORWARD -p icmp -j ACCEPT; {tool} -D FORWARD {rule}; {tool} -t mangle -F PREROUTING")
        wait_in_force(daemon)
        wait_events(daemon, lambda seen: {"PREROUTING", "FORWARD"} <= {event["chain"] for event in seen}, "repair")
        assert all(event["by"]["comm"] == tool for event in events(daemon, "repair"))
        assert len(log) == written
        node.run(f"{tool} -t mangle -F")  # our own chains as well: that is the tool's work
        wait_in_force(daemon)
        assert len(log) > written
