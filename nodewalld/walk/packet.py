"""The packet that is walked: what a user describes, and what it is at one point of its way.

Law: values only. A port is a range, since a client's own port is known only to be one of many; None means "not known".
Addresses are plain numbers, as a mask is two operations then; `spell` writes them for people.
"""

import ipaddress
from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import StrEnum

from nodewalld.core.words import Family

Ports = tuple[int, int]
"""First and last; the same twice for one port."""

ICMP, TCP, UDP, ICMPV6, SCTP = 1, 6, 17, 58, 132
PROTOCOLS = {"icmp": ICMP, "tcp": TCP, "udp": UDP, "icmpv6": ICMPV6, "sctp": SCTP}
WITH_PORTS = frozenset({TCP, UDP, 33, SCTP, 136})
"""The protocols whose header begins with two ports: TCP, UDP, DCCP, SCTP, UDP-Lite."""

EPHEMERAL: Ports = (32768, 60999)
"""The kernel's default of net.ipv4.ip_local_port_range: whence clients call."""

FIN, SYN, RST, PSH, ACK, URG = (1 << bit for bit in range(6))

# What conntrack takes for the beginning of something: net/netfilter/nf_conntrack_proto_icmp.c (valid_new) and
# nf_conntrack_proto_icmpv6.c (valid_new, noct_valid_new: discovery is never tracked).
_ICMP_NEW = frozenset({8, 13, 15, 17})
_ICMPV6_NEW = frozenset({128, 139})
_ICMPV6_UNTRACKED = frozenset({130, 131, 132, 133, 134, 135, 136, 143})
_DISCOVERY = range(133, 138)  # sent, and taken, only with 255 hops left (RFC 4861)


class Tracked(StrEnum):
    """What conntrack thinks of a packet, in the words of `--ctstate`."""

    NEW = "NEW"
    ESTABLISHED = "ESTABLISHED"
    RELATED = "RELATED"
    INVALID = "INVALID"
    UNTRACKED = "UNTRACKED"


@dataclass(frozen=True, slots=True)
class Packet:
    """A packet as somebody describes it.

    `protocol` is the number in the IP header. `inside` is the interface by which it comes, `outside` one that a socket
    is bound to; with `from_node` a program of this node sends it, and then `source` 0 lets the kernel choose. The mark
    is what it bears at its start. `icmp` is type and code.
    """

    family: Family
    protocol: int
    source: int
    destination: int
    source_ports: Ports = EPHEMERAL
    destination_ports: Ports = (0, 0)
    icmp: tuple[int, int] | None = None
    inside: str = ""
    outside: str = ""
    from_node: bool = False
    mark: int = 0
    tracked: Tracked = Tracked.NEW

    @property
    def has_ports(self) -> bool:
        """Whether its protocol has ports."""
        return self.protocol in WITH_PORTS

    def seen_by_conntrack(self) -> Tracked:
        """The state that conntrack gives it: of some ICMP nothing can begin, and discovery is not tracked at all."""
        if self.tracked is not Tracked.NEW or self.icmp is None:
            return self.tracked
        kind = self.icmp[0]
        if self.protocol == ICMPV6 and kind in _ICMPV6_UNTRACKED:
            return Tracked.UNTRACKED
        begins = _ICMPV6_NEW if self.protocol == ICMPV6 else _ICMP_NEW
        return Tracked.NEW if kind in begins else Tracked.INVALID


Dialled = tuple[int, int, Ports, Ports]
"""Source and destination, address and ports, as conntrack keeps them of a flow's first packet."""


@dataclass(frozen=True, slots=True)
class State:
    """The packet at one point of its way.

    `tracked` None: conntrack has not seen it yet. `origin` is what was dialled. `assumed` holds what was supposed of
    conditions that can't be decided, so that the same one isn't supposed otherwise later on.
    """

    family: Family
    protocol: int
    source: int
    destination: int
    source_ports: Ports
    destination_ports: Ports
    icmp: tuple[int, int] | None
    flags: int | None
    hops: int | None
    inside: str
    outside: str
    from_node: bool
    mark: int | None
    connmark: int | None
    tracked: Tracked | None
    origin: Dialled
    dnat: bool = False
    snat: bool = False
    bound_destination: bool = False
    bound_source: bool = False
    assumed: frozenset[tuple[Hashable, bool]] = field(default_factory=frozenset)

    @property
    def flow(self) -> Dialled:
        """Addresses and ports as they are now."""
        return (self.source, self.destination, self.source_ports, self.destination_ports)


def begin(packet: Packet) -> State:
    """The packet where it enters."""
    # To conntrack an ICMP message has its type and code for a destination port, and its id for a source port.
    ports: tuple[Ports, Ports] = (packet.source_ports, packet.destination_ports)
    if packet.icmp is not None:
        ports = (0, 65535), (packet.icmp[0] << 8 | packet.icmp[1],) * 2
    established = packet.tracked is not Tracked.NEW
    discovery = packet.protocol == ICMPV6 and packet.icmp is not None and packet.icmp[0] in _DISCOVERY
    return State(
        family=packet.family,
        protocol=packet.protocol,
        source=packet.source,
        destination=packet.destination,
        source_ports=packet.source_ports if packet.has_ports else (0, 0),
        destination_ports=packet.destination_ports if packet.has_ports else (0, 0),
        icmp=packet.icmp,
        flags=(ACK if established else SYN) if packet.protocol == TCP else None,
        hops=255 if discovery else None,
        inside=packet.inside,
        outside=packet.outside,
        from_node=packet.from_node,
        mark=packet.mark,
        connmark=None if established else 0,
        tracked=None,
        origin=(packet.source, packet.destination, *ports),
    )


def spell(address: int, family: Family) -> str:
    """An address as people write it."""
    kind = ipaddress.IPv4Address if family is Family.IPV4 else ipaddress.IPv6Address
    return str(kind(address))


def spell_ports(ports: Ports) -> str:
    """A port, or the range that it is in."""
    return str(ports[0]) if ports[0] == ports[1] else f"{ports[0]}-{ports[1]}"


def endpoint(address: int, ports: Ports, family: Family, *, with_ports: bool = True) -> str:
    """Address and port; a client's own port, which is any, is left out."""
    text = spell(address, family)
    if not with_ports or ports == EPHEMERAL:
        return text
    return f"[{text}]:{spell_ports(ports)}" if family is Family.IPV6 else f"{text}:{spell_ports(ports)}"
