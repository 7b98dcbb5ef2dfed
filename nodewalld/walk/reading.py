"""How addresses, masks and ranges are written in rules, as numbers."""

import ipaddress
from collections.abc import Callable

from nodewalld.core.words import Family
from nodewalld.walk.packet import ICMPV6, PROTOCOLS, Ports, State
from nodewalld.walk.world import World

_PROTOCOL_NAMES = PROTOCOLS | {
    "ipv6-icmp": ICMPV6,
    "icmp6": ICMPV6,
    "igmp": 2,
    "ipencap": 4,
    "ipip": 4,
    "dccp": 33,
    "ipv6": 41,
    "gre": 47,
    "esp": 50,
    "ipsec-esp": 50,
    "ah": 51,
    "ipsec-ah": 51,
    "ospf": 89,
    "pim": 103,
    "vrrp": 112,
    "udplite": 136,
    "mh": 135,
    "ipv6-mh": 135,
}
Judge = Callable[[State, World], bool | None]
"""Whether something holds for a packet; None when that can't be decided."""


def address(text: str, family: Family) -> int:
    """An address as a number. Raises ValueError."""
    kind = ipaddress.IPv4Address if family is Family.IPV4 else ipaddress.IPv6Address
    return int(kind(text))


def network(text: str, family: Family) -> tuple[int, int]:
    """Address and mask; the mask may be a length or an address, and need not be contiguous. Raises ValueError."""
    host, slash, suffix = text.partition("/")
    bits = 32 if family is Family.IPV4 else 128
    full = (1 << bits) - 1
    if not slash:
        mask = full
    elif suffix.isdigit():
        mask = full >> (bits - int(suffix)) << (bits - int(suffix))
    else:
        mask = address(suffix, family)
    return address(host, family) & mask, mask


def address_range(text: str, family: Family) -> tuple[int, int]:
    """FIRST-LAST, or one address. Raises ValueError."""
    first, _, last = text.partition("-")
    return address(first, family), address(last or first, family)


def masked(text: str) -> tuple[int, int]:
    """VALUE/MASK of a mark; without a mask, all of it. Raises ValueError."""
    value, slash, mask = text.partition("/")
    return int(value, 0), int(mask, 0) if slash else 0xFFFFFFFF


def port_range(text: str) -> Ports:
    """FIRST:LAST, of which either may be left out, or one port. Raises ValueError."""
    first, colon, last = text.partition(":")
    return int(first or 0), int(last or 65535) if colon else int(first)


def within(ports: Ports, first: int, last: int) -> bool | None:
    """Whether a port is in a range; None when it may be."""
    if first <= ports[0] and ports[1] <= last:
        return True
    return False if ports[1] < first or last < ports[0] else None


def protocol_number(name: str) -> int:
    """A protocol by its name or number; 0 for all. Raises KeyError for a name that isn't known."""
    if name.isdigit():
        return int(name)
    return 0 if name == "all" else _PROTOCOL_NAMES[name]
