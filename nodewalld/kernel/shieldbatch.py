"""The transaction that makes the table `inet nodewalld` another, as netlink messages.

Laws: pure bytes; nothing is sent here. A base chain that stands is never taken away to be made again: its rules are
replaced where they are, so that no packet finds none. Of a set that stands only what comes and goes is told.

Sources: include/uapi/linux/netfilter/nf_tables.h; net/netfilter/nf_tables_api.c for what a message must hold.
"""

import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from nodewalld.core.shield.rules import (
    TABLE,
    AddressSet,
    Base,
    Hook,
    PortMap,
    Rule,
    Shield,
    Spans,
    Verdict,
    Word,
)
from nodewalld.core.words import Family
from nodewalld.kernel.netlink import NLM_F_APPEND, NLM_F_CREATE, U32, attribute, nested, netfilter_body, text
from nodewalld.kernel.nftexpr import address_element, comment, expressions, port_elements

INET = 1  # NFPROTO_INET
NFT = 10 << 8  # NFNL_SUBSYS_NFTABLES
_NEWTABLE, _DELTABLE, _NEWCHAIN, _DELCHAIN = NFT, NFT | 2, NFT | 3, NFT | 5
_NEWRULE, _DELRULE, _NEWSET, _DELSET = NFT | 6, NFT | 8, NFT | 9, NFT | 11
_NEWSETELEM, _DELSETELEM = NFT | 12, NFT | 14

HOOKS = {Hook.PREROUTING: 0, Hook.INPUT: 1, Hook.FORWARD: 2, Hook.OUTPUT: 3}
_ACCEPT = 1
_INTERVAL, _MAP = 0x4, 0x8
SET_DESC, DESC_SIZE = 9, 1  # NFTA_SET_DESC, NFTA_SET_DESC_SIZE
_KEYS = {Family.IPV4: (7, 4), Family.IPV6: (8, 16)}  # nft(8)'s numbers for the types of keys, and their lengths
_PORT_KEY = 13, 2
_VERDICT_TYPE = 0xFFFFFF00  # NFT_DATA_VERDICT
_BIG_ENDIAN_KEYS = b"\0\4" + struct.pack("=I", 2)  # NFTNL_UDATA_SET_KEYBYTEORDER, without which nft(8) lists no set
_CHUNK = 1000  # elements a message: an attribute holds 64 KiB

ABOUT = "about"
"""A chain that nothing leads to: the comment of its one rule says what the table was written from."""

_RETURN = Rule("", (), Verdict(Word.RETURN))  # nft -j complains of a rule that does nothing at all

Request = tuple[int, int, bytes]
"""A message to the kernel: its type, its flags, its body."""


@dataclass
class Content:
    """What stands in the table: chains, with what makes them base chains; sets of addresses, and maps, by name."""

    chains: dict[str, Base | None] = field(default_factory=dict)
    sets: dict[str, tuple[bool, int]] = field(default_factory=dict)  # whether they hold ranges, and their size
    maps: set[str] = field(default_factory=set)


def adopt(flags: int) -> Request:
    """Make the table, or take it over from a nodewalld that is gone."""
    return _NEWTABLE, NLM_F_CREATE, _body(attribute(2, U32.pack(flags)))


def remove() -> Request:
    """Take the table out, with all that is in it."""
    return _DELTABLE, 0, _body()


def rewrite(
    shield: Shield, about: str, content: Content, wanted: Mapping[str, Spans], known: Mapping[str, Spans]
) -> Iterator[Request]:
    """From what stands to a shield; `wanted` and `known` are what its sets shall hold, and hold now."""
    bases = {**{chain.name: chain.base for chain in shield.chains}, ABOUT: None}
    kept = {entry.name for entry in shield.sets if content.sets.get(entry.name) == (entry.ranges, entry.size)}
    yield from _clear(content, bases, kept)
    for name, base in bases.items():
        if name not in content.chains or content.chains[name] != base:
            yield _chain(name, base)
    for number, entry in enumerate(shield.sets, 1):
        if entry.name not in kept:
            yield _set(entry, number)
    yield from refill(shield.sets, wanted, {name: spans for name, spans in known.items() if name in kept})
    for number, each in enumerate(shield.maps, len(shield.sets) + 1):
        yield from _map(each, number)
    for chain in shield.chains:
        yield from (_rule(chain.name, expressions(rule), rule.entry) for rule in chain.rules)
    yield _rule(ABOUT, expressions(_RETURN), about)


def refill(sets: Iterable[AddressSet], wanted: Mapping[str, Spans], known: Mapping[str, Spans]) -> Iterator[Request]:
    """What comes to sets and goes from them."""
    for entry in sets:
        old, new = frozenset(known.get(entry.name, ())), frozenset(wanted[entry.name])
        for kind, changed in ((_DELSETELEM, old - new), (_NEWSETELEM, new - old)):
            borders = [element for span in sorted(changed) for element in _borders(entry, span)]
            yield from _in_chunks(kind, entry.name, borders)


def _body(*parts: bytes) -> bytes:
    return netfilter_body(INET, text(1, TABLE), *parts)


def _clear(content: Content, bases: Mapping[str, Base | None], kept: Collection[str]) -> Iterator[Request]:
    """All rules, the maps (whose verdicts hold chains), and what is no longer wanted."""
    if content.chains:
        yield _DELRULE, 0, _body()
    for name in (*content.maps, *(content.sets.keys() - set(kept))):
        yield _DELSETELEM, 0, _body(text(2, name))
        yield _DELSET, 0, _body(text(2, name))
    for name, base in content.chains.items():
        if name not in bases or base != bases[name]:
            yield _DELCHAIN, 0, _body(text(3, name))


def _chain(name: str, base: Base | None) -> Request:
    parts = [text(3, name)]
    if base:
        place = attribute(1, U32.pack(HOOKS[base.hook])), attribute(2, struct.pack(">i", base.stage.priority))
        parts += [nested(4, *place), attribute(5, U32.pack(_ACCEPT)), text(7, "filter")]
    return _NEWCHAIN, NLM_F_CREATE, _body(*parts)


def _set(entry: AddressSet, number: int) -> Request:
    kind, length = _KEYS[entry.family]
    parts = [_number(3, _INTERVAL if entry.ranges else 0), _number(4, kind), _number(5, length), _number(10, number)]
    parts += [_sized(entry.size)] if entry.size else []
    return _NEWSET, NLM_F_CREATE, _body(text(2, entry.name), *parts, attribute(13, _BIG_ENDIAN_KEYS))


def _map(entry: PortMap, number: int) -> Iterator[Request]:
    kind, length = _PORT_KEY
    parts = [
        _number(3, _MAP | (_INTERVAL if entry.ranges else 0)),
        _number(4, kind),
        _number(5, length),
        _number(6, _VERDICT_TYPE),
    ]
    parts += [_number(7, 0), _number(10, number), attribute(13, _BIG_ENDIAN_KEYS)]
    parts += [_sized(len(entry.verdicts))] if not entry.ranges else []
    yield _NEWSET, NLM_F_CREATE, _body(text(2, entry.name), *parts)
    verdicts = entry.verdicts
    elements = [each for ports, verdict in verdicts for each in port_elements(ports, verdict, ranges=entry.ranges)]
    yield from _in_chunks(_NEWSETELEM, entry.name, elements)


def _borders(entry: AddressSet, span: tuple[int, int]) -> Iterator[bytes]:
    first, last = span
    yield address_element(entry.family, first, end=False)
    if entry.ranges and last + 1 < 1 << 8 * _KEYS[entry.family][1]:
        yield address_element(entry.family, last + 1, end=True)


def _in_chunks(kind: int, name: str, elements: list[bytes]) -> Iterator[Request]:
    flags = NLM_F_CREATE if kind == _NEWSETELEM else 0
    for start in range(0, len(elements), _CHUNK):
        yield kind, flags, _body(text(2, name), nested(3, *elements[start : start + _CHUNK]))


def _rule(chain: str, content: bytes, words: str) -> Request:
    told = attribute(7, comment(words)) if words else b""
    return _NEWRULE, NLM_F_CREATE | NLM_F_APPEND, _body(text(2, chain), nested(4, content), told)


def _sized(elements: int) -> bytes:
    """The kernel makes a table of fixed size for a number of elements that it is told."""
    return nested(SET_DESC, _number(DESC_SIZE, elements))


def _number(kind: int, value: int) -> bytes:
    return attribute(kind, U32.pack(value))
