"""A place that another program takes again and again: recognised, told, slowed down, and over by itself.

The long wars are fought on a real kernel and by a clock that is turned by hand.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from kernel_ns import argv, in_own_namespace
from live import ask, events, our_rules, wait_events, wait_in_force
from test_plan import desired

from lab.daemon import Daemon
from lab.node import BackendName, Node
from lab.waiting import wait_for
from nodewalld.core.config import Place, Position
from nodewalld.core.desired import Desired
from nodewalld.core.events import Reason
from nodewalld.core.pacing import LAST_WAIT, ROUNDS
from nodewalld.core.words import Backend, Family, Table
from nodewalld.guard import Guard, Settled
from nodewalld.kernel.firewall import open_firewall

BACKENDS = [pytest.param(backend, id=backend.value) for backend in Backend]
FIRST, EARLY, LAST = Position(Place.FIRST), Position(), Position(Place.LAST)
MINUTE = 60.0


@dataclass
class Kernel:
    """A filter table, a guard of it, and the time."""

    backend: Backend
    position: Position
    now: float = 1000.0
    repairs: list[tuple[float, Settled]] = field(default_factory=list)
    guard: Guard = field(init=False)

    def __post_init__(self) -> None:
        runtime = Path("/run/nodewalld")
        runtime.mkdir()
        self.guard = Guard(open_firewall(Family.IPV4, self.backend, runtime), clock=lambda: self.now)

    def run(self, *commands: str) -> None:
        for command in commands:
            argv([f"iptables-{self.backend}", "-w", *command.split()])

    def restore(self, *lines: str) -> None:
        argv(
            [f"iptables-{self.backend}-restore", "-w", "--noflush"], stdin="\n".join(("*filter", *lines, "COMMIT", ""))
        )

    def rules(self) -> list[str]:
        return argv([f"iptables-{self.backend}", "-w", "-S", "FORWARD"]).splitlines()[1:]

    def enforce(self) -> None:
        self.guard.desired = Desired(Family.IPV4, {Table.FILTER: desired(self.position)}, (), ("cali-*",))
        self.guard.settle(Table.FILTER, everything=True)

    def wake(self) -> None:
        """As the daemon does when it has heard of something, and when something is due."""
        if self.backend is Backend.NFT:
            self.guard.strike(Table.FILTER, ["FORWARD"], self.guard.firewall.stamp(), self.now)
        tables = dict.fromkeys([*self.guard.drifted(), *(self.guard.suspects() if self.now >= self.guard.due else ())])
        for table in tables:
            settled = self.guard.settle(table)
            if settled.commits:
                self.repairs.append((self.now, settled))

    @property
    def right(self) -> bool:
        return not self.guard.preview(Table.FILTER)[0].steps


@contextmanager
def kernel(backend: Backend, position: Position, *rules: str) -> Iterator[Kernel]:
    made = Kernel(backend, position)
    made.restore(*rules)
    made.enforce()
    try:
        yield made
    finally:
        made.guard.firewall.close()


@dataclass
class Felix:
    """Calico in its Insert mode (neighbours.md of its own sources: table.go): its jump first, its last rule last.

    One transaction that deletes and inserts; then it looks again after 1, 2 and 4 s, then at its refresh.
    """

    kernel: Kernel
    due: float = 0.0
    pause: float = 1.0
    writes: list[float] = field(default_factory=list)
    RULES = (
        ":cali-FORWARD - [0:0]",
        "-A FORWARD -j cali-FORWARD",
        "-A FORWARD -j KUBE-FORWARD",
        "-A FORWARD -j ACCEPT",
    )

    def look(self) -> None:
        rules, lines = self.kernel.rules(), []
        if rules[0] != "-A FORWARD -j cali-FORWARD":
            lines += ["-D FORWARD -j cali-FORWARD", "-I FORWARD -j cali-FORWARD"]
        if rules[-1] != "-A FORWARD -j ACCEPT":
            lines += ["-D FORWARD -j ACCEPT", "-A FORWARD -j ACCEPT"]
        if lines:
            self.kernel.restore(*lines)
            self.writes.append(self.kernel.now)
            self.pause = 0.5
        self.pause = self.pause * 2 if self.pause < 4 else 180.0
        self.due = self.kernel.now + self.pause


def fight(kernel: Kernel, felix: Felix, seconds: float) -> None:
    """Turn the clock from one thing that is due to the next."""
    end = kernel.now + seconds
    felix.due = felix.due or kernel.now + 1.0
    while (then := min(felix.due, kernel.guard.due)) < end:
        kernel.now = then
        if felix.due <= kernel.now:
            felix.look()
        kernel.wake()
    kernel.now = end


def lose(kernel: Kernel, felix: Felix) -> None:
    """Fight until ours waits for its turn, for some seconds yet."""
    while kernel.right or kernel.guard.due - kernel.now < 5:
        fight(kernel, felix, 0.5)


FELIX = (":KUBE-FORWARD - [0:0]", *Felix.RULES)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("position", [FIRST, LAST], ids=["first", "last"])
@in_own_namespace
def test_a_war_is_recognised_within_three_rounds_and_ends_up_below_one_repair_a_minute(
    backend: Backend, position: Position
) -> None:
    with kernel(backend, position, *FELIX) as here:
        felix = Felix(here)
        while not here.guard.pacer.contests(here.now):
            fight(here, felix, 0.5)
        assert len(here.repairs) == ROUNDS
        assert all(settled.changes[0].reason is Reason.DISPLACED for _, settled in here.repairs)
        fight(here, felix, 10 * MINUTE)
        before, begun = len(here.repairs), here.now
        fight(here, felix, 10 * MINUTE)
        assert 0 < len(here.repairs) - before < (here.now - begun) / MINUTE
        (contest,) = here.guard.pacer.contests(here.now)
        assert contest.wait == LAST_WAIT
        assert "slowed down" in here.guard.unmet[0]
        assert here.rules().count("-A FORWARD -j cali-FORWARD") == 1


@pytest.mark.parametrize("backend", BACKENDS)
@in_own_namespace
def test_with_early_there_is_no_war_at_all(backend: Backend) -> None:
    with kernel(backend, EARLY, *FELIX) as here:
        felix = Felix(here)
        fight(here, felix, 10 * MINUTE)
        assert felix.writes == []
        assert here.repairs == []
        assert here.rules()[0] == "-A FORWARD -j cali-FORWARD"


@pytest.mark.parametrize("backend", BACKENDS)
@in_own_namespace
def test_it_is_over_by_itself_when_the_other_side_stops(backend: Backend) -> None:
    with kernel(backend, FIRST, *FELIX) as here:
        lose(here, Felix(here))
        while here.guard.due < float("inf"):  # nobody else writes
            here.now = here.guard.due + 0.001
            here.wake()
        assert here.right
        assert here.guard.pacer.contests(here.now) == ()
        assert here.guard.unmet == ()
        here.run("-D FORWARD -j cali-FORWARD", "-I FORWARD -j cali-FORWARD")
        here.wake()
        assert here.right


@pytest.mark.parametrize("backend", BACKENDS)
@in_own_namespace
def test_how_long_a_rule_stood_wrong_is_counted_from_the_first_look_that_saw_it(backend: Backend) -> None:
    with kernel(backend, FIRST, *FELIX) as here:
        felix = Felix(here)
        lose(here, felix)
        here.now += 1.0
        wrong = felix.writes[-1]
        here.run("-N ELSEWHERE")  # what is seen meanwhile changes nothing in that
        here.wake()
        here.now = here.guard.due
        here.wake()
        assert here.right
        assert here.repairs[-1][1].since == wrong


RESTART = (
    "-D FORWARD -j DOCKER-ISOLATION-STAGE-1",
    "-I FORWARD -j DOCKER-ISOLATION-STAGE-1",
    "-D FORWARD -j DOCKER-USER",
    "-I FORWARD -j DOCKER-USER",
)
DOCKER = (
    ":DOCKER-USER - [0:0]",
    ":DOCKER-ISOLATION-STAGE-1 - [0:0]",
    "-A FORWARD -j DOCKER-USER",
    "-A FORWARD -j DOCKER-ISOLATION-STAGE-1",
)


@pytest.mark.parametrize("backend", BACKENDS)
@in_own_namespace
def test_many_restarts_of_docker_in_a_row_are_answered_at_once(backend: Backend) -> None:
    with kernel(backend, FIRST, *DOCKER) as here:
        for _ in range(15):
            here.now += 2.2
            for command in RESTART:
                here.run(command)
                here.now += 0.01
                here.wake()
                assert here.right, command
        assert here.guard.pacer.contests(here.now) == ()


@pytest.mark.parametrize("backend", BACKENDS)
@in_own_namespace
def test_a_restart_of_docker_during_a_war_with_calico_does_not_wait(backend: Backend) -> None:
    with kernel(backend, FIRST, *FELIX, *DOCKER) as here:
        lose(here, Felix(here))
        here.run(*RESTART[-2:])
        here.wake()
        assert here.right


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chain", ["FORWARD", "NODEWALL-0"])
@in_own_namespace
def test_what_is_taken_out_never_waits_for_a_war(backend: Backend, chain: str) -> None:
    with kernel(backend, FIRST, *FELIX) as here:
        lose(here, Felix(here))
        here.run(f"-F {chain}")
        here.wake()
        assert here.right


# --- the daemon

CONFIG = """
[daemon]
resync = "1h"

[[rule]]
name = "telnet"
table = "filter"
chain = "FORWARD"
rule = "-p tcp --dport 23 -j DROP"
families = ["ipv4"]
position = "{position}"
"""

# Looks 20 times a second, and does as Felix does.
CALICO = """#!/bin/sh
while sleep 0.05; do
  case "$(iptables -w -S FORWARD | sed -n 2p)" in
    *cali-FORWARD*) ;;
    *) printf '*filter\\n-D FORWARD -j cali-FORWARD\\n-I FORWARD -j cali-FORWARD\\nCOMMIT\\n' |
         iptables-restore -w --noflush && echo written ;;
  esac
done
"""


@contextmanager
def calico(node: Node) -> Iterator[Callable[[], int]]:
    """Runs until the end; tells how often it has written."""
    program = node.directory / "calico-node"
    program.write_text(CALICO)
    program.chmod(0o755)
    process = node.popen([str(program)], log="calico")
    try:
        yield lambda: node.logs["calico"].read_text().count("written")
    finally:
        process.kill()


def test_who_and_how_often_and_what_would_end_it_is_told_and_its_end_too(node: Node, backend: BackendName) -> None:
    node.run("iptables-restore", stdin="*filter\n" + "\n".join(FELIX) + "\nCOMMIT\n")
    with Daemon(node, CONFIG.format(position="first")) as daemon:
        daemon.wait_ready()
        with calico(node) as written:
            (begun,) = wait_events(daemon, bool, "contention")
            assert len(events(daemon, "repair")) == ROUNDS
            who = "calico-node" if backend == "nft" else "another program"
            words = (
                f"filter FORWARD (IPv4): {who} puts the jump to cali-FORWARD in the place of our jump again and again"
            )
            assert begun["message"].startswith(f"Contention in {words}, 3 times in ")
            assert "ChainInsertMode: Append" in begun["message"]
            assert begun["message"] in daemon.log_text()

            wait_events(daemon, lambda seen: any(e["exposed_ms"] > 600 for e in seen), "repair")  # it waits 1 s by now
            status = ask(daemon, "status")
            (contest,) = status["contention"]
            assert contest["what"].startswith(words)
            assert contest["takers"] == ["-j cali-FORWARD"]
            assert contest["repairs"] > ROUNDS
            assert status["state"] == "degraded"
            assert any("slowed down" in reason for reason in status["reasons"])
            assert words in " ".join(daemon.ctl("status").stdout.split())

            assert daemon.reload(CONFIG.format(position="early")).returncode == 0
            (over,) = wait_events(daemon, bool, "peace")
            assert "filter FORWARD (IPv4) is over after " in over["message"]
            wait_in_force(daemon)
            status = ask(daemon, "status")
            assert (status["state"], status["contention"]) == ("enforcing", [])
            assert "cali-FORWARD" in node.chain("filter", "FORWARD")[0]
            before, repairs = written(), len(events(daemon, "repair"))
            looked = node.run("date +%s%N").stdout
            wait_for(lambda: int(node.run("date +%s%N").stdout) > int(looked) + 5 * 10**8)
            assert (written(), len(events(daemon, "repair"))) == (before, repairs)
            assert len(our_rules(node, "filter", "FORWARD", "ipv4")) == 1
    assert len(events_of(daemon, "degraded")) <= 2


def events_of(daemon: Daemon, kind: str) -> list[str]:
    return [line for line in daemon.log_text().splitlines() if kind in line.lower()]
