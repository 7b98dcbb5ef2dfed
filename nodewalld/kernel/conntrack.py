"""The kernel's connection table: what flows, and to end a flow whose verdict has changed.

Law: a flow is deleted by exactly what was read of it (its original tuple, zone and id), so a new flow between the same
ends is never hit. The table may be large and changes all the time: it is streamed, not held, and never quite a
snapshot.

Sources: include/uapi/linux/netfilter/nfnetlink_conntrack.h; net/netfilter/nf_conntrack_netlink.c
(ctnetlink_del_conntrack: a CTA_ID that differs is ENOENT; the id is a hash of the entry's address and tuples, so only
a flow that came to lie in the very same memory could be taken for the former one).
"""

import errno
from collections.abc import Generator
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from nodewalld.core.words import Family
from nodewalld.kernel.closing import Closing
from nodewalld.kernel.netlink import (
    BODY,
    NFPROTO,
    NLM_F_ACK,
    U16,
    U32,
    NetlinkError,
    NetlinkSocket,
    netfilter_body,
    spans,
)

Address = IPv4Address | IPv6Address

_CTNETLINK = 1 << 8  # NFNL_SUBSYS_CTNETLINK
_GET = _CTNETLINK | 1
_DELETE = _CTNETLINK | 2

_TUPLE_ORIG, _TUPLE_REPLY, _MARK, _ID, _ZONE = 1, 2, 8, 12, 18
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_SOURCE = {Family.IPV4: 1, Family.IPV6: 3}
_DESTINATION = {Family.IPV4: 2, Family.IPV6: 4}
_PROTO_NUM, _PROTO_SRC_PORT, _PROTO_DST_PORT = 1, 2, 3
_IDENTITY = frozenset({_TUPLE_ORIG, _ID, _ZONE})

_GONE = frozenset({errno.ENOENT, errno.EAGAIN})


@dataclass(frozen=True, slots=True)
class Flow:
    """A tracked connection; `protocol` is IP's number, a port is 0 where the protocol has none."""

    family: Family
    protocol: int
    source: Address
    destination: Address
    port: int
    reply_source: Address
    reply_port: int
    """Who answers, and from which port: after a DNAT not what was dialled."""
    mark: int
    identity: bytes = field(repr=False)
    """The attributes that name this flow to the kernel, and no other."""


class Conntrack(Closing):
    """Lists and deletes tracked connections; for one thread."""

    def __init__(self) -> None:
        self._deleter = NetlinkSocket()

    def flows(self, family: Family) -> Generator[Flow, None, None]:
        """All flows of a family, as they are read; deleting some meanwhile is fine."""
        with NetlinkSocket() as reader:  # its own: an iteration may be abandoned halfway
            for answer in reader.stream(_GET, netfilter_body(NFPROTO[family]), f"list flows ({family})"):
                flow = _parse_flow(family, answer)
                if flow is not None:
                    yield flow

    def delete(self, flow: Flow) -> bool:
        """End a flow; False when it had gone already."""
        body = netfilter_body(NFPROTO[flow.family], flow.identity)
        try:
            self._deleter.ask(_DELETE, NLM_F_ACK, body, f"delete the flow {flow.source} to {flow.destination}")
        except NetlinkError as error:
            if error.errno in _GONE:
                return False
            raise
        return True

    def close(self) -> None:
        """Close the socket."""
        self._deleter.close()


def _parse_flow(family: Family, answer: bytes) -> Flow | None:
    found = spans(answer, BODY, len(answer))
    if _TUPLE_ORIG not in found or _TUPLE_REPLY not in found:
        return None
    asked = _parse_tuple(family, answer, *found[_TUPLE_ORIG])
    reply = _parse_tuple(family, answer, *found[_TUPLE_REPLY])
    mark = U32.unpack_from(answer, found[_MARK][0])[0] if _MARK in found else 0
    # Attributes with their headers, padded, as the kernel sent them.
    identity = b"".join(
        answer[start - 4 : end] + bytes(-(end - start) % 4) for kind, (start, end) in found.items() if kind in _IDENTITY
    )
    return Flow(
        family=family,
        protocol=asked.protocol,
        source=asked.source,
        destination=asked.destination,
        port=asked.port,
        reply_source=reply.source,
        reply_port=reply.source_port,
        mark=mark,
        identity=identity,
    )


class _Tuple(NamedTuple):
    protocol: int
    source: Address
    destination: Address
    source_port: int
    port: int


def _parse_tuple(family: Family, answer: bytes, start: int, end: int) -> _Tuple:
    parts = spans(answer, start, end)
    addresses = spans(answer, *parts[_TUPLE_IP])
    protocol = spans(answer, *parts[_TUPLE_PROTO])

    def port(kind: int) -> int:
        return int(U16.unpack_from(answer, protocol[kind][0])[0]) if kind in protocol else 0

    return _Tuple(
        answer[protocol[_PROTO_NUM][0]],
        _address(answer, addresses[_SOURCE[family]]),
        _address(answer, addresses[_DESTINATION[family]]),
        port(_PROTO_SRC_PORT),
        port(_PROTO_DST_PORT),
    )


def _address(answer: bytes, span: tuple[int, int]) -> Address:
    packed = answer[slice(*span)]
    return IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)
