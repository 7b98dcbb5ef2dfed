"""nf_tables over raw netlink: who changed the ruleset, and what stands in one chain.

Law: reading is exact and cheap, and asks for one chain at a time; a whole ruleset is never read here. Every
foreign transaction is one event, whatever its size. A digest tells whether a rule *says* the same as before:
what packets change in it (counters, used-up quotas, times) never counts.

Sources: include/uapi/linux/netfilter/nf_tables.h and nfnetlink.h for the messages;
net/netfilter/nf_tables_api.c (nf_tables_gen_notify: NEWGEN is sent alone, after the transaction) for the
events; net/netfilter/nft_counter.c, nft_quota.c and nft_last.c for the state that a dump shows; nft_compat.c
for the matches and targets of iptables, whose private part is zeroed in a dump (kernels since 4.11).
"""

import errno
import struct
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from select import select
from typing import TypeVar

from nodewalld.core.ruletext import TAG_PREFIX
from nodewalld.core.words import Family
from nodewalld.kernel.closing import Closing
from nodewalld.kernel.netlink import (
    ATTRIBUTE,
    BODY,
    NFGENMSG,
    NFPROTO,
    NLM_F_DUMP,
    NLM_F_REQUEST,
    U32,
    U64,
    NetlinkError,
    NetlinkSocket,
    attributes,
    message,
    netfilter_body,
    spans,
    string,
    text,
)
from nodewalld.kernel.nftbatch import Form, form, rules_of
from nodewalld.kernel.nftevents import ChainEvents, GenerationEvents

__all__ = ["ChainRule", "NetlinkError", "NftablesReader", "written_digest"]

_NFT = 10 << 8  # NFNL_SUBSYS_NFTABLES
_GETCHAIN = _NFT | 4
_GETRULE = _NFT | 7
_GETGEN = _NFT | 16

_GEN_ID = 1
_ANY_FAMILY = netfilter_body(0)
_CHAIN_TABLE, _CHAIN_NAME = 1, 3
_RULE_TABLE, _RULE_CHAIN, _RULE_HANDLE, _RULE_EXPRESSIONS = 1, 2, 3, 4
_RULE_WORDS = frozenset({5, 7})  # NFTA_RULE_COMPAT, NFTA_RULE_USERDATA (the comment)
_EXPRESSION_NAME, _EXPRESSION_DATA = 1, 2
_COUNTER_VALUES = (2, 1)  # NFTA_COUNTER_PACKETS, NFTA_COUNTER_BYTES
_IMMEDIATE_DATA, _DATA_VERDICT, _VERDICT_CODE, _VERDICT_CHAIN = 2, 2, 1, 2
_JUMPS = frozenset({0xFFFFFFFD, 0xFFFFFFFC})  # NFT_JUMP -3, NFT_GOTO -4

_TAG = TAG_PREFIX.encode()  # in the comment match's data, or in the userdata, as the tool's version has it

# What asks a set: an expression of nf_tables, or a match or target of x_tables (nft_compat.c: the name comes first).
_SETS = (b"lookup\0", struct.pack("=HH", 8, 1) + b"set\0", struct.pack("=HH", 8, 1) + b"SET\0")

_QUOTA_FLAGS, _QUOTA_CONSUMED = 2, 4
_QUOTA_DEPLETED = 2  # set by the kernel in a dump once the quota is used up

_ATTEMPTS = 20  # reads of a ruleset that does not stand still
_SETTLE_LIMIT = 1.0  # seconds to wait for the end of a transaction that counts already
_EMPTY_BATCH = b"".join(message(kind, NLM_F_REQUEST, 0, struct.pack(">BBH", 0, 0, 10)) for kind in (0x10, 0x11))

T = TypeVar("T")

_Where = tuple[Family, str, str]  # with the names of a table and a chain


@dataclass(frozen=True, slots=True)
class ChainRule:
    """A rule as its chain holds it.

    `handle` is its identity: a rule written again, with the same words, has another. `digest` is of what it
    says (expressions, comment): it moves when a rule is replaced in place, not when packets pass. A rule with
    a set says which by a number that may be another set's tomorrow, so two rules may share a digest at different times:
    `looks_up` marks these. `tagged`: our tag stands somewhere in it.
    """

    handle: int
    digest: bytes
    jump: str | None
    tagged: bool
    looks_up: bool


class NftablesReader(Closing):
    """Reads chains through one socket, kept open, and listens on others; for one thread.

    A chain that concerns us is read again only when a transaction has touched it.
    """

    def __init__(self) -> None:
        self._netlink = NetlinkSocket()
        self._settled: int | None = None
        self._seen: dict[_Where, tuple[ChainRule, ...] | None] = {}  # as in the settled generation
        self._attended: frozenset[_Where] = frozenset()
        self._names: dict[tuple[Family, str], dict[str, tuple[str, ...]]] = {}  # likewise
        self._parsed: dict[_Where, dict[bytes, ChainRule]] = {}

    @cached_property
    def _events(self) -> GenerationEvents:
        return GenerationEvents()

    @cached_property
    def _touches(self) -> ChainEvents:
        return ChainEvents()

    def attend(self, chains: Mapping[tuple[Family, str], Collection[str]]) -> None:
        """Say which chains concern us; what was read before is read anew."""
        self._seen.clear()
        self._attended = frozenset((*where, name) for where, names in chains.items() for name in names)
        try:
            self._touches.attend(chains)
        except OSError:  # no room for a filter in this kernel: then each transaction may have touched them
            self._attended = frozenset()

    def generation(self) -> int:
        """The number of the last transaction; equal numbers mean an unchanged ruleset."""
        ((_, answer),) = self._netlink.ask(_GETGEN, 0, _ANY_FAMILY, "read the nf_tables generation")
        return int(U32.unpack_from(answer, spans(answer, BODY, len(answer))[_GEN_ID][0])[0])

    def rules(self, family: Family, table: str, chain: str) -> tuple[ChainRule, ...] | None:
        """The rules of a chain from the top, or None when there is no such chain (or table)."""
        return self.look(family, table, (chain,))[chain]

    def look(self, family: Family, table: str, chains: Iterable[str]) -> dict[str, tuple[ChainRule, ...] | None]:
        """The rules of chains of one table, all of one generation. A generation is read but once."""
        keys = [(family, table, name) for name in chains]
        if self._seen.keys() >= set(keys) and self.generation() == self._settled:
            return {key[2]: self._seen[key] for key in keys}

        def read() -> dict[str, tuple[ChainRule, ...] | None]:
            for key in keys:
                if key not in self._seen:
                    self._seen[key] = self._read(key)
            return {key[2]: self._seen[key] for key in keys}

        return self._steadily(read, f"read {', '.join(key[2] for key in keys)} of {table} ({family})")

    def glance(self, family: Family, table: str, chains: Iterable[str]) -> dict[str, tuple[ChainRule, ...] | None]:
        """As `look`, waiting for nobody: while others write, a rule that stands may be missing, or there twice."""
        return {name: self._read((family, table, name)) for name in chains}

    def follow(self, family: Family, table: str, chain: str) -> tuple[ChainRule, ...] | None:
        """A chain at once, as `glance`, if its table was not made anew since it was read: there a handle is a rule."""
        key = family, table, chain
        known = {rule.handle: rule for rule in self._parsed.get(key, {}).values()}
        shown = [answer[BODY:] for answer in self._dump(key) or ()]
        where = len(rules_of(*key)) - NFGENMSG.size
        return tuple([known.get(_handle(content, where)) or _parse_rule(content) for content in shown]) or None

    def _read(self, key: _Where) -> tuple[ChainRule, ...] | None:
        """A chain; what the kernel shows as it did last time, counters and all, isn't parsed again."""
        answers = self._dump(key)
        before = self._parsed.pop(key, {})
        if answers is None:
            return None
        shown = [answer[BODY:] for answer in answers]
        self._parsed[key] = parsed = {content: before.get(content) or _parse_rule(content) for content in shown}
        return tuple([parsed[content] for content in shown])

    def forms(self, family: Family, table: str, chain: str) -> dict[int, Form]:
        """The forms, by their handles, of the rules that can be written again without iptables."""
        key = (family, table, chain)
        answers = self._steadily(lambda: self._dump(key), f"read {chain} of {table} ({family})")
        return {_parse_rule(answer[BODY:]).handle: known for answer in answers or () if (known := form(answer[BODY:]))}

    def _dump(self, key: _Where) -> list[bytes] | None:
        family, table, chain = key
        answers = self._netlink.ask(_GETRULE, NLM_F_DUMP, rules_of(*key), f"read chain {chain} of {table} ({family})")
        if not answers and not self.chain_exists(family, table, chain):
            return None
        return [answer for _, answer in answers]

    def tallies(self, family: Family, table: str, chain: str) -> tuple[tuple[int, int], ...]:
        """What each rule of a chain has seen, from its top: packets and bytes; nothing where there is no such chain."""
        body = rules_of(family, table, chain)
        answers = self._netlink.ask(_GETRULE, NLM_F_DUMP, body, f"count in chain {chain} of {table} ({family})")
        return tuple(_tally(answer) for _, answer in answers)

    def mentions(self, family: Family, table: str, words: bytes) -> bool:
        """Whether these bytes stand in a rule of a table, in a comment for example, or stood a moment ago."""
        body = netfilter_body(NFPROTO[family], text(_RULE_TABLE, table))
        return bool(self._netlink.ask(_GETRULE, NLM_F_DUMP, body, f"search table {table} ({family})", words))

    def chain_exists(self, family: Family, table: str, chain: str) -> bool:
        """Whether the table has a chain of this name."""
        body = netfilter_body(NFPROTO[family], text(_CHAIN_TABLE, table), text(_CHAIN_NAME, chain))
        try:
            self._netlink.ask(_GETCHAIN, 0, body, f"look for chain {chain} of {table} ({family})")
        except NetlinkError as error:
            if error.errno == errno.ENOENT:
                return False
            raise
        return True

    def chains(self, family: Family, table: str, prefix: str = "") -> tuple[str, ...]:
        """The names of a table's chains that begin so; the kernel lists the whole family, so not for every wake-up.

        With a prefix, a generation is read but once.
        """
        return self._steadily(lambda: self._chains(family, prefix), f"list the chains ({family})").get(table, ())

    def _chains(self, family: Family, prefix: str) -> dict[str, tuple[str, ...]]:
        """The names by tables."""
        names = self._names.get((family, prefix))
        if names is not None:
            return names
        names = {}
        what = f"list the chains ({family})"
        answers = self._netlink.ask(_GETCHAIN, NLM_F_DUMP, netfilter_body(NFPROTO[family]), what, prefix.encode())
        for _, answer in answers:
            found = spans(answer, BODY, len(answer))
            table, name = (string(answer, *found[kind]) for kind in (_CHAIN_TABLE, _CHAIN_NAME))
            if name.startswith(prefix):
                names[table] = (*names.get(table, ()), name)
        if prefix:
            self._names[family, prefix] = names
        return names

    def _steadily(self, read: Callable[[], T], what: str) -> T:
        """Read something while the ruleset stands still.

        NLM_F_DUMP_INTR tells only of a transaction *between* two datagrams of a dump. One that ends while the kernel
        fills the last one (of a small chain: the only one) is not told, and shows, say, a rule that moves upwards
        neither at its old place nor at its new one. The generation before and after tells.
        """
        for _ in range(_ATTEMPTS):
            before = self.generation()
            if before != self._settled:
                self._settle(before)
                self._names.clear()
                self._forget()
            found = read()
            if self.generation() == before:
                return found
        raise NetlinkError(errno.EINTR, f"{what} (the ruleset changed during each of {_ATTEMPTS} reads)")

    def _settle(self, generation: int) -> None:
        """Wait for the end of the transaction that made this generation.

        It counts the generation first and takes its deleted rules out of their chains afterwards. A dump meanwhile,
        which finds its place again by counting, silently loses rules. NEWGEN is sent at the very end.
        """
        for _ in range(_ATTEMPTS):
            heard = self._events.read()
            if heard.events and (heard.events[-1].generation - generation) & 0xFFFFFFFF < 1 << 31:
                generation = heard.events[-1].generation  # it, or a later one (numbers of 32 bits): not heard again
                break
            if heard.overflow or self._settled is None or not select([self._events], [], [], _SETTLE_LIMIT)[0]:
                # Nothing will be heard of it any more: an empty transaction waits until no other is under way.
                self._netlink.send(_EMPTY_BATCH)
                break
        self._settled = generation

    def _forget(self) -> None:
        """Forget what may have been touched by the transactions that have ended by now.

        That a transaction touched something is told after it was done, so what is read from now on is not older.
        """
        touches = self._touches.read()
        if touches is None:
            self._seen.clear()
            return
        touched = {(touch.family, touch.table, touch.chain) for touch in touches}
        for key in list(self._seen):
            if key not in self._attended or key in touched or (*key[:2], "") in touched:
                del self._seen[key]

    def close(self) -> None:
        """Close the sockets."""
        self._netlink.close()
        for name in ("_events", "_touches"):
            if name in self.__dict__:
                self.__dict__[name].close()


def written_digest(known: Form) -> bytes:
    """The digest that a rule will have once it is written so."""
    return _parse_rule(known).digest


def _parse_rule(shown: bytes) -> ChainRule:
    """A rule from its attributes."""
    content = bytearray(shown)
    digest = blake2b(digest_size=16)
    handle, jump = 0, None
    for kind, start, end in attributes(shown, 0, len(shown)):
        if kind == _RULE_HANDLE:
            (handle,) = U64.unpack_from(shown, start)
        elif kind == _RULE_EXPRESSIONS:
            jump = _mask_expressions(content, start, end)
            digest.update(content[start:end])
        elif kind in _RULE_WORDS:
            digest.update(content[start - 4 : end])
    return ChainRule(handle, digest.digest(), jump, _TAG in shown, any(each in shown for each in _SETS))


def _handle(shown: bytes, start: int) -> int:
    """The handle of a rule, which is found from there on: its table and its chain stand before it."""
    for kind, first, _ in attributes(shown, start, len(shown)):
        if kind == _RULE_HANDLE:
            return int(U64.unpack_from(shown, first)[0])
    return 0


def _tally(answer: bytes) -> tuple[int, int]:
    """Packets and bytes of the rule's counter; iptables gives each rule one."""
    first, last = spans(answer, BODY, len(answer))[_RULE_EXPRESSIONS]
    for _, start, end in attributes(answer, first, last):
        parts = spans(answer, start, end)
        if string(answer, *parts[_EXPRESSION_NAME]) == "counter":
            counter = spans(answer, *parts[_EXPRESSION_DATA])
            packets, octets = (U64.unpack_from(answer, counter[kind][0])[0] for kind in _COUNTER_VALUES)
            return packets, octets
    return 0, 0


def _mask_expressions(content: bytearray, start: int, end: int) -> str | None:
    """Blank what packets change in a rule's expressions; return the chain that the rule jumps to.

    Unrolled, being most of what a look costs: a list element holds a name and then, behind it, the data.
    """
    jump = None
    unpack = ATTRIBUTE.unpack_from
    while start + 8 <= end:
        (length, _), (name_length, _) = unpack(content, start), unpack(content, start + 4)
        name = content[start + 8 : start + 3 + name_length]
        data, last = start + 8 + ((name_length + 3) & ~3), start + length
        if name == b"immediate":
            jump = _jump(content, data, last) or jump
        elif name == b"counter" or name == b"last":  # noqa: PLR1714 -- a bytearray can't be looked up in a set
            content[data:last] = bytes(last - data)
        elif name == b"quota":
            _mask_quota(content, data, last)
        start += max((length + 3) & ~3, 8)
    return jump


def _mask_quota(content: bytearray, start: int, end: int) -> None:
    for kind, first, last in attributes(content, start, end):
        if kind == _QUOTA_CONSUMED:
            content[first:last] = bytes(last - first)
        elif kind == _QUOTA_FLAGS:
            (flags,) = U32.unpack_from(content, first)
            U32.pack_into(content, first, flags & ~_QUOTA_DEPLETED)


def _jump(content: bytearray, start: int, end: int) -> str | None:
    data = spans(content, start, end).get(_IMMEDIATE_DATA)
    verdict = spans(content, *data).get(_DATA_VERDICT) if data else None
    if verdict is None:
        return None
    parts = spans(content, *verdict)
    code = parts.get(_VERDICT_CODE)
    if code is None or _VERDICT_CHAIN not in parts or U32.unpack_from(content, code[0])[0] not in _JUMPS:
        return None
    return string(content, *parts[_VERDICT_CHAIN])
