"""What nf_tables tells of its transactions: that one has ended and who wrote it, and which tables of ours it touched.

Laws: a flood costs nothing. Both subscriptions let the kernel throw away what they need not hear, so a sync of a
hundred thousand foreign rules is one datagram here. And nothing is ever missed silently: what the filter does not
understand it lets through, and what is lost counts as "anything may have changed".

Sources: net/netfilter/nf_tables_api.c: nf_tables_commit (rules and chains are told first, several messages to a
datagram, then nf_tables_gen_notify: NEWGEN in a datagram of its own), nf_tables_fill_rule_info (a rule begins with its
table and its chain); net/netlink/af_netlink.c: netlink_overrun, for what a full socket means; net/core/filter.c for the
filter: a load beyond the end of the datagram would throw it away.
"""

import errno
import socket
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

from nodewalld.core.words import Family
from nodewalld.kernel.netlink import (
    BODY,
    HEADER,
    NETLINK_NETFILTER,
    NFGENMSG,
    NFPROTO,
    U32,
    NetlinkError,
    spans,
    string,
)
from nodewalld.kernel.socketfilter import DELRULE, NEWGEN, NEWRULE, pass_nothing, pass_touching, pass_transaction_ends

_NFNLGRP_NFTABLES = 7
_GEN_ID, _GEN_PROC_PID, _GEN_PROC_NAME = 1, 2, 3
_TABLE, _CHAIN = 1, 2  # of a rule; the first is the table in every message
_RULES = frozenset({NEWRULE, DELRULE})
_FAMILIES = {number: family for family, number in NFPROTO.items()}

_SO_RCVBUFFORCE = 33
_MANY = 4 << 20  # bytes of receive buffer
_FEW = 1 << 16  # likewise; more than some datagrams of a flood tell no more than that there was one
_READ_LIMIT = 1024  # datagrams per read(); more than that and the caller is woken again


@dataclass(frozen=True, slots=True)
class GenerationEvent:
    """One transaction that changed the ruleset.

    `pid` is the writer's *thread* as the initial pid namespace counts, `comm` its name (15 characters at
    most); `port_id` and `sequence` are those of the writer's socket and request: our own commits are known by
    them.
    """

    generation: int
    pid: int
    comm: str
    port_id: int
    sequence: int


@dataclass(frozen=True, slots=True)
class Heard:
    """What a read found; after an `overflow` events are missing, so everything must be looked at."""

    events: tuple[GenerationEvent, ...]
    overflow: bool = False


class _Subscription:
    """A socket that hears of nf_tables what its filter lets through."""

    def __init__(self, room: int, only: Callable[[socket.socket], None]) -> None:
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self._socket = socket.socket(socket.AF_NETLINK, kind, NETLINK_NETFILTER)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, room)
        except PermissionError:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        # The filter goes in before the subscription: no unwanted datagram is ever queued.
        only(self._socket)
        self._socket.bind((0, 1 << (_NFNLGRP_NFTABLES - 1)))

    def fileno(self) -> int:
        """The descriptor to wait on for reading."""
        return self._socket.fileno()

    def _datagrams(self) -> Iterator[bytes | None]:
        """What waits in the socket; None for what was lost. Of an endless flood only the beginning."""
        for _ in range(_READ_LIMIT):
            try:
                yield self._socket.recv(65536)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise NetlinkError(error.errno or errno.EIO, "read nf_tables events") from error
                yield None

    def close(self) -> None:
        """End the subscription."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class GenerationEvents(_Subscription):
    """A subscription to the end of each nf_tables transaction in this network namespace."""

    def __init__(self) -> None:
        super().__init__(_MANY, pass_transaction_ends)

    def read(self) -> Heard:
        """Everything that has been heard since the last read, without waiting."""
        heard = list(self._datagrams())
        return Heard(tuple(_parse_event(datagram) for datagram in heard if datagram), None in heard)


@dataclass(frozen=True, slots=True)
class Touch:
    """What a transaction touched: rules of a chain, or ("") anything else in a table that concerns us.

    `port_id` is the writer's, as in the transaction's end.
    """

    family: Family
    table: str
    chain: str
    port_id: int


class ChainEvents(_Subscription):
    """A subscription to what may touch certain chains; hears nothing until it is told of some.

    What it tells is complete once the transaction's end (GenerationEvents) has been heard.
    """

    def __init__(self) -> None:
        super().__init__(_FEW, pass_nothing)
        self._chains: Mapping[tuple[Family, str], Collection[str]] = {}
        self._unsure = True

    def attend(self, chains: Mapping[tuple[Family, str], Collection[str]]) -> None:
        """Hear from now on of these chains of these families and tables. The next `read` says that it can't tell."""
        before, self._chains, self._unsure = self._chains, chains, True
        if not chains:
            pass_nothing(self._socket)
        elif chains != before:
            families = {NFPROTO[family] for family, _ in chains}
            names = {name for some in chains.values() for name in some}
            pass_touching(self._socket, families, {table for _, table in chains}, names)

    def read(self) -> frozenset[Touch] | None:
        """What has been touched since the last read; None when it may have been anything."""
        heard = list(self._datagrams())
        unsure, self._unsure = self._unsure or None in heard, len(heard) == _READ_LIMIT
        if unsure or self._unsure:
            return None
        return frozenset(touch for datagram in heard if datagram for touch in self._touches(datagram))

    def _touches(self, datagram: bytes) -> Iterator[Touch]:
        for kind, port_id, start, end in _messages(datagram):
            family = _FAMILIES.get(datagram[start - NFGENMSG.size])
            found = spans(datagram, start, end)
            if family is None or _TABLE not in found or kind & 0xFF == NEWGEN:
                continue
            table = string(datagram, *found[_TABLE])
            rule = kind & 0xFF in _RULES and _CHAIN in found
            chain = string(datagram, *found[_CHAIN]) if rule else ""
            chains = self._chains.get((family, table))
            if chains is not None and (not rule or chain in chains):
                yield Touch(family, table, chain, port_id)


def _messages(datagram: bytes) -> Iterator[tuple[int, int, int, int]]:
    """The messages of a datagram: type, port id of the writer, where the attributes begin and end."""
    offset = 0
    while offset + BODY <= len(datagram):
        length, kind, _, _, port_id = HEADER.unpack_from(datagram, offset)
        yield kind, port_id, offset + BODY, offset + length
        offset += max((length + 3) & ~3, HEADER.size)


def _parse_event(datagram: bytes) -> GenerationEvent:
    _, _, _, sequence, port_id = HEADER.unpack_from(datagram, 0)
    found = spans(datagram, BODY, len(datagram))
    return GenerationEvent(
        generation=_number(datagram, found, _GEN_ID),
        pid=_number(datagram, found, _GEN_PROC_PID),
        comm=string(datagram, *found[_GEN_PROC_NAME]) if _GEN_PROC_NAME in found else "",
        port_id=port_id,
        sequence=sequence,
    )


def _number(data: bytes, found: dict[int, tuple[int, int]], kind: int) -> int:
    return int(U32.unpack_from(data, found[kind][0])[0]) if kind in found else 0
