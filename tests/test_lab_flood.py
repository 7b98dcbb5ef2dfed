"""What a flood counts is exact: each packet that passed, and when."""

import time
from itertools import pairwise

import pytest
from packets import iptables

from lab import layout
from lab.flood import Flood
from lab.node import Node
from lab.traffic import (
    serve_cluster,
)
from lab.waiting import wait_for

pytestmark = pytest.mark.kernel

NODEPORT = 31002


@pytest.mark.parametrize("rate", [2000, 5000])
def test_a_flood_counts_every_packet_of_an_open_port(node: Node, family: str, rate: int) -> None:
    flood = Flood(node, "client", source=layout.STRANGER.of(family), to=(layout.NODE.of(family), 7000), rate=rate)
    flood.start()
    begun = time.monotonic()
    wait_for(lambda: time.monotonic() > begun + 0.2)
    report = flood.stop()
    assert report.received == report.sent == len(report.passed)
    assert report.ranges() == [(0, report.sent - 1)]
    assert report.errors == {}
    assert report.sent > 50


def test_a_flood_has_an_even_pace(node: Node) -> None:
    flood = Flood(node, "client", to=(layout.NODE.ipv4, 7000), rate=2000).start()
    begun = time.monotonic()
    wait_for(lambda: time.monotonic() > begun + 0.2)
    sent = flood.stop().sent_at
    even = [0.0003 < later - earlier < 0.0007 for earlier, later in pairwise(sent)]
    assert sum(even) > len(even) / 2


def test_a_flood_to_several_targets_tells_them_apart(node: Node, family: str) -> None:
    here, there = (layout.NODE.of(family), 7000), (layout.POD1.of(family), 7001)
    flood = Flood(node, "client", source=layout.STRANGER.of(family), to=here, more=[there], sinks=["node", "pod1"])
    flood.start()
    begun = time.monotonic()
    wait_for(lambda: time.monotonic() > begun + 0.1)
    report = flood.stop()
    assert report.received == report.sent
    assert {(report.port_of(number), sink) for number, _, sink in report.passed} == {(7000, "node"), (7001, "pod1")}
    assert len(report.passed_to(7000)) - len(report.passed_to(7001)) in (0, 1)


def test_a_flood_tells_when_packets_passed(node: Node, family: str) -> None:
    target = (layout.NODE.of(family), 7000)
    flood = Flood(node, "client", source=layout.STRANGER.of(family), to=target).start()
    begun = time.monotonic()
    wait_for(lambda: time.monotonic() > begun + 0.2)  # the first packets may wait for the neighbour's address
    rule = "INPUT -p udp --dport 7000 -j DROP"
    iptables(node, family, f"-I {rule}")
    shut = time.monotonic()
    wait_for(lambda: time.monotonic() > shut + 0.1)
    reopened = time.monotonic()
    iptables(node, family, f"-D {rule}")
    open_again = time.monotonic()
    wait_for(lambda: time.monotonic() > open_again + 0.1)
    report = flood.stop()
    assert report.passed_between(shut, reopened) == []
    assert len(report.sent_between(shut, reopened)) > 50
    assert report.lost_between(open_again) == []
    assert len(report.leaks()) == 2


def test_a_flood_against_a_drop_receives_nothing(node: Node, family: str) -> None:
    iptables(node, family, "-A INPUT -p udp -j DROP")
    flood = Flood(node, "client", to=(layout.NODE.of(family), 7000)).start()
    begun = time.monotonic()
    wait_for(lambda: time.monotonic() > begun + 0.1)
    report = flood.stop()
    assert report.received == 0
    assert report.sent > 50


def test_a_tcp_flood_watches_a_node_port_through_its_dnat(kube_node: Node, family: str) -> None:
    serve_cluster(kube_node)
    target = (layout.NODE.of(family), NODEPORT)
    source = layout.STRANGER.of(family)
    flood = Flood(kube_node, "client", source=source, to=target, protocol="tcp", sinks=["pod1", "pod2"], sink_port=8080)
    flood.start()
    begun = time.monotonic()
    wait_for(lambda: time.monotonic() > begun + 0.1)
    iptables(kube_node, family, f"-t mangle -I PREROUTING -p tcp --dport {NODEPORT} -j DROP")
    shut = time.monotonic()
    wait_for(lambda: time.monotonic() > shut + 0.1)
    report = flood.stop()
    assert {where for _, _, where in report.passed} == {"pod1", "pod2"}
    assert report.passed_between(shut) == []
    assert len(report.sent_between(shut)) > 50
    # Nothing was lost before the drop came: what passed is one run from the first packet on.
    assert len(report.ranges()) == 1
    assert report.ranges()[0][0] == 0
