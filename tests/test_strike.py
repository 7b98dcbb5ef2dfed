"""A displaced rule is put back by one message as soon as a transaction is heard of, before anything else is asked.

Law: what `strike` leaves is what `settle` would have left; whatever it isn't sure of it leaves to it.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from kernel_ns import in_own_namespace
from live import at_rest, events
from test_hot_repair import DISTURBANCES, JUMP, SEED_002, World, world
from test_packets import EVERYTHING
from test_plan import desired

from lab.daemon import Daemon
from lab.node import Node
from lab.waiting import wait_for
from nodewalld.core.config import Place, Position
from nodewalld.core.desired import Desired, DesiredTable
from nodewalld.core.events import Reason
from nodewalld.core.words import Family, Table
from nodewalld.kernel.firewall import FirewallError
from nodewalld.witness import Witness

FIRST, EARLY, LAST = Position(Place.FIRST), Position(), Position(Place.LAST)
_CAPABILITIES = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff"))
REAL_TIME = os.SCHED_RR if int(_CAPABILITIES.split()[1], 16) >> 23 & 1 else os.SCHED_OTHER  # CAP_SYS_NICE
LEFT_ALONE = {"a jump of ours left over", "the chain flushed"}  # what it says must be read, or nothing stands there


def table(*positions: Position) -> DesiredTable:
    """Ours at these positions, and a `[[jump]]` for which a chain must be read in full."""
    some = desired(*positions)
    return DesiredTable(some.chains, (*some.placements, JUMP))


@contextmanager
def hearing(here: World) -> Iterator[Callable[[], int]]:
    """What strikes with all that was heard since the last time, and returns how many transactions came of it."""
    guard, witness = here.guards["fast"], Witness(lambda: frozenset(here.guards["fast"].own_pids))

    def strike() -> int:
        wake = witness.heard(0.0)
        assert wake is not None
        assert wake.touched
        before = guard.firewall.stamp()
        guard.strike(Table.FILTER, [chain for _, _, chain in wake.touched], wake.generation, wake.noticed)
        return guard.firewall.stamp() - before

    witness.listen()
    try:
        witness.attend({(here.family, Table.FILTER.value): guard.chains[Table.FILTER]})
        here.begin()
        assert witness.heard(0.0) is not None  # of what was before nothing is known
        yield strike
    finally:
        witness.close()


@pytest.mark.parametrize("family", list(Family))
@in_own_namespace
def test_a_strike_leaves_what_a_repair_leaves_and_starts_nothing(family: Family) -> None:
    positions = FIRST, EARLY, LAST, LAST  # as many chains as the disturbances speak of
    with world(family, table(*positions)) as here, hearing(here) as strike:
        guard = here.guards["fast"]
        for name, commands in DISTURBANCES.items():
            here.begin()
            here.run(*commands)
            here.settle("slow")
            left = here.saved()
            here.begin()
            here.run("{t} -N SEEN; {t} -A FORWARD -j SEEN; {t} -D FORWARD -j SEEN; {t} -X SEEN")
            here.settle("fast")
            strike()
            here.run(*commands)
            foreign, started = here.foreign(), here.fast.started
            assert strike() == (name not in LEFT_ALONE), name
            assert here.fast.started == started, name
            assert name in LEFT_ALONE or here.saved() == left, name
            settled = guard.settle(Table.FILTER)
            assert here.saved() == left, name
            assert settled.commits == 1, name
            assert settled.changes, name
            assert here.foreign() == foreign, name
            assert guard.settle(Table.FILTER).commits == 0, name


@in_own_namespace
def test_what_it_can_not_be_sure_of_it_leaves_alone() -> None:
    with world(Family.IPV4, table(FIRST, EARLY, LAST)) as here, hearing(here) as strike:
        guard = here.guards["fast"]

        def refused(*commands: str) -> None:
            here.run(*commands)
            before = here.saved()
            assert strike() == 0
            assert here.saved() == before
            here.settle("fast")
            witnessed()

        def witnessed() -> None:
            here.run("{t} -A FORWARD -j LOG; {t} -D FORWARD -j LOG")
            strike()
            here.settle("fast")

        witnessed()
        refused("{t} -I FORWARD -j ACCEPT", "{t} -F NODEWALL-1")  # not only foreign chains were touched
        refused("{t} -A FORWARD -j LOG", "{t} -D FORWARD -j LOG")  # nothing is wrong
        # Somebody has written since: the kernel refuses it.
        here.run("{t} -I FORWARD -p icmp -j ACCEPT")
        generation = guard.firewall.stamp()
        here.run("{t} -t nat -N ELSEWHERE")
        guard.strike(Table.FILTER, ["FORWARD"], generation, 0.0)
        assert guard.firewall.stamp() == generation + 1
        guard.strike(Table.FILTER, ["FORWARD"], generation + 1, 0.0)
        assert guard.firewall.stamp() == generation + 2
        # After a look that failed nothing is known of the table.
        guard.settle(Table.FILTER)
        here.run("{t} -I FORWARD -j ACCEPT; {t} -I NODEWALL-1 -j ACCEPT")
        here.fast.broken = True
        with pytest.raises(FirewallError):
            guard.settle(Table.FILTER)
        here.fast.broken = False
        before = guard.firewall.stamp()
        guard.strike(Table.FILTER, ["FORWARD"], before, 0.0)
        assert guard.firewall.stamp() == before


@in_own_namespace
def test_a_strike_is_told_of_also_when_the_look_after_it_fails() -> None:
    with world(Family.IPV4, table(FIRST, EARLY, LAST)) as here, hearing(here) as strike:
        here.run("{t} -I FORWARD -j ACCEPT")
        assert strike() == 1
        here.run("{t} -I NODEWALL-1 -p icmp -j ACCEPT")
        here.fast.broken = True
        with pytest.raises(FirewallError):
            here.guards["fast"].settle(Table.FILTER)
        here.fast.broken = False
        reasons = {change.reason for change in here.settle("fast").changes}
        assert reasons == {Reason.DISPLACED, Reason.CHANGED}
        assert not here.guards["fast"].settle(Table.FILTER).changes


@in_own_namespace
def test_what_was_planned_for_another_wish_is_planned_anew() -> None:
    with world(Family.IPV4, table(EARLY)) as here, hearing(here) as strike:
        guard = here.guards["fast"]
        here.run("{t} -N cali-FORWARD")
        for yield_to, struck in (((), 1), (("cali-*",), 0), ((), 1)):
            guard.desired = Desired(Family.IPV4, {Table.FILTER: table(EARLY)}, (), yield_to)
            guard.settle(Table.FILTER, everything=True)
            here.run("{t} -A FORWARD -p tcp", "{t} -D FORWARD -p tcp")
            strike()
            for _ in range(2):
                here.run("{t} -I FORWARD -j cali-FORWARD")
                assert strike() == struck
                assert guard.preview(Table.FILTER)[0].steps == ()
                here.run("{t} -D FORWARD -j cali-FORWARD")
                strike()
                here.settle("fast")


@in_own_namespace
def test_by_an_anchor_it_does_not_strike() -> None:
    """One that has gone may be back in a moment: ours is not moved downwards for it."""
    with world(Family.IPV4, table(SEED_002, FIRST)) as here, hearing(here) as strike:
        for _ in range(2):  # the second time it is known what the rule says
            here.run("{t} -I FORWARD -j ACCEPT")
            assert strike() == 0
            here.settle("fast")


@in_own_namespace
def test_who_writes_after_every_repair_is_met_by_a_wait_and_not_by_strikes() -> None:
    with world(Family.IPV4, table(FIRST)) as here, hearing(here) as strike:
        guard, struck = here.guards["fast"], 0
        for _ in range(10):
            here.run("{t} -D FORWARD -j ACCEPT || :", "{t} -I FORWARD -j ACCEPT")
            struck += strike()
            guard.settle(Table.FILTER)
        assert 3 <= struck <= 4
        assert guard.pacer.contests(time.monotonic())


GATED = """#!/bin/sh
number=$(ls {folder} | grep -c begun)
: > {folder}/begun-$number
while [ -e {folder}/shut ] && [ ! -e {folder}/go-$number ]; do sleep 0.01; done
exec /usr/sbin/{name} "$@"
"""


def test_what_is_displaced_in_the_midst_of_a_pass_does_not_wait_for_its_end(laboratory: None) -> None:
    """The pass: new addresses, which have a chain in mangle written anew, by one program for each family."""
    with Node("nft") as node:
        folder = node.directory / "gated"
        folder.mkdir()
        for name in ("iptables-nft-restore", "ip6tables-nft-restore"):
            (folder / name).write_text(GATED.format(folder=folder, name=name))
            (folder / name).chmod(0o755)
        daemon = Daemon(node, EVERYTHING, env={"PATH": f"{folder}:{node.environment()['PATH']}"}).wait_ready()
        at_rest(daemon)
        for old in folder.glob("begun-*"):
            old.unlink()
        (folder / "shut").touch()
        node.run("ip address add 10.77.0.1/24 dev eth0; ip address add fd77::1/64 dev eth0 nodad")
        wait_for((folder / "begun-0").exists)
        node.run("iptables -I FORWARD -p icmp -j ACCEPT")
        before = time.monotonic()
        time.sleep(0.2)
        (folder / "go-0").touch()
        wait_for((folder / "begun-1").exists)
        first = node.run("iptables -S FORWARD").stdout.splitlines()[1]
        assert "nodewalld:" in first
        (folder / "shut").unlink()
        at_rest(daemon)
        (repair,) = [event for event in events(daemon, "repair") if event["chain"] == "FORWARD"]
        assert repair["by"]["comm"] == "iptables"
        assert repair["exposed_ms"] < (time.monotonic() - before) * 1000


URGENT = """
import os, subprocess, sys
from nodewalld.kernel.urgency import Urgency
show = "import os; print(os.sched_getscheduler(0))"
urgency = Urgency()
for _ in range(2):
    for act in (urgency.begin, urgency.end):
        act()
        print(os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK)
        subprocess.run([sys.executable, "-c", show], check=True)
"""


@pytest.mark.parametrize(
    ("without", "urgent"), [([], REAL_TIME), (["--bounding-set=-sys_nice", "--inh-caps=-sys_nice"], os.SCHED_OTHER)]
)
def test_it_is_urgent_only_where_that_is_allowed_and_what_it_starts_never_is(without: list[str], urgent: int) -> None:
    done = subprocess.run(
        ["setpriv", *without, sys.executable, "-uc", URGENT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [*map(str, (urgent, 0, 0, 0, urgent, 0, 0, 0))]


def test_a_daemon_is_urgent_while_it_waits_and_no_other_thread_of_it(laboratory: None) -> None:
    with Node("nft") as node:
        daemon = Daemon(node, EVERYTHING).wait_ready()
        at_rest(daemon)

        def policies() -> dict[int, int]:
            threads = [int(each.name) for each in Path(f"/proc/{daemon.pid}/task").iterdir()]
            return {thread: os.sched_getscheduler(thread) & ~os.SCHED_RESET_ON_FORK for thread in threads}

        wait_for(lambda: policies()[daemon.pid] == REAL_TIME)
        assert {policy for thread, policy in policies().items() if thread != daemon.pid} == {os.SCHED_OTHER}
