"""Tracing by nf_tables: a table that has packets traced and dies with its socket, and the kernel's events.

Laws: the table has the flag `owner`: the kernel deletes it when the socket is closed, whoever or whatever closes it,
and nobody else can change it meanwhile. So there is nothing that could be left behind. It stands before every other
chain of its hook, passes no verdict, and needs neither iptables nor nft. Kernels before 5.12 don't know the flag and
say so: then a rule of iptables does it (`tracerule`).

Sources: include/uapi/linux/netfilter/nf_tables.h (nft_trace_attributes, NFT_TABLE_F_OWNER); net/netfilter/
nf_tables_trace.c (the headers of a packet come with the first event of each base chain only); nf_tables_api.c,
nf_tables_newtable (for flags that it doesn't know: before 5.12 EINVAL, then EOPNOTSUPP), nft_rcv_nl_event.
"""

import errno
import struct
from collections.abc import Iterator

from nodewalld.core.tracing.header import ICMP, ICMPV6, SCTP, TCP, UDP, Header, parse
from nodewalld.core.tracing.path import Kind, Sighting, Spot
from nodewalld.core.tracing.traffic import RATE, Traffic
from nodewalld.core.words import Backend, Family, Network
from nodewalld.kernel.listening import Listener, interface, messages
from nodewalld.kernel.netlink import (
    BODY,
    HEADER,
    NFPROTO,
    NLM_F_APPEND,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    U32,
    U64,
    NetlinkSocket,
    attribute,
    nested,
    netfilter_body,
    spans,
    string,
    text,
)

_NFT = 10 << 8  # NFNL_SUBSYS_NFTABLES
_NEWTABLE, _GETTABLE, _NEWCHAIN, _NEWRULE, _TRACE = _NFT, _NFT | 1, _NFT | 3, _NFT | 6, _NFT | 17
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_BATCH_BODY = struct.pack(">BBH", 0, 0, 10)
_NFNLGRP_NFTRACE = 9
_INET = 1  # NFPROTO_INET
_TABLE_FLAGS_OWNER = attribute(2, U32.pack(2))

TABLE_PREFIX = "nodewalld-trace-"

_HOOKS = {"PREROUTING": 0, "OUTPUT": 3}
_PRIORITY = -301  # just before raw
_PROTOCOLS = {"tcp": (TCP,), "udp": (UDP,), "sctp": (SCTP,), "icmp": (ICMP, ICMPV6)}
_META_L4PROTO, _META_NFPROTO, _META_IIFNAME, _META_NFTRACE = 16, 15, 6, 12
_NETWORK, _TRANSPORT = 1, 2
_EQ, _LTE, _GTE = 0, 3, 5
_IFNAMSIZ = 16
_ADDRESSES = {Family.IPV4: (12, 16, 4), Family.IPV6: (8, 24, 16)}  # source, destination, length

_TABLE, _CHAIN, _HANDLE, _TYPE, _VERDICT, _ID = 1, 2, 3, 4, 5, 6
_NETWORK_HEADER, _TRANSPORT_HEADER, _IIF, _OIF, _MARK, _NFPROTO, _POLICY = 8, 9, 10, 12, 14, 15, 16
_KINDS = {1: Kind.POLICY, 2: Kind.RETURN, 3: Kind.RULE}
_FAMILIES = {number: family for family, number in NFPROTO.items()}
_TABLES = {1: "inet", 2: "ip", 5: "netdev", 7: "bridge", 10: "ip6"}
_VERDICTS = {0: "drop", 1: "accept", 3: "queue", -1: "continue", -2: "break", -3: "jump", -4: "goto", -5: "return"}
_VERDICT_CODE = struct.Struct(">i")


class NoOwner(Exception):
    """This kernel has no tables that die with their socket (before 5.12)."""


def used() -> bool:
    """Whether nf_tables holds any table here; False on a kernel without it."""
    try:
        with NetlinkSocket() as netlink:
            return bool(netlink.ask(_GETTABLE, NLM_F_DUMP, netfilter_body(0), "list the nf_tables tables"))
    except OSError:
        return False


class TraceTable:
    """Has packets traced for as long as it is open. Raises NoOwner, or NetlinkError when the kernel refuses."""

    def __init__(self, traffic: Traffic) -> None:
        self._netlink = NetlinkSocket()
        self.name = f"{TABLE_PREFIX}{self._netlink.port}"
        try:
            self._netlink.transact([_framed(_BATCH_BEGIN), *self._requests(traffic), _framed(_BATCH_END)], "trace")
        except OSError as error:
            self.close()
            if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):
                raise NoOwner from error
            raise

    def _requests(self, traffic: Traffic) -> Iterator[tuple[int, int, bytes]]:
        name = text(1, self.name)
        yield _NEWTABLE, NLM_F_CREATE | NLM_F_EXCL, netfilter_body(_INET, name, _TABLE_FLAGS_OWNER)
        hook = nested(4, attribute(1, U32.pack(_HOOKS[traffic.hook])), attribute(2, struct.pack(">i", _PRIORITY)))
        chain = text(3, traffic.hook)
        yield _NEWCHAIN, NLM_F_CREATE, netfilter_body(_INET, name, chain, hook, text(7, "filter"))
        for family in traffic.families:
            rule = nested(4, *_expressions(traffic, family))
            yield _NEWRULE, NLM_F_CREATE | NLM_F_APPEND, netfilter_body(_INET, name, text(2, traffic.hook), rule)

    def close(self) -> None:
        """End the trace: the table goes with the socket."""
        self._netlink.close()


def _framed(kind: int) -> tuple[int, int, bytes]:
    return kind, 0, _BATCH_BODY


def _expression(name: str, *data: bytes) -> bytes:
    return nested(1, text(1, name), nested(2, *data))


def _number(kind: int, value: int) -> bytes:
    return attribute(kind, U32.pack(value))


def _compare(value: bytes, operation: int = _EQ) -> bytes:
    return _expression("cmp", _number(1, 1), _number(2, operation), nested(3, attribute(1, value)))


def _meta(key: int) -> bytes:
    return _expression("meta", _number(1, 1), _number(2, key))


def _payload(base: int, offset: int, length: int) -> bytes:
    return _expression("payload", _number(1, 1), _number(2, base), _number(3, offset), _number(4, length))


def _expressions(traffic: Traffic, family: Family) -> Iterator[bytes]:
    yield _meta(_META_NFPROTO)
    yield _compare(bytes([NFPROTO[family]]))
    if traffic.interface:
        yield _meta(_META_IIFNAME)
        name = traffic.interface.encode()
        yield _compare(name[:-1] if name.endswith(b"+") else name.ljust(_IFNAMSIZ, b"\0"))
    yield _meta(_META_L4PROTO)
    protocols = _PROTOCOLS[traffic.protocol]
    yield _compare(bytes([protocols[-1] if family is Family.IPV6 else protocols[0]]))
    yield from _addresses(traffic, family)
    if traffic.ports:
        yield _payload(_TRANSPORT, 2, 2)
        for port, operation in zip(traffic.ports, (_GTE, _LTE), strict=True):
            yield _compare(struct.pack(">H", port), operation)
    yield _expression("limit", attribute(1, U64.pack(RATE)), attribute(2, U64.pack(1)), _number(3, RATE))
    yield _expression("immediate", _number(1, 1), nested(2, attribute(1, b"\1")))
    yield _expression("meta", _number(2, _META_NFTRACE), _number(3, 1))


def _addresses(traffic: Traffic, family: Family) -> Iterator[bytes]:
    at_source, at_destination, length = _ADDRESSES[family]
    ends: tuple[tuple[Network | None, int], ...] = ((traffic.source, at_source), (traffic.destination, at_destination))
    for network, offset in ends:
        if network is not None:
            yield _payload(_NETWORK, offset, length)
            mask, nothing = network.netmask.packed, bytes(length)
            parts = (nested(4, attribute(1, mask)), nested(5, attribute(1, nothing)))
            yield _expression("bitwise", _number(1, 1), _number(2, 1), _number(3, length), *parts)
            yield _compare(network.network_address.packed)


class TraceEvents(Listener):
    """A subscription to what nf_tables tells of traced packets in this network namespace."""

    def __init__(self) -> None:
        super().__init__(1 << (_NFNLGRP_NFTRACE - 1))

    def read(self) -> Iterator[Sighting]:
        """Everything that has been heard since the last read, without waiting. OSError ENOBUFS: some is lost."""
        return self._parsed(_parse)


def _parse(datagram: bytes) -> Iterator[Sighting]:
    for kind, start, end in messages(datagram):
        if kind != _TRACE or start + BODY > len(datagram):
            continue
        found = spans(datagram, start + BODY, end)
        number = {
            key: U32.unpack_from(datagram, found[key][0])[0]
            for key in (_TYPE, _ID, _IIF, _OIF, _MARK, _NFPROTO, _POLICY)
            if key in found
        }
        what, family = _KINDS.get(number.get(_TYPE, 0)), _FAMILIES.get(number.get(_NFPROTO, 0))
        if what is None or family is None or _TABLE not in found or _CHAIN not in found:
            continue
        handle = U64.unpack_from(datagram, found[_HANDLE][0])[0] if _HANDLE in found else 0
        if what is Kind.RULE and not handle:
            what = Kind.RETURN  # the end of a chain; so since 6.5 or so
        tables = _TABLES.get(datagram[start + HEADER.size], "")
        names = string(datagram, *found[_TABLE]), string(datagram, *found[_CHAIN])
        yield Sighting(
            Spot(Backend.NFT, tables, *names, what, handle),
            family,
            _header(datagram, found),
            _VERDICTS.get(number[_POLICY], "") if what is Kind.POLICY else _verdict(datagram, found),
            interface(number.get(_IIF, 0)),
            interface(number.get(_OIF, 0)),
            number.get(_MARK, 0),
            number.get(_ID),
        )


def _verdict(data: bytes, found: dict[int, tuple[int, int]]) -> str:
    code = spans(data, *found[_VERDICT]).get(1) if _VERDICT in found else None
    # NF_QUEUE and NF_DROP carry more in their upper half.
    value = int(_VERDICT_CODE.unpack_from(data, code[0])[0]) if code else -1
    return _VERDICTS.get(value if value < 0 else value & 0xFF, "")


def _header(data: bytes, found: dict[int, tuple[int, int]]) -> Header | None:
    if _NETWORK_HEADER not in found:
        return None
    network = data[slice(*found[_NETWORK_HEADER])]
    transport = data[slice(*found[_TRANSPORT_HEADER])] if _TRANSPORT_HEADER in found else b""
    return parse(network, transport)
