"""Zones, proven with packets: one zone for each packet to this node, judged as it was dialled, before any DNAT."""

from collections.abc import Iterator

import pytest

from lab import layout
from lab.daemon import Daemon
from lab.layout import FamilyName
from lab.node import BackendName, Node
from lab.traffic import Connection, Probe, Verdict, connect, connect_all, serve, serve_cluster

pytestmark = pytest.mark.kernel

OPEN, SHUT, REFUSED = Verdict.OPEN, Verdict.TIMEOUT, Verdict.REFUSED

# Trusted may all, public little, internal what public may and the API server besides: `include`, where a source in two
# of firewalld's zones loses the services of the first.
ZONES = """
[failsafe]
ports = []

[zone.trusted]
sources = ["10.90.0.7", "fd90::7"]
target  = "accept"

[zone.internal]
sources  = ["203.0.113.8", "2001:db8:c::8"]
include  = ["public"]
services = ["kube-apiserver"]
target   = "reject"

[zone.public]
interfaces = ["eth0"]
services   = ["ssh"]
ports      = ["30001/tcp"]
target     = "drop"
"""

WEB, RELAY, SSH, API, KUBELET, DNS = 31002, 30001, 22, 6443, 10250, 31002

# Who meets what, at which port of the node. NodePorts are guarded as dialled, though kube-proxy rewrites them.
MATRIX = [
    (layout.ALLOWED, {WEB: OPEN, RELAY: OPEN, SSH: OPEN, API: OPEN, KUBELET: OPEN}),
    (layout.STRANGER_2, {WEB: REFUSED, RELAY: OPEN, SSH: OPEN, API: OPEN, KUBELET: REFUSED}),
    (layout.STRANGER, {WEB: SHUT, RELAY: OPEN, SSH: OPEN, API: SHUT, KUBELET: SHUT}),
]


@pytest.fixture(scope="module", params=["nft", "legacy"])
def zoned(laboratory: None, request: pytest.FixtureRequest) -> Iterator[Node]:
    """A node that kube-proxy serves, with the zones of seed 003 in force."""
    backend: BackendName = request.param
    with Node(backend) as node:
        node.load("tests/captures/kp126-{backend}-3svc")
        serve_cluster(node)
        serve(node, "node", udp=[68, 546])
        node.daemon = Daemon(node, ZONES).wait_ready()  # type: ignore[attr-defined]
        yield node


def test_who_reaches_what(zoned: Node, family: FamilyName) -> None:
    probes, expected = [], []
    for source, ports in MATRIX:
        for port, verdict in ports.items():
            to = (layout.NODE.of(family), port)
            probes.append(Probe("client", to, source=source.of(family), protocol="tcp"))
            expected.append((source.of(family), port, verdict))
    seen = [(p.source, p.to[1], answer.verdict) for p, answer in zip(probes, connect_all(zoned, probes), strict=True)]
    assert seen == expected


def test_a_udp_port_outside_the_zone_is_shut(zoned: Node, family: FamilyName) -> None:
    answers = connect_all(
        zoned,
        [
            Probe("client", (layout.NODE.of(family), DNS), source=who.of(family), protocol="udp")
            for who in (layout.STRANGER, layout.STRANGER_2, layout.ALLOWED)
        ],
    )
    assert [a.verdict for a in answers] == [SHUT, REFUSED, OPEN]


def test_transit_traffic_belongs_to_no_zone(zoned: Node, family: FamilyName) -> None:
    to = (layout.BEYOND.of(family), 443)
    assert connect(zoned, "client", source=layout.STRANGER.of(family), to=to, protocol="tcp").open


def test_pods_and_the_node_itself_belong_to_no_zone(zoned: Node, family: FamilyName) -> None:
    kubelet = (layout.NODE.of(family), KUBELET)
    assert connect(zoned, "pod1", to=kubelet, protocol="tcp").open
    assert connect(zoned, "node", to=kubelet, protocol="tcp").open
    assert connect(zoned, "node", to=(layout.LOOPBACK.of(family), KUBELET), protocol="tcp").open


def test_the_node_s_own_connections_and_their_replies_pass(zoned: Node, family: FamilyName) -> None:
    serve(zoned, "client", tcp=[8443])
    to = (layout.STRANGER.of(family), 8443)
    assert connect(zoned, "node", to=to, protocol="tcp").open
    assert connect(zoned, "pod1", to=to, protocol="tcp").open


def test_echo_passes_whatever_the_zone(zoned: Node, family: FamilyName) -> None:
    to = (layout.NODE.of(family), 0)
    assert connect(zoned, "client", source=layout.STRANGER.of(family), to=to, protocol="icmp").open


def test_neighbour_discovery_works_from_nothing(zoned: Node) -> None:
    zoned.run("ip -6 neigh flush dev eth0", ns="client")
    zoned.run("ip -6 neigh flush dev eth0")
    to = (layout.NODE.ipv6, SSH)
    assert connect(zoned, "client", source=layout.STRANGER.ipv6, to=to, protocol="tcp").open


def test_an_established_connection_of_an_allowed_service_survives_a_reload(zoned: Node, family: FamilyName) -> None:
    to = (layout.NODE.of(family), SSH)
    session = Connection(zoned, "client", source=layout.STRANGER.of(family), to=to)
    assert session.alive()
    assert zoned.daemon.ctl("reload").returncode == 0  # type: ignore[attr-defined]
    assert session.alive()
    session.close()


def test_what_is_in_force_is_what_is_planned(zoned: Node) -> None:
    plan = zoned.daemon.ctl("plan")  # type: ignore[attr-defined]
    assert plan.returncode == 0, plan.stdout
