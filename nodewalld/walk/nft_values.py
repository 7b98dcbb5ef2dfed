"""The values that nf_tables reads of a packet, and how they are compared with what a rule says.

Laws: a value is a range of numbers (a port that is only known to be one of many), a word, or a set of words
(conntrack's states); None if it isn't known, and MISSING where the packet has none: then no rule matches, whatever it
asks.
"""

import ipaddress
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import Any

from nodewalld.core.words import Family
from nodewalld.walk.packet import ICMP, ICMPV6, SCTP, TCP, UDP, State, Tracked
from nodewalld.walk.reading import protocol_number, within
from nodewalld.walk.routes import Kind, Unclear
from nodewalld.walk.world import World, is_multicast


class _Missing(Enum):
    MISSING = "the packet has no such part"


MISSING = _Missing.MISSING
Value = tuple[int, int] | str | frozenset[str] | None | _Missing | tuple["Value", ...]
Read = Callable[[State, World], Value]
Sets = dict[str, Sequence[Any]]

# Linux' numbers of route types (RTN_*), by which ranges of `fib type` are ordered.
_KINDS = {name: n for n, name in enumerate("unspec unicast local broadcast anycast multicast".split())}
_KINDS |= {"blackhole": 6, "unreachable": 7, "prohibit": 8, "throw": 9}
_ICMP_TYPES = {
    "echo-reply": 0,
    "destination-unreachable": 3,
    "source-quench": 4,
    "redirect": 5,
    "echo-request": 8,
    "router-advertisement": 9,
    "router-solicitation": 10,
    "time-exceeded": 11,
    "parameter-problem": 12,
    "timestamp-request": 13,
    "timestamp-reply": 14,
}
_ICMPV6_TYPES = {
    "destination-unreachable": 1,
    "packet-too-big": 2,
    "time-exceeded": 3,
    "parameter-problem": 4,
    "echo-request": 128,
    "echo-reply": 129,
    "mld-listener-query": 130,
    "mld-listener-report": 131,
    "mld-listener-done": 132,
    "mld-listener-reduction": 132,
    "nd-router-solicit": 133,
    "nd-router-advert": 134,
    "nd-neighbor-solicit": 135,
    "nd-neighbor-advert": 136,
    "nd-redirect": 137,
    "router-renumbering": 138,
    "ind-neighbor-solicit": 141,
    "ind-neighbor-advert": 142,
    "mld2-listener-report": 143,
}
_FLAGS = {"fin": 1, "syn": 2, "rst": 4, "psh": 8, "ack": 16, "urg": 32}
_TRANSPORT = {"tcp": TCP, "udp": UDP, "sctp": SCTP, "dccp": 33, "udplite": 136}


def left_side(expression: Any) -> Read | None:
    """How the left side of a comparison is read of a packet; None if that isn't known."""
    if not isinstance(expression, dict) or len(expression) != 1:
        return None
    (kind, content), *_ = expression.items()
    if kind == "meta":
        return _META.get(str(content.get("key")))
    if kind == "ct":
        return _CT.get((str(content.get("key")), str(content.get("dir", ""))))
    if kind == "payload":
        return _payload(content)
    if kind == "fib":
        return _fib(content)
    if kind == "concat":
        parts = [left_side(each) for each in content]
        return None if None in parts else _concatenated([part for part in parts if part])
    if kind == "&":
        return _masked(left_side(content[0]), content[1])
    return None


def _concatenated(parts: Sequence[Read]) -> Read:
    def read(state: State, world: World) -> Value:
        values = tuple(part(state, world) for part in parts)
        return MISSING if MISSING in values else values

    return read


def _masked(read: Read | None, mask: Any) -> Read | None:
    bits = _bits(mask)
    if read is None or bits is None:
        return None

    def masked(state: State, world: World) -> Value:
        value = read(state, world)
        numbers = _range_of(value)
        if numbers is None or numbers[0] != numbers[1]:
            return MISSING if value is MISSING else None
        return numbers[0] & bits, numbers[0] & bits

    return masked


def _bits(mask: Any) -> int | None:
    if isinstance(mask, int):
        return mask
    if isinstance(mask, str):
        return int(mask, 16) if mask.startswith("0x") else _FLAGS.get(mask)
    names = mask.get("|") if isinstance(mask, dict) else mask
    if isinstance(names, list):
        each = [_bits(name) for name in names]
        return None if None in each else sum(bit for bit in each if bit)
    return None


# --- what is read


def _one(number: int | None) -> Value:
    return None if number is None else (number, number)


_META: Mapping[str, Read] = {
    "iifname": lambda state, _world: state.inside,
    "oifname": lambda state, _world: state.outside,
    "iif": lambda state, _world: state.inside,
    "oif": lambda state, _world: state.outside,
    "l4proto": lambda state, _world: _one(state.protocol),
    "nfproto": lambda state, _world: str(state.family),
    "protocol": lambda state, _world: "ip" if state.family is Family.IPV4 else "ip6",
    "mark": lambda state, _world: _one(state.mark),
}


def _ct_state(state: State, _world: World) -> Value:
    return frozenset({(state.tracked or Tracked.INVALID).lower()})


def _flow(read: Read) -> Read:
    """Conntrack's other words are about a flow; a packet without one has none."""
    without = {None, Tracked.UNTRACKED, Tracked.INVALID}
    return lambda state, world: MISSING if state.tracked in without else read(state, world)


def _ct_status(state: State, _world: World) -> Value:
    if state.tracked is not Tracked.NEW:
        return None
    return frozenset(name for name, there in (("dnat", state.dnat), ("snat", state.snat)) if there)


def _origin_address(index: int, family: Family | None) -> Read:
    def read(state: State, _world: World) -> Value:
        if family is not None and state.family is not family:
            return MISSING
        address = state.origin[index]
        return (address, address) if isinstance(address, int) else None

    return _flow(read)


_CT: Mapping[tuple[str, str], Read] = {
    ("state", ""): _ct_state,
    ("status", ""): _flow(_ct_status),
    ("direction", ""): _flow(lambda _state, _world: "original"),
    ("mark", ""): _flow(lambda state, _world: _one(state.connmark)),
    ("proto-src", "original"): _flow(lambda state, _world: state.origin[2]),
    ("proto-dst", "original"): _flow(lambda state, _world: state.origin[3]),
    **{
        (f"{word}{name}", "original"): _origin_address(index, family)
        for word, family in (("", None), ("ip ", Family.IPV4), ("ip6 ", Family.IPV6))
        for index, name in enumerate(("saddr", "daddr"))
    },
}

# Raw offsets of addresses in the network header, in bits.
_RAW = {(96, 32): "ip saddr", (128, 32): "ip daddr", (64, 128): "ip6 saddr", (192, 128): "ip6 daddr"}


def _payload(content: Mapping[str, Any]) -> Read | None:
    protocol, part = str(content.get("protocol", "")), str(content.get("field", ""))
    if content.get("base") == "nh":
        protocol, _, part = _RAW.get((content.get("offset", 0), content.get("len", 0)), "").partition(" ")
    elif content.get("base") == "th":
        protocol, part = "th", {(0, 16): "sport", (16, 16): "dport"}.get((content["offset"], content["len"]), "")
    if protocol in {"ip", "ip6"}:
        family = Family.IPV4 if protocol == "ip" else Family.IPV6
        reads: dict[str, Read] = {
            "saddr": lambda state, _world: _one(state.source),
            "daddr": lambda state, _world: _one(state.destination),
            "protocol": lambda state, _world: _one(state.protocol),
            "nexthdr": lambda state, _world: _one(state.protocol),
        }
        return _of(reads.get(part), lambda state: state.family is family)
    if protocol in {"icmp", "icmpv6"}:
        number = ICMP if protocol == "icmp" else ICMPV6
        index = {"type": 0, "code": 1}.get(part)
        if index is None:
            return None
        return _of(
            lambda state, _world: _one(state.icmp[index] if state.icmp else None),
            lambda state: state.protocol == number,
        )
    if protocol == "th" or protocol in _TRANSPORT:
        reads = {
            "sport": lambda state, _world: state.source_ports,
            "dport": lambda state, _world: state.destination_ports,
            "flags": lambda state, _world: _one(state.flags),
        }
        wanted = _TRANSPORT.get(protocol)
        return _of(reads.get(part), lambda state: state.icmp is None and wanted in {None, state.protocol})
    return None


def _of(read: Read | None, there: Callable[[State], bool]) -> Read | None:
    """A part of a header that only some packets have."""
    if read is None:
        return None
    return lambda state, world: read(state, world) if there(state) else MISSING


def _fib(content: Mapping[str, Any]) -> Read | None:
    """`fib daddr type` and `fib saddr type`, of the node as a whole; `fib saddr oif exists`, or missing."""
    flags = content.get("flags")
    if content.get("result") == "oif" and isinstance(flags, list) and "saddr" in flags:
        return _way_back(frozenset(flags))
    if content.get("result") != "type" or flags not in (["daddr"], ["saddr"]):
        return None

    def read(state: State, world: World) -> Value:
        address = state.destination if flags == ["daddr"] else state.source
        if state.family is Family.IPV6:
            # net/ipv6/netfilter/nft_fib_ipv6.c knows neither broadcast nor multicast.
            kind = None if is_multicast(address, state.family) else world.kind_of(address)
            known = {Kind.LOCAL, Kind.ANYCAST, Kind.BLACKHOLE, Kind.PROHIBIT, Kind.UNREACHABLE}
            return _one(_KINDS[kind if kind in known else "unicast"])
        return _one(_KINDS[world.kind_of(address) or "unicast"])

    return read


def _way_back(flags: frozenset[str]) -> Read | None:
    """Whether there is a way back to the source, with `iif` by the interface that the packet came by (nft_fib)."""
    if flags - {"saddr", "mark", "iif"}:
        return None

    def read(state: State, world: World) -> Value:
        if state.inside == "lo" or state.source == 0:
            return frozenset({str(True)})
        try:
            mark = state.mark if "mark" in flags else 0
            return frozenset({str(world.reverse_path_holds(state, mark=mark, loose="iif" not in flags))})
        except Unclear:
            return None

    return read


# --- comparing


def compare(value: Value, op: str, right: Any, sets: Sets, state: State) -> bool | None:
    """Whether a value stands so to the right side: ==, !=, in, <, >, <=, >=."""
    if value is MISSING:
        return False
    if value is None:
        return None
    numbers = _range_of(value)
    if op == "in" and numbers:
        bits = _bits(right)
        return None if bits is None else bool(numbers[0] & bits)
    if op in {"==", "in"}:
        return _equal(value, right, sets, state)
    if op == "!=":
        answer = _equal(value, right, sets, state)
        return None if answer is None else not answer
    number, ports = _number(right, state), _range_of(value)
    if number is None or ports is None:
        return None
    most = 1 << 128
    ranges = {"<": (0, number - 1), "<=": (0, number), ">": (number + 1, most), ">=": (number, most)}
    return within(ports, *ranges[op]) if op in ranges else None


def _range_of(value: Value) -> tuple[int, int] | None:
    match value:
        case (int() as first, int() as last):
            return first, last
    return None


def _equal(value: Value, right: Any, sets: Sets, state: State) -> bool | None:
    if isinstance(right, str) and right.startswith("@"):
        return _any(_equal(value, _key(each), sets, state) for each in sets.get(right[1:], ()))
    if isinstance(right, dict) and "set" in right:
        members = right["set"] if isinstance(right["set"], list) else [right["set"]]
        return _any(_equal(value, _key(each), sets, state) for each in members)
    if isinstance(right, dict) and "elem" in right:
        return _equal(value, right["elem"]["val"], sets, state)
    if isinstance(value, frozenset):
        wanted = set(right) if isinstance(right, list) else {str(right)}
        return bool(value & wanted)
    if isinstance(value, str):
        text = str(right)
        return value.startswith(text[:-1]) if text.endswith("*") else value == text
    if isinstance(right, dict) and "concat" in right and isinstance(value, tuple):
        parts = [
            None if mine is None else _equal(mine, theirs, sets, state)  # type: ignore[arg-type]
            for mine, theirs in zip(value, right["concat"], strict=False)
        ]
        return False if False in parts else None if None in parts else True
    return _in_range(value, right, state)


def _key(element: Any) -> Any:
    """An element of a set; one with a timeout or a counter is wrapped."""
    return element["elem"]["val"] if isinstance(element, dict) and "elem" in element else element


def _any(answers: Iterable[bool | None]) -> bool | None:
    found = list(answers)
    return True if True in found else None if None in found else False


def _in_range(value: Value, right: Any, state: State) -> bool | None:
    numbers = _range_of(value)
    if numbers is None:
        return None
    if isinstance(right, dict) and "prefix" in right:
        network = ipaddress.ip_network(f"{right['prefix']['addr']}/{right['prefix']['len']}", strict=False)
        first, last = int(network.network_address), int(network.broadcast_address)
    elif isinstance(right, dict) and "range" in right:
        ends = [_number(end, state) for end in right["range"]]
        if ends[0] is None or ends[1] is None:
            return None
        first, last = ends[0], ends[1]
    else:
        number = _number(right, state)
        if number is None:
            return None
        first = last = number
    return within(numbers, first, last)


def _number(right: Any, state: State) -> int | None:
    """A number, an address, a flag, a protocol, an ICMP type or a kind of route, by its name."""
    if isinstance(right, bool) or not isinstance(right, int | str | list):
        return None
    if isinstance(right, int):
        return right
    if isinstance(right, list):
        return _bits(right)
    types = _ICMPV6_TYPES if state.protocol == ICMPV6 else _ICMP_TYPES
    for names in (types, _KINDS, _FLAGS):
        if right in names:
            return names[right]
    try:
        return int(right, 0) if right[:1].isdigit() and "." not in right and ":" not in right else _address(right)
    except ValueError:
        pass
    try:
        return protocol_number(right)
    except KeyError:
        return None


def _address(text: str) -> int:
    return int(ipaddress.ip_address(text))
