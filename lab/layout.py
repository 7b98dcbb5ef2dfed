"""Who is where around a node: names of namespaces, addresses of the parties, and the commands that lay them out.

    stranger, allowed, cluster nodes, pods of other nodes (namespace "client")
          | eth0 (or ens18 ...)
        node  -- eth1 -- "beyond": a host that is reached through the node
          | cni0, 10.42.0.1
    "pod1", "pod2"

The addresses are those of the captured kube-proxy and Felix rulesets, so that these work as they are.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

FamilyName = Literal["ipv4", "ipv6"]
FAMILIES: tuple[FamilyName, ...] = ("ipv4", "ipv6")
NAMESPACES = ("node", "client", "pod1", "pod2", "beyond")


class Address(NamedTuple):
    """One party's addresses in both families."""

    ipv4: str
    ipv6: str

    def of(self, family: str) -> str:
        """The address of that family ("ipv4" or "ipv6")."""
        return self.ipv4 if family == "ipv4" else self.ipv6


# The node itself; CLUSTER_ADDRESS is its second address, in the network of seed 002.
NODE = Address("10.90.0.1", "fd90::1")
CLUSTER_ADDRESS = Address("172.18.10.1", "fd00:18::1")
PODS_GATEWAY = Address("10.42.0.1", "fd42::1")
BEYOND_GATEWAY = Address("198.51.100.1", "2001:db8:b::1")
LOOPBACK = Address("127.0.0.1", "::1")
# Groups that the node answers without having them as an address. IPv4 has no anycast of its own: broadcast.
MULTICAST = Address("224.0.0.1", "ff02::1")
BROADCAST_OR_ANYCAST = Address("10.90.0.255", "fd90::")
# Sources, all in namespace "client".
STRANGER = Address("203.0.113.7", "2001:db8:c::7")
STRANGER_2 = Address("203.0.113.8", "2001:db8:c::8")
ALLOWED = Address("10.90.0.7", "fd90::7")
ALLOWED_2 = Address("10.90.0.8", "fd90::8")
CLUSTER_NODE = Address("172.18.10.2", "fd00:18::2")
CLUSTER_NODE_2 = Address("172.18.10.3", "fd00:18::3")
NEIGHBOUR = Address("172.18.10.9", "fd00:18:0:9::9")
REMOTE_POD = Address("10.42.1.2", "fd42:0:0:1::2")
# The others.
POD1 = Address("10.42.0.2", "fd42::2")
POD2 = Address("10.42.0.3", "fd42::3")
BEYOND = Address("198.51.100.2", "2001:db8:b::2")
# What the captured kube-proxy serves: default/kubernetes :443, shop/web :80, shop/relay :9000.
KUBERNETES_SERVICE = Address("10.43.0.1", "fd43::1")
WEB_SERVICE = Address("10.43.0.2", "fd43::2")
RELAY_SERVICE = Address("10.43.0.3", "fd43::3")

_ROUTER = Address("10.90.0.254", "fd90::fe")  # the node's default gateway, played by "client"


def addresses(device: str, *given: str) -> list[str]:
    """The lines for `ip -batch` that give a link these addresses, with prefix lengths, at once usable."""
    return [
        f"addr add {address} dev {device}" + (" nodad" if ":" in address else " brd +" * ("/24" in address))
        for address in given
    ]


def network(uplink: str, second: str, pod_links: Sequence[str]) -> dict[str, str]:
    """The `ip -batch` input of every namespace; see `Node` for the names of the links."""
    bridged = not pod_links
    links = tuple(pod_links) or ("vethpod1", "vethpod2")
    node = [f"netns add {name}" for name in NAMESPACES[1:]]
    node += ["link set lo up"]
    peers = ((uplink, "client"), (second, "beyond"), (links[0], "pod1"), (links[1], "pod2"))
    # A veth whose two ends have the same number is taken for a real card, whose carrier the kernel reports up
    # to a second late (linkwatch_urgent_event); the far ends are all number 2.
    node += [
        f"link add {link} index {number} type veth peer name eth0 netns {name}"
        for number, (link, name) in enumerate(peers, start=10)
    ]
    if bridged:
        node += ["link add cni0 type bridge mcast_snooping 0"]
        node += [f"link set {link} master cni0" for link in links]
        node += [f"link set {link} type bridge_slave hairpin on" for link in links]
        node += [*addresses("cni0", f"{PODS_GATEWAY.ipv4}/24", f"{PODS_GATEWAY.ipv6}/64"), "link set cni0 up"]
    else:
        for link in links:
            node += addresses(link, f"{PODS_GATEWAY.ipv4}/32", f"{PODS_GATEWAY.ipv6}/128")
    node += addresses(uplink, f"{NODE.ipv4}/24", f"{NODE.ipv6}/64")
    node += addresses(uplink, f"{CLUSTER_ADDRESS.ipv4}/24", f"{CLUSTER_ADDRESS.ipv6}/64")
    node += addresses(second, f"{BEYOND_GATEWAY.ipv4}/24", f"{BEYOND_GATEWAY.ipv6}/64")
    node += [f"link set {link} up" for link, _ in peers]
    if not bridged:
        for link, pod in zip(links, (POD1, POD2), strict=True):
            node += [f"route add {pod.ipv4} dev {link}", f"route add {pod.ipv6} dev {link}"]
    node += [f"route add default via {_ROUTER.of(family)} dev {uplink}" for family in FAMILIES]
    network = {"node": node}

    client = addresses("eth0", f"{_ROUTER.ipv4}/24", f"{_ROUTER.ipv6}/64")
    for party in (ALLOWED, ALLOWED_2, CLUSTER_NODE, CLUSTER_NODE_2):
        client += addresses("eth0", f"{party.ipv4}/24", f"{party.ipv6}/64")
    client += addresses("eth0", f"{NEIGHBOUR.ipv4}/24", f"{NEIGHBOUR.ipv6}/128")
    for party in (STRANGER, STRANGER_2, REMOTE_POD):
        client += addresses("eth0", f"{party.ipv4}/32", f"{party.ipv6}/128")
    client += ["link set lo up", "link set eth0 up"]
    client += [f"route add default via {NODE.of(family)} src {STRANGER.of(family)}" for family in FAMILIES]
    network["client"] = client

    for name, host, gateway in (
        ("pod1", POD1, PODS_GATEWAY),
        ("pod2", POD2, PODS_GATEWAY),
        ("beyond", BEYOND, BEYOND_GATEWAY),
    ):
        one = name != "beyond" and not bridged
        lines = addresses("eth0", host.ipv4 + ("/32" if one else "/24"), host.ipv6 + ("/128" if one else "/64"))
        lines += ["link set lo up", "link set eth0 up"]
        lines += [f"route add default via {gateway.of(family)} dev eth0 onlink" for family in FAMILIES]
        network[name] = lines
    return {name: "\n".join(lines) + "\n" for name, lines in network.items()}
