"""The rules, sets and maps of the shield as the kernel takes them over netlink.

Law: pure bytes; nothing is sent here. Each condition is written as nft(8) writes it, so that `nft list table` reads it.
Numbers in registers are big-endian where packets hold them so, in the host's order where the kernel computes them.

Sources: include/uapi/linux/netfilter/nf_tables.h; net/netfilter/nft_{cmp,payload,meta,ct,fib,lookup,range,limit,log}.c;
for userdata libnftnl's include/udata.h.
"""

import struct
from collections.abc import Iterable, Iterator

from nodewalld.core.config import PortRange
from nodewalld.core.shield.rules import (
    LOG_BURST,
    LOG_RATE,
    Among,
    Answered,
    Dispatch,
    Flow,
    IcmpType,
    Link,
    Log,
    Loopback,
    Marked,
    Match,
    OfFamily,
    Port,
    Ports,
    Protocol,
    Rule,
    Side,
    Verdict,
    Within,
    Word,
)
from nodewalld.core.words import Family
from nodewalld.kernel.netlink import NFPROTO, U32, U64, attribute, nested, text

_ELEMENT = 1  # NFTA_LIST_ELEM
_VERDICT_REGISTER, _REGISTER = 0, 1  # NFT_REG_VERDICT, NFT_REG_1 of 16 bytes
_EQUAL, _UNEQUAL = 0, 1
_VERDICTS = {Word.DROP: 0, Word.RETURN: -5 & 0xFFFFFFFF, Word.JUMP: -3 & 0xFFFFFFFF, Word.GOTO: -4 & 0xFFFFFFFF}

_META_MARK, _META_IIF, _META_IIFNAME, _META_OIFNAME, _META_NFPROTO, _META_L4PROTO = 3, 4, 6, 7, 15, 16
_CT_STATE, _CT_DIRECTION, _CT_STATUS, _CT_PROTO_DST, _CT_DST_IP, _CT_DST_IP6 = 0, 1, 2, 12, 20, 22
_ORIGINAL, _REPLY = 0, 1
_NETWORK_HEADER, _TRANSPORT_HEADER = 1, 2
_NAME_SIZE = 16  # IFNAMSIZ
_LOOPBACK = 1  # LOOPBACK_IFINDEX, in every network namespace
_STATUS_DNAT = 1 << 5  # IPS_DST_NAT
_STATE_RELATED = 1 << 2  # NF_CT_STATE_BIT(IP_CT_RELATED)
_RTN_LOCAL, _RTN_MULTICAST = 2, 5  # local, broadcast, anycast, multicast: rtnetlink.h
_FIB_TYPE, _FIB_DESTINATION = 3, 2
_ADDRESS_AT = {
    (4, Side.SOURCE): 12,
    (4, Side.DESTINATION): 16,
    (6, Side.SOURCE): 8,
    (6, Side.DESTINATION): 24,
}
_HOST = struct.Struct("=I")
_COMMENT = 0  # NFTNL_UDATA_RULE_COMMENT
_COMMENT_MAX = 127


def expressions(rule: Rule) -> bytes:
    """The payload of NFTA_RULE_EXPRESSIONS for a rule."""
    parts = [part for match in rule.matches for part in _match(match)]
    parts += [_expression("counter")] if rule.counted else []
    parts += _then(rule.then)
    return b"".join(parts)


def comment(words: str) -> bytes:
    """The userdata of a rule that holds a comment, which is cut where nft(8) would take no more."""
    content = words.encode()[:_COMMENT_MAX] + b"\0"
    return bytes((_COMMENT, len(content))) + content


def commented(userdata: bytes) -> str:
    """The comment in a rule's userdata; "" when there is none."""
    if len(userdata) < 2 or userdata[0] != _COMMENT:
        return ""
    return userdata[2 : 2 + userdata[1]].rstrip(b"\0").decode(errors="replace")


def address_element(family: Family, number: int, *, end: bool) -> bytes:
    """One border of an interval of addresses; `end` is the first address behind it."""
    key = number.to_bytes(4 if family is Family.IPV4 else 16, "big")
    return _set_element(key, end=end)


def port_elements(ports: PortRange, verdict: Verdict, *, ranges: bool) -> Iterator[bytes]:
    """The borders of a range of ports in a map; the port itself in one without ranges."""
    yield _set_element(struct.pack(">H", ports.first), nested(2, _verdict(verdict)))
    if ranges and ports.last < 0xFFFF:
        yield _set_element(struct.pack(">H", ports.last + 1), end=True)


def _set_element(key: bytes, data: bytes = b"", *, end: bool = False) -> bytes:
    return nested(_ELEMENT, nested(1, attribute(1, key)), data, attribute(3, U32.pack(1)) if end else b"")


def _expression(name: str, *parts: bytes) -> bytes:
    return nested(_ELEMENT, text(1, name), nested(2, *parts))


def _number(kind: int, value: int) -> bytes:
    return attribute(kind, U32.pack(value))


def _compare(data: bytes, how: int = _EQUAL) -> bytes:
    return _expression("cmp", _number(1, _REGISTER), _number(2, how), nested(3, attribute(1, data)))


def _between(first: bytes, last: bytes) -> bytes:
    borders = (nested(3, attribute(1, first)), nested(4, attribute(1, last)))
    return _expression("range", _number(1, _REGISTER), _number(2, _EQUAL), *borders)


def _bits(mask: bytes) -> bytes:
    masked = (nested(4, attribute(1, mask)), nested(5, attribute(1, bytes(len(mask)))))
    return _expression("bitwise", _number(1, _REGISTER), _number(2, _REGISTER), _number(3, len(mask)), *masked)


def _meta(key: int) -> bytes:
    return _expression("meta", _number(1, _REGISTER), _number(2, key))


def _ct(key: int, direction: int | None = None) -> bytes:
    which = attribute(3, bytes((direction,))) if direction is not None else b""
    return _expression("ct", _number(1, _REGISTER), _number(2, key), which)


def _payload(base: int, offset: int, length: int) -> bytes:
    return _expression("payload", *(_number(n, v) for n, v in enumerate((_REGISTER, base, offset, length), 1)))


def _match(match: Match) -> tuple[bytes, ...]:
    match match:
        case OfFamily(family):
            return _meta(_META_NFPROTO), _compare(bytes((NFPROTO[family],)))
        case Protocol(number):
            return _meta(_META_L4PROTO), _compare(bytes((number,)))
        case Ports(which, ports):
            first, last = (struct.pack(">H", port) for port in (ports.first, ports.last))
            return _port(which), _compare(first) if first == last else _between(first, last)
        case Within():
            return _within(match)
        case Among(side, family, name):
            return _address(side, family.version), _expression("lookup", text(1, name), _number(2, _REGISTER))
        case Answered(groups):
            wanted = _RTN_LOCAL, _RTN_MULTICAST if groups else _RTN_LOCAL
            fib = _expression("fib", _number(1, _REGISTER), _number(2, _FIB_TYPE), _number(3, _FIB_DESTINATION))
            # In the host's order; below 256 the bytes sort as the numbers do in either.
            first, last = map(_HOST.pack, wanted)
            return fib, _between(first, last) if groups else _compare(first)
        case Link(name, outgoing):
            start = name.removesuffix("+").encode()
            wanted_name = start if name.endswith("+") else start.ljust(_NAME_SIZE, b"\0")
            return _meta(_META_OIFNAME if outgoing else _META_IIFNAME), _compare(wanted_name)
        case Loopback():
            return _meta(_META_IIF), _compare(_HOST.pack(_LOOPBACK))
        case Marked(bit):
            return _meta(_META_MARK), _bits(_HOST.pack(bit)), _compare(_HOST.pack(bit))
        case IcmpType(number):
            return _payload(_TRANSPORT_HEADER, 0, 1), _compare(bytes((number,)))
        case Flow.REPLY:
            return _ct(_CT_DIRECTION), _compare(bytes((_REPLY,)))
        case Flow.RELATED:
            return _ct(_CT_STATE), _bits(_HOST.pack(_STATE_RELATED)), _compare(bytes(4), _UNEQUAL)
        case Flow.DNAT:
            return _ct(_CT_STATUS), _bits(_HOST.pack(_STATUS_DNAT)), _compare(bytes(4), _UNEQUAL)


def _port(which: Port) -> bytes:
    return _ct(_CT_PROTO_DST, _ORIGINAL) if which is Port.ORIGIN else _payload(_TRANSPORT_HEADER, 2, 2)


def _address(side: Side, version: int) -> bytes:
    if side is Side.ORIGIN:
        return _ct(_CT_DST_IP if version == 4 else _CT_DST_IP6, _ORIGINAL)
    return _payload(_NETWORK_HEADER, _ADDRESS_AT[version, side], 4 if version == 4 else 16)


def _within(match: Within) -> tuple[bytes, ...]:
    network = match.network
    address, mask = network.network_address.packed, network.netmask.packed
    whole = network.prefixlen == network.max_prefixlen
    return (_address(match.side, network.version), *(() if whole else (_bits(mask),)), _compare(address))


def _then(then: Verdict | Dispatch | Log) -> list[bytes]:
    match then:
        case Dispatch(which, name):
            look = _expression("lookup", text(1, name), _number(2, _REGISTER), _number(3, _VERDICT_REGISTER))
            return [_port(which), look]
        case Log(prefix):
            pace = (attribute(1, U64.pack(LOG_RATE)), attribute(2, U64.pack(1)), _number(3, LOG_BURST), _number(4, 0))
            return [_expression("limit", *pace), _expression("log", text(2, prefix))]
        case Verdict():
            return [
                _expression("immediate", _number(1, _VERDICT_REGISTER), nested(2, nested(2, *_verdict_parts(then))))
            ]


def _verdict_parts(verdict: Verdict) -> Iterable[bytes]:
    yield _number(1, _VERDICTS[verdict.word])
    if verdict.chain:
        yield text(2, verdict.chain)


def _verdict(verdict: Verdict) -> bytes:
    return nested(2, *_verdict_parts(verdict))
