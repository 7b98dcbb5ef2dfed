"""The table `inet nodewalld` in the kernel: written in one transaction, owned where the kernel knows that, read back.

Laws: rules, maps and sets change together or not at all. What bears our table's name is ours; nothing else is touched.

The flags owner and persist (6.9) keep `nft flush ruleset` and everybody but this socket from the table, and the table
from dying with the socket: another socket of ours takes it over by naming the same flags. Owner alone (5.12) would die
with the daemon, so there, and before, the table is plain, and must be looked at after each foreign transaction.

Sources: net/netfilter/nf_tables_api.c (nf_tables_updtable, nft_table_lookup, nft_flush, nft_rcv_nl_event). Raw netlink,
because the owner is a socket that must stay open, and Debian 12's libnftables (1.0.6) does not know `persist`.
"""

import errno
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from nodewalld.core.shield.rules import TABLE, AddressSet, Base, Hook, Shield, Spans, Stage
from nodewalld.kernel.netlink import (
    BODY,
    NLM_F_DUMP,
    U32,
    U64,
    NetlinkError,
    NetlinkSocket,
    attributes,
    netfilter_body,
    spans,
    string,
    text,
)
from nodewalld.kernel.nftexpr import commented
from nodewalld.kernel.shieldbatch import (
    ABOUT,
    DESC_SIZE,
    HOOKS,
    INET,
    NFT,
    SET_DESC,
    Content,
    Request,
    adopt,
    refill,
    rewrite,
)
from nodewalld.kernel.shieldbatch import remove as taking_out

OWNED = 0x2 | 0x4
"""NFT_TABLE_F_OWNER and NFT_TABLE_F_PERSIST."""

PLAIN = 0

_ORPHAN = 0x4  # the kernel takes the owner's flag away when the owner is gone
_ADOPTED = {OWNED: {OWNED, _ORPHAN}, PLAIN: {PLAIN}}  # with other flags it can only be made anew
_GETTABLE, _GETCHAIN, _GETRULE, _GETSET, _GETSETELEM, _GETGEN = (NFT | kind for kind in (1, 4, 7, 10, 13, 16))
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_BATCH_BODY = struct.pack(">BBH", 0, 0, 10)
_INTERVAL, _MAP = 0x4, 0x8
_ACCEPT = 1
_FOREIGN = Base(Hook.PREROUTING, Stage.LAST)  # stands for what is none of ours; we have no such chain
_LARGEST = 64 << 20  # bytes of a batch: two sets of 65,536 entries are 10 MB
_ATTEMPTS = 5
_RACED = frozenset({errno.ENOENT, errno.EEXIST, errno.EBUSY, errno.EINTR})
_UNKNOWN_FLAGS = frozenset({errno.EOPNOTSUPP, errno.EINVAL})

_RULE_CHAIN, _RULE_HANDLE, _RULE_EXPRESSIONS, _RULE_USERDATA = 2, 3, 4, 7
_EXPRESSION_NAME, _EXPRESSION_DATA = 1, 2
_COUNTER_OCTETS, _COUNTER_PACKETS = 1, 2


@dataclass(frozen=True, slots=True)
class Held:
    """The head of the table. `owner`: the port id of the socket that holds it, 0 for none."""

    handle: int
    flags: int
    owner: int


@dataclass(frozen=True, slots=True)
class Tally:
    """One rule as it stands, and what it has seen: None where it does not count."""

    chain: str
    entry: str
    packets: int | None
    octets: int | None


def stamp(shield: Shield) -> str:
    """What the rules of a shield come to, in short; the content of its sets doesn't count."""
    return blake2b("\n".join(shield.lines()).encode(), digest_size=10).hexdigest()


class ShieldTable:
    """Writes and reads the table through one socket, which owns it and is kept open; for one thread.

    `flags` are the best that this kernel is known to take.
    """

    def __init__(self, flags: int = OWNED) -> None:
        self.flags = flags
        self._netlink = NetlinkSocket(largest=_LARGEST)
        self._known: dict[str, Spans] = {}

    @property
    def port(self) -> int:
        """The port id by which events know this writer."""
        return self._netlink.port

    def close(self) -> None:
        """Let go: an owned table stays, and nobody but another nodewalld takes it."""
        self._netlink.close()

    # Reading

    def held(self) -> Held | None:
        """The head of the table; None when there is none. Raises NetlinkError, also where there are no nf_tables."""
        answers = self._ask(_GETTABLE, 0, f"look for table inet {TABLE}", text(1, TABLE))
        if not answers:
            return None
        found = spans(answers[0], BODY, len(answers[0]))
        (handle,) = U64.unpack_from(answers[0], found[4][0])
        flags, owner = (int(U32.unpack_from(answers[0], found[kind][0])[0]) if kind in found else 0 for kind in (2, 7))
        return Held(int(handle), flags, owner)

    def is_mine(self, held: Held | None) -> bool:
        """Whether the table's head is as this writer leaves it."""
        return held is not None and held.flags == self.flags and held.owner == (self.port if self.flags else 0)

    def may_adopt(self, held: Held) -> bool:
        """Whether a table is such as this writer leaves behind, and nobody's."""
        return held.flags in _ADOPTED[self.flags] - {OWNED}

    def generation(self) -> int:
        """The number of the last nf_tables transaction of anybody."""
        (answer,) = self._ask(_GETGEN, 0, "read the nf_tables generation")
        return int(U32.unpack_from(answer, spans(answer, BODY, len(answer))[1][0])[0])

    def tallies(self) -> tuple[Tally, ...]:
        """The rules of the table chain by chain, in their order; nothing when there is no table."""
        return tuple(_tally(answer) for answer in self._rules())

    def fingerprint(self) -> bytes:
        """Moves when a chain, a rule or a map does, not when packets pass; sets of addresses are not looked into."""
        digest = blake2b(digest_size=16)
        content = self._content()
        digest.update(
            repr((sorted(content.chains.items()), sorted(content.sets.items()), sorted(content.maps))).encode()
        )
        for answer in self._rules():
            found = spans(answer, BODY, len(answer))
            # Rules are never changed in place: a handle stands for one rule for good.
            digest.update(answer[slice(*found[_RULE_CHAIN])] + answer[slice(*found[_RULE_HANDLE])])
        for name in sorted(content.maps):
            what = f"read the map {name} of the shield"
            for answer in self._ask(_GETSETELEM, NLM_F_DUMP, what, text(1, TABLE), text(2, name)):
                digest.update(answer[BODY:])
        return digest.digest()

    def about(self) -> str:
        """The stamp of what the table was written from; "" when nothing tells."""
        return next((tally.entry for tally in self.tallies() if tally.chain == ABOUT), "")

    def elements(self, entry: AddressSet) -> Spans | None:
        """What a set holds; None when there is no such set."""
        what = f"read the set {entry.name} of the shield"
        answers = self._ask(_GETSETELEM, NLM_F_DUMP, what, text(1, TABLE), text(2, entry.name))
        # Once each: a table of hashes that grows meanwhile shows some twice.
        borders = sorted({border for answer in answers for border in _borders(answer)})
        if not borders and entry.name not in self._content().sets:
            return None
        top = (1 << (32 if entry.family.version == 4 else 128)) - 1
        starts = [number for number, end in borders if not end]
        if not entry.ranges:
            return tuple((number, number) for number in starts)
        ends = [number - 1 for number, end in borders if end]
        return tuple(zip(starts, ends if len(ends) == len(starts) else [*ends, top], strict=True))

    def holds_rules(self, shield: Shield) -> bool:
        """Whether each chain has the rules of a shield, by their number and their entries."""
        wanted = {chain.name: [rule.entry for rule in chain.rules] for chain in shield.chains if chain.rules}
        standing: dict[str, list[str]] = {}
        for tally in self.tallies():
            standing.setdefault(tally.chain, []).append(tally.entry)
        standing.pop(ABOUT, None)
        return wanted == standing

    def holds_sets(self, shield: Shield) -> bool:
        """Whether each set has its content."""
        return all(self.elements(each) == each.spans() for each in shield.sets)

    def _rules(self) -> list[bytes]:
        return self._ask(_GETRULE, NLM_F_DUMP, "read the rules of the shield", text(1, TABLE))

    def _content(self) -> Content:
        content = Content()
        for answer in self._ask(_GETCHAIN, NLM_F_DUMP, "list the chains of the shield"):
            found = spans(answer, BODY, len(answer))
            if string(answer, *found[1]) == TABLE:
                content.chains[string(answer, *found[3])] = _base(answer, found)
        for answer in self._ask(_GETSET, NLM_F_DUMP, "list the sets of the shield", text(1, TABLE)):
            found = spans(answer, BODY, len(answer))
            flags = int(U32.unpack_from(answer, found[3][0])[0]) if 3 in found else 0
            if flags & _MAP:
                content.maps.add(string(answer, *found[2]))
            else:
                content.sets[string(answer, *found[2])] = bool(flags & _INTERVAL), _size(answer, found)
        return content

    def _ask(self, kind: int, flags: int, what: str, *parts: bytes) -> list[bytes]:
        """The answers; none where something that was named isn't there."""
        try:
            return [answer for _, answer in self._netlink.ask(kind, flags, netfilter_body(INET, *parts), what)]
        except NetlinkError as error:
            if error.errno == errno.ENOENT:
                return []
            raise

    # Writing

    def take_over(self) -> None:
        """Own a table that a dead owner has left, as it is. Raises NetlinkError."""
        held = self.held()
        if held is not None and held.flags != self.flags:
            self._commit([adopt(self.flags)])

    def write(self, shield: Shield, about: str) -> None:
        """Make the table this one, in one transaction. Raises NetlinkError; nothing has changed then."""
        for attempt in range(_ATTEMPTS):
            held = self.held()
            afresh = attempt > 1 or (held is not None and held.flags not in _ADOPTED[self.flags])
            try:
                self._write(shield, about, held, afresh=afresh)
            except NetlinkError as error:
                self._known.clear()
                if self.flags and error.errno in _UNKNOWN_FLAGS:
                    self.flags = PLAIN
                elif error.errno not in _RACED or attempt + 1 == _ATTEMPTS:
                    raise
            else:
                return

    def _write(self, shield: Shield, about: str, held: Held | None, *, afresh: bool) -> None:
        requests: list[Request] = []
        content = Content()
        if held is not None and afresh:
            requests += [adopt(held.flags), taking_out()]
        elif held is not None:
            self.take_over()  # by itself: no base chain can be made in a transaction that changes the table's flags
            content = self._content()
        wanted = {each.name: each.spans() for each in shield.sets}
        known = {each.name: self._standing(each) for each in shield.sets if each.name in content.sets}
        requests += [adopt(self.flags), *rewrite(shield, about, content, wanted, known)]
        self._commit(requests)
        self._known = wanted

    def _standing(self, entry: AddressSet) -> Spans:
        return self._known[entry.name] if entry.name in self._known else self.elements(entry) or ()

    def refill(self, sets: Iterable[AddressSet]) -> None:
        """Give sets that stand another content, in one transaction. Raises NetlinkError; nothing has changed then."""
        sets = tuple(sets)
        wanted = {each.name: each.spans() for each in sets}
        requests = list(refill(sets, wanted, {each.name: self._standing(each) for each in sets}))
        if requests:
            try:
                self._commit(requests)
            except NetlinkError:
                self._known.clear()
                raise
            self._known.update(wanted)

    def forget(self) -> None:
        """Believe nothing of what the sets held when they were last written."""
        self._known.clear()

    def remove(self) -> bool:
        """Take the table out, also one that a dead owner has left; whether there was one. Raises NetlinkError."""
        held = self.held()
        if held is not None:
            self._commit([adopt(held.flags), taking_out()])
        self._known.clear()
        return held is not None

    def _commit(self, requests: Sequence[Request]) -> None:
        batch = [(_BATCH_BEGIN, 0, _BATCH_BODY), *requests, (_BATCH_END, 0, _BATCH_BODY)]
        self._netlink.transact(batch, f"write table inet {TABLE}")


def _base(answer: bytes, found: dict[int, tuple[int, int]]) -> Base | None:
    if 4 not in found:
        return None
    place = spans(answer, *found[4])
    (number,), (priority,) = U32.unpack_from(answer, place[1][0]), struct.unpack_from(">i", answer, place[2][0])
    hook = next((hook for hook, known in HOOKS.items() if known == number), None)
    stage = next((stage for stage in Stage if stage.priority == priority), None)
    (policy,) = U32.unpack_from(answer, found[5][0])
    if hook is None or stage is None or policy != _ACCEPT:
        return _FOREIGN
    return Base(hook, stage)


def _size(answer: bytes, found: dict[int, tuple[int, int]]) -> int:
    """The number of elements that a set was made for; 0 where none was told."""
    told = spans(answer, *found[SET_DESC]) if SET_DESC in found else {}
    return int(U32.unpack_from(answer, told[DESC_SIZE][0])[0]) if DESC_SIZE in told else 0


def _borders(answer: bytes) -> Iterator[tuple[int, bool]]:
    """The borders of intervals in a message about elements: an address, and whether it ends one. Ends sort last."""
    found = spans(answer, BODY, len(answer))
    for _, start, end in attributes(answer, *found[3]) if 3 in found else ():
        parts = spans(answer, start, end)
        value = spans(answer, *parts[1])[1]
        flags = int(U32.unpack_from(answer, parts[3][0])[0]) if 3 in parts else 0
        yield int.from_bytes(answer[slice(*value)], "big"), bool(flags & 1)


def _tally(answer: bytes) -> Tally:
    found = spans(answer, BODY, len(answer))
    entry = commented(answer[slice(*found[_RULE_USERDATA])]) if _RULE_USERDATA in found else ""
    packets = octets = None
    for _, start, end in attributes(answer, *found[_RULE_EXPRESSIONS]) if _RULE_EXPRESSIONS in found else ():
        parts = spans(answer, start, end)
        if string(answer, *parts[_EXPRESSION_NAME]) == "counter":
            counter = spans(answer, *parts[_EXPRESSION_DATA])
            (packets,) = U64.unpack_from(answer, counter[_COUNTER_PACKETS][0])
            (octets,) = U64.unpack_from(answer, counter[_COUNTER_OCTETS][0])
    return Tally(string(answer, *found[_RULE_CHAIN]), entry, packets, octets)
