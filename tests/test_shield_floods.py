"""A constant flood of everything that the shield refuses, through all that may happen to a firewall: nothing passes.

The same figures without a shield stand beside them; `pytest -s` shows both.
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import pytest
from entries import refusals
from live import ask, wait_in_force
from shields import leave_another_shape, stands

from lab.daemon import Daemon
from lab.flood import Flood, FloodReport
from lab.layout import BEYOND, FAMILIES, NODE, STRANGER, Address, FamilyName
from lab.node import TOOLS, Node

pytestmark = pytest.mark.kernel

RATE = 16_000  # packets a second of all streams together
LEAST = 10_000  # as they were really sent, whatever else the machine did
KINDS = {
    7001: "[[port]] drop",
    7002: "[[port]] reject",
    7003: "[[port]] redirect",
    7004: "zone",
    7011: "[[forward]] drop, by a set",
    7012: "[[forward]] reject, by a set",
}
OPEN_HERE, OPEN_BEYOND = 7009, 7019
CONFIG = f"""{refusals("udp", STRANGER.ipv4, STRANGER.ipv6)}
[zone.four]
sources = ["{STRANGER.ipv4}"]
ports = ["7001-7003/udp", "7009/udp"]
target = "drop"

[zone.six]
sources = ["{STRANGER.ipv6}"]
ports = ["7001-7003/udp", "7009/udp"]
target = "reject"

[[forward]]
name = "answered-behind"
source = "@foes"
protocol = "udp"
ports = [7012]
action = "reject"
"""
WAYS = {"with": "", "without": '[daemon]\nshield = "off"\n'}


class Span(NamedTuple):
    """A time of the flood, and what happened then."""

    what: str
    since: float
    until: float


class Flooded:
    """A node under four streams, IPv4 and IPv6 to the node itself and through it, and what happens meanwhile."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.spans: list[Span] = []
        self._reports: list[tuple[FamilyName, FloodReport]] = []

    @contextmanager
    def flood(self) -> Iterator[None]:
        """As long as this lasts. Each port's packets come from ports of their own, so that all are new to conntrack."""
        here, beyond = (7001, 7002, 7003, 7004, OPEN_HERE), (7011, 7012, OPEN_BEYOND)
        with ExitStack() as stack:
            floods = [
                (family, stack.enter_context(self._stream(family, to, ports, sink)))
                for family in FAMILIES
                for to, ports, sink in ((NODE, here, "node"), (BEYOND, beyond, "beyond"))
            ]
            with self.during("all the time"):
                yield
            self._reports = [(family, flood.stop()) for family, flood in floods]

    def _stream(self, family: FamilyName, to: Address, ports: tuple[int, ...], sink: str) -> Flood:
        return Flood(
            self.node,
            "client",
            to=(to.of(family), ports[0]),
            more=ports[1:],
            source=STRANGER.of(family),
            sinks=[sink],
            rate=RATE / 4,
            source_ports=40_000,
        )

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Remember when this happened."""
        since = time.monotonic()
        yield
        self.spans.append(Span(what, since, time.monotonic()))

    def passed(self, span: Span) -> Counter[str]:
        """How many packets passed then, of each kind that should not."""
        found: Counter[str] = Counter()
        for family, report in self._reports:
            for port in report.ports:
                if port in KINDS:
                    found[f"{KINDS[port]}, {family}"] += len(report.passed_to(port, span.since, span.until))
        return found

    def sent(self, span: Span) -> int:
        """How many packets were sent then."""
        return sum(len(report.sent_between(span.since, span.until)) for _, report in self._reports)

    @property
    def rate(self) -> float:
        """How many packets were sent a second."""
        return sum(report.sent / (report.sent_at[-1] - report.sent_at[0]) for _, report in self._reports)

    def through(self) -> float:
        """Which part of the packets to open ports passed: as good as all, or the flood has proved nothing."""
        sent = sum(report.sent / len(report.ports) for _, report in self._reports)
        passed = sum(len(report.passed_to(p)) for _, report in self._reports for p in report.ports if p not in KINDS)
        return passed / sent


def storm(node: Node, rounds: int) -> None:
    """What cleanup scripts, restores and clumsy neighbours do to our chains, again and again."""
    lines = []
    for tool in TOOLS.values():
        lines += [f"{tool} -t mangle -F", f"{tool} -F", f"{tool} -t nat -F", f"{tool} -t mangle -D PREROUTING 1"]
        lines += [f"{tool}-save -t mangle | grep -v NODEWALL | {tool}-restore -T mangle"]
        lines += [f"{tool} -t mangle -I {chain} -j ACCEPT" for chain in ("PREROUTING", "INPUT", "FORWARD")]
    node.run(f"for i in $(seq {rounds}); do\n" + " 2>&-\n".join(lines) + " 2>&-\ndone", check=False)


def flush(node: Node) -> None:
    """Take everything out of iptables."""
    node.run("\n".join(f"{tool} -t {table} -F" for tool in TOOLS.values() for table in ("mangle", "filter", "nat")))


def reload(daemon: Daemon, config: str) -> None:
    result = daemon.reload(config)
    assert result.returncode == 0, result.stderr


def come_back(daemon: Daemon) -> None:
    daemon.start()
    daemon.wait_ready()


def disturb(flooded: Flooded, daemon: Daemon, config: str) -> None:
    """Everything that must not open a door, one after the other."""
    node = daemon.node
    other = "legacy" if node.backend == "nft" else "nft"
    with flooded.during("storm of flushes, restores and deletions"):
        storm(node, 3 if node.backend == "nft" else 9)
    wait_in_force(daemon)
    with flooded.during("nft flush ruleset, nft delete table"):
        for _ in range(4):
            node.run("nft flush ruleset; nft delete table inet nodewalld; nft delete table ip mangle", check=False)
            time.sleep(0.03)
    wait_in_force(daemon)
    with flooded.during("kill -9, iptables -F, restart"):
        daemon.kill9()
        flush(node)
        come_back(daemon)
    with flooded.during("upgrade from a table of another shape"):
        daemon.stop()
        flush(node)
        if stands(node):
            leave_another_shape(daemon)
        come_back(daemon)
    with flooded.during("reload"):
        reload(daemon, config + '[[port]]\nname = "more"\nports = [9]\n')
    with flooded.during("backend switch"):
        reload(daemon, f'[daemon]\nbackend = "{other}"\n' + config.removeprefix("[daemon]\n"))
        reload(daemon, config)


def test_nothing_passes_the_shield_whatever_happens_to_the_firewall(node: Node) -> None:
    """Of 10,000 packets a second and more, of each kind that the shield carries, in both families."""
    node.sysctl("net.netfilter.nf_conntrack_udp_timeout", "1")  # what was redirected is soon new to conntrack again
    leaks: dict[str, dict[str, Counter[str]]] = {}
    for way, first in WAYS.items():
        flooded = Flooded(node)
        with Daemon(node, first + CONFIG, name=way) as daemon:
            daemon.wait_ready()
            with flooded.flood():
                disturb(flooded, daemon, first + CONFIG)
            ask(daemon, "remove")
        leaks[way] = {span.what: flooded.passed(span) for span in flooded.spans}
        for span in flooded.spans:
            sent, took = flooded.sent(span), span.until - span.since
            print(f"{node.backend}, {way}: {span.what}: {sent} in {took:.1f} s, passed {dict(+leaks[way][span.what])}")
            assert sent > 1000, span
        assert flooded.rate >= LEAST
        assert flooded.through() > 0.9
    assert {what: +passed for what, passed in leaks["with"].items() if +passed} == {}
    assert +leaks["without"]["storm of flushes, restores and deletions"]
    without_daemon = leaks["without"]["kill -9, iptables -F, restart"]
    assert set(+without_daemon) == set(leaks["with"]["all the time"])  # each kind was there to be stopped
