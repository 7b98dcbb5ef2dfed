"""What both renderers of decisions must agree on, so that they let the same packets through."""

import ipaddress
from collections.abc import Iterator, Sequence

from nodewalld.core.decide import Decisions, Source, ZoneDecision, prefix_length
from nodewalld.core.words import Family, Network

ICMP = (3, 11, 12, 8)
"""What of ICMP always passes a zone: destination unreachable, time exceeded, parameter problem, echo request (RFC 792).
"""

ICMPV6 = (*range(1, 5), *range(128, 138), 141, 142, 143, 148, 149)
"""Errors, multicast listener discovery, neighbour and router discovery, their inverse and secure forms (RFC 4890)."""

_LINK_LOCAL = ipaddress.ip_network("fe80::/10")


def own_networks(decisions: Decisions) -> tuple[Network, ...]:
    """The addresses of this node that a client can have dialled before a DNAT."""
    if decisions.family is Family.IPV4:
        return tuple(map(ipaddress.ip_network, decisions.addresses))
    # Link-local ones come and go with every pod's veth, and are never anybody else's.
    others = (ipaddress.ip_network(a) for a in decisions.addresses if not a.lower().startswith("fe80:"))
    return (_LINK_LOCAL, *others)


def zone_members(zones: Sequence[ZoneDecision]) -> Iterator[tuple[ZoneDecision, Source | str]]:
    """What makes a packet a zone's, the closest fit first: sources, then interfaces by their names."""
    sources = [(source, zone) for zone in zones for source in zone.sources]
    for source, zone in sorted(sources, key=lambda pair: -prefix_length(pair[0])):
        yield zone, source
    interfaces = [(name, zone) for zone in zones for name in zone.interfaces]
    for name, zone in sorted(interfaces, key=lambda pair: (pair[0].endswith("+"), -len(pair[0]))):
        yield zone, name
