"""What nf_tables tells of its transactions: that one has ended and who wrote it, and which tables of ours it touched.

Laws: a flood costs nothing. Both subscriptions let the kernel throw away what they need not hear, so a sync of a
hundred thousand foreign rules is one datagram here. And nothing is ever missed silently: what the filter does not
understand it lets through, and what is lost counts as "anything may have changed".

Sources: net/netfilter/nf_tables_api.c: nf_tables_commit (rules and chains are told first, several messages to a
datagram, then nf_tables_gen_notify: NEWGEN in a datagram of its own), nf_tables_fill_rule_info (a rule begins with its
table and its chain); net/netlink/af_netlink.c: netlink_overrun, for what a full socket means; net/core/filter.c for the
filter: a load beyond the end of the datagram would throw it away.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from nodewalld.core.words import Family
from nodewalld.kernel.listening import READ_LIMIT, Listener, messages
from nodewalld.kernel.netlink import (
    BODY,
    HEADER,
    NFPROTO,
    U32,
    spans,
    string,
)
from nodewalld.kernel.socketfilter import DELRULE, NEWGEN, NEWRULE, pass_nothing, pass_touching, pass_transaction_ends

_GROUP = 1 << (7 - 1)  # NFNLGRP_NFTABLES
_GEN_ID, _GEN_PROC_PID, _GEN_PROC_NAME = 1, 2, 3
_TABLE, _CHAIN = 1, 2  # of a rule; the first is the table in every message
_RULES = frozenset({NEWRULE, DELRULE})
_FAMILIES = {number: family for family, number in NFPROTO.items()}

_FEW = 1 << 16  # bytes of receive buffer: more than some datagrams of a flood tell no more than that there was one


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


class GenerationEvents(Listener):
    """A subscription to the end of each nf_tables transaction in this network namespace."""

    def __init__(self) -> None:
        super().__init__(_GROUP, only=pass_transaction_ends)

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


class ChainEvents(Listener):
    """A subscription to what may touch certain chains; hears nothing until it is told of some.

    What it tells is complete once the transaction's end (GenerationEvents) has been heard.
    """

    def __init__(self) -> None:
        super().__init__(_GROUP, _FEW, pass_nothing)
        self._chains: Mapping[tuple[Family, str], Collection[str]] = {}
        self._unsure = True

    def attend(self, chains: Mapping[tuple[Family, str], Collection[str]]) -> None:
        """Hear from now on of these chains of these families and tables. The next `read` says that it can't tell.

        Raises OSError where the kernel has no room for the filter; then it hears what it heard before.
        """
        self._unsure = True
        if not chains:
            pass_nothing(self._socket)
        elif chains != self._chains:
            families = {NFPROTO[family] for family, _ in chains}
            names = {name for some in chains.values() for name in some}
            pass_touching(self._socket, families, {table for _, table in chains}, names)
        self._chains = chains

    def read(self) -> frozenset[Touch] | None:
        """What has been touched since the last read; None when it may have been anything."""
        heard = list(self._datagrams())
        unsure, self._unsure = self._unsure or None in heard, len(heard) == READ_LIMIT
        if unsure or self._unsure:
            return None
        return frozenset(touch for datagram in heard if datagram for touch in self._touches(datagram))

    def _touches(self, datagram: bytes) -> Iterator[Touch]:
        for kind, start, end in messages(datagram):
            *_, port_id = HEADER.unpack_from(datagram, start)
            family = _FAMILIES.get(datagram[start + HEADER.size])
            found = spans(datagram, start + BODY, end)
            if family is None or _TABLE not in found or kind & 0xFF == NEWGEN:
                continue
            table = string(datagram, *found[_TABLE])
            rule = kind & 0xFF in _RULES and _CHAIN in found
            chain = string(datagram, *found[_CHAIN]) if rule else ""
            chains = self._chains.get((family, table))
            if chains is not None and (not rule or chain in chains):
                yield Touch(family, table, chain, port_id)


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
