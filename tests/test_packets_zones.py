"""To which zone a packet belongs, and what passes whatever the zone; every way into the node is judged as dialled."""

from collections.abc import Iterator

import pytest
from captured import CAPTURES, add_capture, restore
from packets import OPEN, REFUSED, SHUT, TIMEOUT, Guarded, both, dial, dial_from, expect, iptables

from lab.layout import (
    ALLOWED,
    ALLOWED_2,
    CLUSTER_NODE,
    FAMILIES,
    KUBERNETES_SERVICE,
    NEIGHBOUR,
    NODE,
    POD1,
    POD2,
    RELAY_SERVICE,
    STRANGER,
    WEB_SERVICE,
    Address,
)
from lab.node import BackendName, Node
from lab.traffic import Probe, Protocol, Verdict, notrack, serve, serve_cluster
from lab.wire import GRE, ICMP, ICMPV6, IGMP, IPIP, UDP, Packet, exchange, icmp
from nodewalld.configuration.services import BUILT_IN

pytestmark = pytest.mark.kernel

LOAD_BALANCER = Address("198.51.100.200", "2001:db8:b::200")  # of Services, held by no interface
CONTAINER = Address("172.17.0.2", "fd00:d0c::242:ac11:2")  # of Docker's captures, published as 8080
HOSTPORT_POD = Address("10.88.0.2", "fd88::2")  # of portmap's capture: hostPorts 8088/tcp and 5300/udp


@pytest.fixture(scope="module")
def node(laboratory: None, backend: BackendName) -> Iterator[Node]:
    """kube-proxy, Docker with a published container, and CNI's portmap with a hostPort, on one node."""
    with Node(backend) as made:
        for name, link, host, gateway in (
            ("web", "docker0", CONTAINER, Address("172.17.0.1", "fd00:d0c::1")),
            ("hostport", "knet0", HOSTPORT_POD, Address("10.88.0.1", "fd88::1")),
        ):
            near, far = ([f"{who.ipv4}/16", f"{who.ipv6}/64"] for who in (gateway, host))
            made.attach(name, link, node=near, host=far)
            serve(made, name, tcp=[80], udp=[53])
        add_capture(made, "kp126-{backend}-3svc")
        for capture, family in (("container-published", "ipv4"), ("ip6tables-container-published", "ipv6")):
            rules = CAPTURES / f"docker-20.10-{backend}-{capture}.v{family[-1]}.rules"
            restore(made, family, rules.read_text())
        add_portmap(made)
        for family in FAMILIES:
            iptables(made, family, "-P FORWARD ACCEPT", *load_balancer(family))
        serve_cluster(made)
        serve(made, "node", tcp=[*range(8001, 8008), 8101, 8102], udp=[68, 69, 546, 547])
        yield made


def add_portmap(node: Node) -> None:
    """portmap's rules as captured, and the same written for IPv6, which its capture has none of."""
    add_capture(node, "cni-portmap-1.1.1-{backend}-hostport")
    rules = (CAPTURES / f"cni-portmap-1.1.1-{node.backend}-hostport.v4.rules").read_text()
    for old, new in (
        ("10.88.0.2:", "[fd88::2]:"),
        ("10.88.0.2/32", "fd88::2/128"),
        ("10.88.0.0/16", "fd88::/64"),
        ("127.0.0.1/32", "::1/128"),
        ("224.0.0.0/4", "ff00::/8"),
    ):
        rules = rules.replace(old, new)
    restore(node, "ipv6", rules)


def load_balancer(family: str) -> list[str]:
    """What kube-proxy writes for addresses of a load balancer: shop/web as 8888, the node's own API server as 6443."""
    rule = f"-t nat -I KUBE-SERVICES -d {LOAD_BALANCER.of(family)} -p tcp --dport"
    return [f"{rule} 8888 -j KUBE-EXT-XFKN4M7H6MSYKOEJ", f"{rule} 6443 -j {api_chain(family)}"]


def api_chain(family: str) -> str:
    """The chain of default/kubernetes in the captures."""
    stem = CAPTURES / f"kp126-nft-3svc.{'v4' if family == 'ipv4' else 'v6'}.save"
    words = next(line for line in stem.read_text().splitlines() if "default/kubernetes:p cluster IP" in line).split()
    return words[words.index("-j") + 1]


# --- one zone for each packet

# Each zone allows a port of its own: which of them is open tells whose zone it is. The order here is the wrong one.
MEMBERS = f"""
[failsafe]
ports = []

[set.team]
entries = ["10.90.0.0/24", "fd90::/64"]

[zone.links]
interfaces = ["eth+"]
ports      = ["8005/tcp"]
target     = "reject"

[zone.public]
interfaces = ["eth0"]
ports      = ["8004/tcp"]
target     = "reject"

[zone.wide]
sources = ["172.16.0.0/12", "fd00:18::/48", "10.90.0.1", "fd90::1"]
include = ["public"]
ports   = ["8001/tcp"]
target  = "drop"

[zone.near]
sources = ["172.18.10.0/29", "fd00:18::/64"]
include = ["wide"]
ports   = ["8002/tcp"]
target  = "reject"

[zone.pair]
sources = ["10.90.0.8/31", "fd90::8/127"]
target  = "accept"

[zone.team]
sources = ["@team"]
ports   = ["8003/tcp"]
target  = "drop"

[zone.trial]
sources = {both(STRANGER)}
ports   = ["8006/tcp"]
target  = "drop"
enforce = false
"""
STRANGER_2 = Address("203.0.113.8", "2001:db8:c::8")


def test_each_packet_belongs_to_one_zone(guarded: Guarded, family: str) -> None:
    guarded.enforce(MEMBERS)
    guarded.nothing_to_do()
    before = guarded.counted(family)
    ports = range(8001, 8007)
    table: dict[str, tuple[Probe, Verdict]] = {}

    def meets(name: str, probes: dict[int, Probe], opened: set[int], shut: Verdict = OPEN) -> None:
        for port, probe in probes.items():
            table[f"{name}, {port}"] = (probe, OPEN if port in opened else shut)

    def of(source: Address) -> dict[int, Probe]:
        return {port: dial(source, family, NODE, port) for port in ports}

    def from_ns(ns: str) -> dict[int, Probe]:
        return {port: dial_from(ns, family, NODE, port) for port in ports}

    meets("the longest prefix, which includes two more zones", of(CLUSTER_NODE), {8001, 8002, 8004}, REFUSED)
    meets("the shorter prefix, which includes one", of(NEIGHBOUR), {8001, 8004}, TIMEOUT)
    meets("a set before a longer prefix", of(ALLOWED_2), {8003}, TIMEOUT)
    meets("a set before an interface", of(ALLOWED), {8003}, TIMEOUT)
    meets("an interface by its name before a wildcard", of(STRANGER_2), {8004}, REFUSED)
    meets("a wildcard", from_ns("beyond"), {8005}, REFUSED)
    meets("no zone", from_ns("pod1"), set())
    meets("the node itself", from_ns("node"), set())
    meets("a zone that is not enforced", of(STRANGER), set())
    expect(guarded.node, table)
    after = guarded.counted(family)
    assert after["zone/trial"] > before["zone/trial"]


# --- every way in, as it was dialled

WAYS = """
[failsafe]
ports = []

[zone.friends]
sources = {friends}
ports   = ["8080-8088/tcp", "5300/udp", "8888/tcp", "6443/tcp", "31002/tcp"]
target  = "{action}"

[zone.insiders]                  # what they allow is where the rewritten packets go, and nobody dials that
sources = {insiders}
ports   = ["80/tcp", "53/udp", "8081/tcp"]
target  = "{action}"

[zone.pods]
sources = {pods}
ports   = ["80/tcp"]
target  = "{action}"

[zone.public]
interfaces = ["eth0"]
target     = "{action}"
"""


@pytest.mark.parametrize("action", ["drop", "reject"])
def test_every_way_into_the_node_obeys_its_zone_as_dialled(guarded: Guarded, family: str, action: str) -> None:
    guarded.enforce(WAYS.format(action=action, friends=both(ALLOWED), insiders=both(ALLOWED_2), pods=both(POD2)))
    guarded.nothing_to_do()
    node = guarded.node
    ways: dict[str, tuple[Address, int, Protocol]] = {
        "listener": (NODE, 6443, "tcp"),
        "NodePort": (NODE, 31002, "tcp"),
        "hostPort": (NODE, 8088, "tcp"),
        "hostPort, udp": (NODE, 5300, "udp"),
        "published by Docker": (NODE, 8080, "tcp"),
        "load balancer": (LOAD_BALANCER, 8888, "tcp"),
        "load balancer, to the node itself": (LOAD_BALANCER, 6443, "tcp"),
    }
    table: dict[str, tuple[Probe, Verdict]] = {}
    for way, (to, port, protocol) in ways.items():
        for source, wanted in ((ALLOWED, OPEN), (ALLOWED_2, SHUT[action]), (STRANGER, SHUT[action])):
            table[f"{way} from {source.of(family)}"] = (dial(source, family, to, port, protocol), wanted)
        table[f"{way} from a pod"] = (dial_from("pod1", family, to, port, protocol), OPEN)
    table |= {
        "a Service, from a pod of no zone": (dial_from("pod1", family, RELAY_SERVICE, 9000), OPEN),
        "a Service that a pod's zone allows": (dial_from("pod2", family, WEB_SERVICE, 80), OPEN),
        "the API's Service from the node": (dial_from("node", family, KUBERNETES_SERVICE, 443), OPEN),
        "in transit to a pod": (dial(STRANGER, family, POD1, 8080), OPEN),
    }
    expect(node, table)
    # Not necessarily refused: with br_netfilter the kernel sends a pod's reset past nat, from another address.
    shut = dial_from("pod2", family, RELAY_SERVICE, 9000)
    expect(node, {"a Service that it does not": (shut, TIMEOUT)} if action == "drop" else {})
    above = "-t mangle {} PREROUTING -j cali-everything"
    iptables(node, family, "-t mangle -N cali-everything", "-t mangle -A cali-everything -j ACCEPT", above.format("-I"))
    try:
        guarded.nothing_to_do()
        expect(node, table)
    finally:
        iptables(node, family, above.format("-D"), "-t mangle -F cali-everything", "-t mangle -X cali-everything")


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_an_untracked_packet_belongs_to_its_zone(guarded: Guarded, family: str, protocol: Protocol) -> None:
    text = f'[zone.friends]\nsources = {both(ALLOWED)}\nports = ["8101/{protocol}"]\ntarget = "drop"\n'
    guarded.enforce(text + '[zone.public]\ninterfaces = ["eth0"]\ntarget = "drop"\n')
    node = guarded.node
    serve(node, "node", **{protocol: [8101]})  # type: ignore[arg-type]
    notrack(node, port=8101, protocol=protocol)
    expect(
        node,
        {
            "friend": (dial(ALLOWED, family, NODE, 8101, protocol), OPEN),
            "stranger": (dial(STRANGER, family, NODE, 8101, protocol), TIMEOUT),
        },
    )


# --- what IP needs, and tunnels

SHUT_ZONE = """
[failsafe]
ports = []

[zone.tunnels]
sources   = {tunnels}
services  = ["calico-vxlan"]
protocols = ["ipip"]
target    = "drop"

[zone.public]
interfaces = ["eth0"]
target     = "{action}"
"""


def shut_zone(action: str = "drop") -> str:
    return SHUT_ZONE.format(tunnels=both(ALLOWED), action=action)


PASSING = {"ipv4": {3, 8, 11, 12}, "ipv6": {*range(1, 5), *range(128, 138), *range(141, 144), 148, 149}}
"""The contract's list, RFC 4890's."""


@pytest.mark.parametrize("action", ["drop", "reject"])
def test_the_icmp_that_ip_needs_passes_and_no_other(guarded: Guarded, family: str, action: str) -> None:
    guarded.enforce(shut_zone(action))
    kinds = range(1, 41) if family == "ipv4" else (*range(1, 10), *range(100, 102), *range(126, 170), 200)
    protocol = ICMP if family == "ipv4" else ICMPV6
    to = NODE.of(family)
    packets = [
        Packet("client", to, protocol, icmp(kind, body=b"\0" * 4 + bytes([kind]) * 16), source=STRANGER.of(family))
        for kind in kinds
    ]
    seen = exchange(guarded.node, packets, fence=to)
    arrived = {a.content[8] for a in seen.at("node", protocol) if a.content[0] == a.content[8] == a.content[-1]}
    assert arrived == PASSING[family]


def test_multicast_membership_passes_and_other_protocols_do_not(guarded: Guarded, family: str) -> None:
    guarded.enforce(shut_zone())
    to = NODE.of(family)
    packets = [Packet("client", to, protocol, f"{protocol:02x}" * 8) for protocol in (IPIP, GRE)]
    if family == "ipv4":
        packets += [
            Packet("client", group, IGMP, icmp(kind, body=b"\0" * 4), device="eth0")
            for group, kind in (("224.0.0.1", 0x11), (to, 0x16))
        ]
    else:
        packets += [
            Packet("client", "ff02::1", ICMPV6, icmp(kind, body=b"\0" * 20), device="eth0")
            for kind in (130, 131, 132, 143)
        ]
    seen = exchange(guarded.node, packets, fence=to)
    assert not seen.at("node", IPIP)
    assert not seen.at("node", GRE)
    kinds = {a.content[0] for a in seen.at("node", IGMP if family == "ipv4" else ICMPV6)}
    assert kinds >= ({0x11, 0x16} if family == "ipv4" else {130, 131, 132, 143})


def test_a_protocol_that_a_zone_names_passes_and_no_other(guarded: Guarded, family: str) -> None:
    """This kernel has no ipip devices: the packets are made by hand, and judged by what arrives."""
    guarded.enforce(shut_zone())
    packets = [
        Packet("client", NODE.of(family), protocol, f"{number:02x}" * 8, source=source.of(family))
        for number, source in enumerate((STRANGER, ALLOWED))
        for protocol in (IPIP, GRE)
    ]
    seen = exchange(guarded.node, packets, fence=NODE.of(family))
    assert seen.payloads("node", IPIP) == {"01" * 8}
    assert not seen.at("node", GRE)


def test_answers_of_dhcp_pass(guarded: Guarded, family: str) -> None:
    guarded.enforce(shut_zone())
    node = guarded.node
    passing: list[tuple[str, str, int]] = [("10.90.0.254", "255.255.255.255", 68), ("10.90.0.254", NODE.ipv4, 68)]
    others = [("10.90.0.254", "255.255.255.255", 69), ("10.90.0.254", NODE.ipv4, 67)]
    if family == "ipv6":
        server, here = (link_local_address(node, ns) for ns in ("client", "node"))
        passing = [(server, here, 546)]
        others = [(server, here, 547), (STRANGER.ipv6, NODE.ipv6, 546)]
    packets = [
        Packet("client", to, UDP, f"{number:02x}", port, source, device="eth0")
        for number, (source, to, port) in enumerate([*passing, *others])
    ]
    arrived = exchange(node, packets, fence=NODE.of(family)).at("node", UDP)
    assert {arrival.content[8] for arrival in arrived} == set(range(len(passing)))


def link_local_address(node: Node, ns: str) -> str:
    """The link-local address of a namespace on eth0."""
    words = node.run("ip -6 -br address show dev eth0 scope link", ns=ns).stdout.split()
    return next(word for word in words if word.startswith("fe80:")).partition("/")[0]


def test_a_tunnel_works_where_its_zone_allows_it(guarded: Guarded, family: str) -> None:
    guarded.enforce(shut_zone())
    node = guarded.node
    peers = {"friend": (ALLOWED, 4789), "stranger": (STRANGER, 4789), "friend, not flannel's": (ALLOWED, 8472)}
    for number, (peer, port) in enumerate(peers.values(), start=1):
        for ns, here, there, host in (("node", NODE, peer, 1), ("client", peer, NODE, 2)):
            ends = f"local {here.of(family)} remote {there.of(family)} dstport {port}"
            node.run(
                f"ip link add vx{number} type vxlan id {number} {ends} dev eth0 &&"
                f" ip addr add 192.0.2.{number * 4 + host}/30 dev vx{number} && ip link set vx{number} up",
                ns=ns,
            )
    try:
        expect(
            node,
            {
                name: (dial(None, "ipv4", f"192.0.2.{number * 4 + 1}", 10250), OPEN if number == 1 else TIMEOUT)
                for number, name in enumerate(peers, start=1)
            },
        )
    finally:
        for ns in ("node", "client"):
            node.run("for n in 1 2 3; do ip link del vx$n; done", ns=ns)


def test_every_built_in_service_is_taken_by_the_kernel(guarded: Guarded) -> None:
    names = ", ".join(f'"{name}"' for name in BUILT_IN)
    guarded.enforce(f'[zone.public]\ninterfaces = ["eth0"]\nservices = [{names}]\ntarget = "drop"\n')
    guarded.nothing_to_do()
    expect(guarded.node, {"kubelet": (dial(STRANGER, "ipv6", NODE, 10250), OPEN)})
