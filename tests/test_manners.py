"""Whoever deletes our chains by a restore of several tables is left to end it, for a moment, before they come back.

Else iptables-nft-restore, which reads every chain of its family for each table, could find one of its chains twice.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from kernel_ns import argv, in_own_namespace
from live import events, wait_events, wait_in_force
from test_plan import desired

from lab.daemon import Daemon
from lab.node import Node
from nodewalld.core.config import Anchor, AnchorKind, Place, Position
from nodewalld.core.desired import Desired
from nodewalld.core.events import Culprit
from nodewalld.core.observed import Observed
from nodewalld.core.plan import TablePlan
from nodewalld.core.words import Backend, Family, Table
from nodewalld.guard import Guard
from nodewalld.kernel.culprit import LINGER, outlast
from nodewalld.kernel.firewall import NftFirewall, open_firewall
from nodewalld.kernel.nftables import NftablesReader

LONG = 60.0
UNANCHORED = Position(Place.BETWEEN, (Anchor(AnchorKind.TARGET, "KUBE-FORWARD"),), ())


@contextmanager
def running(tmp_path: Path, name: str, seconds: float) -> Iterator[subprocess.Popen[bytes]]:
    """A process that bears this name and ends by itself."""
    program = tmp_path / name
    shutil.copy(shutil.which("sleep") or "", program)
    process = subprocess.Popen([program, str(seconds)])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has, without taking its place in the table of processes."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


@pytest.mark.parametrize(
    "name", ["iptables-restore", "ip6tables-restore", "iptables-nft-restore", "ip6tables-nft-restore"]
)
def test_a_restore_that_still_runs_is_waited_for(tmp_path: Path, name: str) -> None:
    with running(tmp_path, name, 0.3) as tool:
        outlast([Culprit(tool.pid, name[:15])], time.monotonic() + LONG)
        assert ended(tool)


def test_but_not_beyond_the_time_that_it_is_granted(tmp_path: Path) -> None:
    with running(tmp_path, "iptables-restore", LONG) as tool:
        begun = time.monotonic()
        outlast([Culprit(tool.pid, "iptables-restor")] * 3, begun + 0.1)
        assert 0.1 <= time.monotonic() - begun < 10
        assert not ended(tool)


@pytest.mark.parametrize(
    ("name", "comm"),
    [
        pytest.param("iptables", "iptables", id="of one command"),
        pytest.param("kube-proxy", "kube-proxy", id="that lives on"),
        pytest.param("another", "iptables-restor", id="whose number is another's by now"),
    ],
)
def test_nobody_else_is_waited_for(tmp_path: Path, name: str, comm: str) -> None:
    with running(tmp_path, name, LONG) as process:
        outlast([Culprit(process.pid, comm)], time.monotonic() + LONG)
        assert not ended(process)
    outlast([Culprit(process.pid, comm)], time.monotonic() + LONG)  # and it has gone


@in_own_namespace
def test_the_moment_comes_once_before_chains_of_ours_are_made_anew_and_what_happens_in_it_is_seen() -> None:
    guard = Guard(open_firewall(Family.IPV4, Backend.NFT, Path("/run/nodewalld")))
    guard.desired = Desired(Family.IPV4, {Table.FILTER: desired(Position(Place.FIRST))}, (), ())
    guard.settle(Table.FILTER)
    seen: list[str] = []

    def linger() -> None:
        seen.append(argv(["iptables-nft", "-S"]))
        argv(["iptables-nft", "-A", "FORWARD", "-p", "99"])

    for commands, moments in ((["-F"], 0), (["-I FORWARD -j ACCEPT"], 0), (["-F", "-X"], 1)):
        for command in commands:
            argv(["iptables-nft", *command.split()])
        settled = guard.settle(Table.FILTER, linger=linger)
        assert (len(seen), settled.commits) == (moments, 1), commands
    assert "NODEWALL" not in seen[0]
    ours, theirs = argv(["iptables-nft", "-S", "FORWARD"]).splitlines()[1:]
    assert "NODEWALL" in ours
    assert theirs == "-A FORWARD -p 99"
    guard.firewall.close()


class Overtaken(NftFirewall):
    """Commits by iptables-restore, and what a flusher writes anew comes just before that."""

    def apply(self, planned: TablePlan, observed: Observed, stamp: int) -> int:
        if not observed.chains["FORWARD"]:
            argv(
                ["iptables-nft-restore", "-n"],
                stdin="*filter\n-A FORWARD -i lo -j ACCEPT\n-A FORWARD -j REJECT\nCOMMIT\n",
            )
        return self.commit(planned.script)


@pytest.mark.parametrize(
    "place",
    [Position(Place.FIRST), Position(), UNANCHORED, Position(Place.LAST)],
    ids=["first", "early", "between", "last"],
)
@in_own_namespace
def test_what_a_flusher_appends_meanwhile_does_not_push_ours_down(place: Position) -> None:
    """One whose anchors are not there stays where it stands, so that it would stay below their REJECT for good."""
    guard = Guard(Overtaken(Family.IPV4, NftablesReader()))
    argv(["iptables-nft", "-A", "FORWARD", "-j", "ACCEPT"])
    guard.desired = Desired(Family.IPV4, {Table.FILTER: desired(place)}, (), ())
    guard.settle(Table.FILTER)
    argv(["iptables-nft", "-F"])
    guard.settle(Table.FILTER)
    rules = argv(["iptables-nft", "-S", "FORWARD"]).splitlines()[1:]
    assert ["NODEWALL" in rule for rule in rules] == [place.place is not Place.LAST, False, place.place is Place.LAST]
    guard.firewall.close()


CONFIG = """
[daemon]
backend = "nft"
resync = "1h"

[[rule]]
name = "last-resort"
table = "security"
chain = "FORWARD"
rule = "-p tcp --dport 23 -j DROP"
families = ["ipv4"]

[[rule]]
name = "telnet"
table = "filter"
chain = "FORWARD"
rule = "-p tcp --dport 23 -j DROP"
families = ["ipv4"]
"""


def test_a_restore_that_takes_long_over_its_tables_gets_its_moment_and_no_more(laboratory: None) -> None:
    with Node("nft") as node, Daemon(node, CONFIG) as daemon:
        daemon.wait_ready()
        told = events(daemon)[-1]["time"]
        restore = node.popen(["iptables-nft-restore", "-n"], stdin=subprocess.PIPE)
        assert restore.stdin is not None
        for table in ("security", "filter"):
            restore.stdin.write(f"*{table}\n-F\n-X\nCOMMIT\n")
            restore.stdin.flush()
            repaired = wait_events(daemon, bool, "repair", since=told)
            told = repaired[-1]["time"]
            assert {event["table"] for event in repaired} == {table}
            assert all(event["by"]["comm"] == "iptables-nft-re" for event in repaired)
            assert all(event["exposed_ms"] >= LINGER * 1000 for event in repaired)
            wait_in_force(daemon)
        restore.stdin.close()
        assert restore.wait(LONG) == 0
