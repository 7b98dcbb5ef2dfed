"""[[forward]]: routed traffic. The chain f-NAME holds an entry's conditions; fr-NAME the replies to what it accepts.

Law: whatever an entry does to a flow, the flow's replies and the ICMP errors about it pass.
"""

from collections.abc import Iterator, Sequence
from itertools import product

from nodewalld.core.config import Action
from nodewalld.core.decide import Routed
from nodewalld.core.iptables.matches import (
    REPLY,
    log_words,
    port_matches,
    refuse_words,
    reject_words,
    related_words,
    source_words,
)
from nodewalld.core.iptables.writer import EARLY, Writer, chain_name
from nodewalld.core.words import Family, Table


def write_routed(writer: Writer, r: Routed) -> None:
    """In mangle, where nobody else writes, unless it accepts or its place among others is its meaning."""
    table = Table.MANGLE if r.position is None and r.verdict.action is not Action.ACCEPT else Table.FILTER
    target = chain_name("f", r.name)
    position = writer.chain_at(table, "FORWARD", r.position or EARLY, r.order, r.entry)
    inside = () if r.inside.negated else r.inside.names
    outside = () if r.outside.negated else r.outside.names
    pairs = list(product(inside or ("",), outside or ("",)))
    for i, o in pairs:
        writer.add(table, position, r.entry, _passing(i, o), ("-j", target))
    for words in _routed_words(writer, r, table):
        writer.add(table, target, r.entry, words)
    if r.verdict.action is Action.ACCEPT and r.verdict.enforce:
        for i, o in pairs:
            writer.add(table, position, r.entry, _passing(o, i), REPLY, ("-j", chain_name("fr", r.name)))
        for way in dict.fromkeys(_passing(*way) for i, o in pairs for way in ((i, o), (o, i))):
            writer.add(table, position, r.entry, way, related_words(writer.family), ("-j", "ACCEPT"))
        for words in _reply_words(r):
            writer.add(table, chain_name("fr", r.name), r.entry, words)


def _passing(inside: str, outside: str) -> tuple[str, ...]:
    return (*(("-i", inside) if inside else ()), *(("-o", outside) if outside else ()))


def _routed_words(writer: Writer, r: Routed, table: Table) -> Iterator[Sequence[str]]:
    if r.verdict.action is not Action.ACCEPT:
        yield (*REPLY, "-j", "RETURN")
        yield (*related_words(writer.family), "-j", "RETURN")
    yield from _exclusions(r)
    for match in _conditions(r):
        yield from ((*match, *words) for words in log_words(r.verdict))
        if not r.verdict.enforce:
            yield match
        elif r.verdict.action is Action.ACCEPT:
            yield (*match, "-j", "ACCEPT")
        elif r.verdict.action is Action.REJECT and table is Table.FILTER:
            yield from _rejects(match, writer.family)
        else:
            yield (*match, *refuse_words(writer.decisions, r.verdict))


def _rejects(match: Sequence[str], family: Family) -> Iterator[Sequence[str]]:
    reset, unreachable = reject_words(family)
    if "-p" not in match:
        yield (*match, *reset)
        yield (*match, *unreachable)
    elif match[match.index("-p") + 1] == "tcp":
        yield (*match, *reset[2:])
    else:
        yield (*match, *unreachable)


def _exclusions(r: Routed, *, reply: bool = False) -> Iterator[tuple[str, ...]]:
    """What a negated condition names is not meant: it returns."""
    inside, outside = ("-o", "-i") if reply else ("-i", "-o")
    source, destination = ("dst", "src") if reply else ("src", "dst")
    for interfaces, option in ((r.inside, inside), (r.outside, outside)):
        if interfaces.negated:
            yield from ((option, name, "-j", "RETURN") for name in interfaces.names)
    for sources, direction in ((r.source, source), (r.destination, destination)):
        if sources.negated:
            yield from ((*source_words(s, direction=direction), "-j", "RETURN") for s in sources.items)


def _conditions(r: Routed, *, reply: bool = False) -> Iterator[tuple[str, ...]]:
    sources = () if r.source.negated else r.source.items
    destinations = () if r.destination.negated else r.destination.items
    ports: list[tuple[str, ...]] = [()]
    if r.ports:
        ports = list(port_matches(r.protocol, r.ports, "sport" if reply else "dport"))
    near, far = ("dst", "src") if reply else ("src", "dst")
    for source, destination, port in product(sources or (None,), destinations or (None,), ports):
        words = [
            *(source_words(source, direction=near) if source else ()),
            *(source_words(destination, direction=far) if destination else ()),
        ]
        protocol = ("-p", r.protocol) if r.protocol else ()
        addresses = [w for pair in _groups(words) if pair[0] != "-m" for w in pair]
        matches = [w for pair in _groups(words) if pair[0] == "-m" for w in pair]
        yield (*addresses, *protocol, *matches, *port)


def _groups(words: Sequence[str]) -> Iterator[Sequence[str]]:
    """The words in their conditions: `-s X`, `-d X`, `-m set --match-set X src`."""
    index = 0
    while index < len(words):
        size = 5 if words[index] == "-m" else 2
        yield words[index : index + size]
        index += size


def _reply_words(r: Routed) -> Iterator[Sequence[str]]:
    yield from _exclusions(r, reply=True)
    for match in _conditions(r, reply=True):
        yield (*match, "-j", "ACCEPT")
