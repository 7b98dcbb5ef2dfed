"""What is looked at to plan a table, what was seen there, and what was learned of how it is shown.

Law: what a tool prints is compared with what it printed before (`Learned`), never with what we wrote, because rule text
does not round-trip. Text that happens to come back as written needs no learning.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from nodewalld.core.config import Place
from nodewalld.core.desired import DesiredTable
from nodewalld.core.ruletext import Rule, target_of, words_of
from nodewalld.core.words import Table


@dataclass(frozen=True, slots=True)
class Observed:
    """What one table holds of the chains that matter to us; a chain that isn't there isn't in `chains`.

    `handles` are what the kernel calls these rules, where it has names for them.
    """

    chains: Mapping[str, tuple[Rule, ...]]
    handles: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


Print = tuple[str, tuple[str, ...]]
"""The digest of texts as we wrote them, and the lines that the tool prints of them."""


@dataclass(frozen=True, slots=True)
class Learned:
    """How the kernel's tool prints what we wrote: by chain, or by chain and tag for what stands in a foreign one."""

    prints: Mapping[str, Print] = field(default_factory=dict)

    def same(self, key: str, written: Sequence[str], read: Sequence[str]) -> bool:
        """Whether what is read is what was written, as far as anybody can know."""
        known = self.prints.get(key)
        if known is not None and known[1] == tuple(read) and known[0] == digest(written):
            return True
        return len(written) == len(read) and all(map(_same_words, written, read))


def _same_words(written: str, read: str) -> bool:
    return written == read or words_of(written) == words_of(read)


def digest(written: Sequence[str]) -> str:
    """A short name for rule texts as we wrote them."""
    return _digest(tuple(written))


@lru_cache(maxsize=4096)
def _digest(written: tuple[str, ...]) -> str:
    return hashlib.sha256("\n".join(written).encode()).hexdigest()[:32]


def wanted_chains(table: Table, desired: DesiredTable) -> frozenset[str]:
    """The chains that must be observed to plan this table."""
    names = set(table.builtin_chains) & {place.chain for place in desired.placements}
    for chain in desired.chains:
        names.add(chain.name)
        names.update(line.needs for line in chain.lines if line.needs)
    for place in desired.placements:
        names.add(place.chain)
        names.update(name for name in (place.needs, place.creates) if name)
    return frozenset(names)


def shallow_chains(desired: DesiredTable) -> dict[str, frozenset[str]]:
    """Foreign chains of whose foreign rules a plan asks for the targets alone, as ours don't stand by anchors there.

    By each the targets of bare jumps of ours: whether a rule with such a target is one of them takes its whole text.
    """
    places = desired.placements
    deep = {place.chain for place in places if place.position.place is Place.BETWEEN}
    bare = [(place.chain, target_of(place.text)) for place in places if not place.tag]
    names = {place.chain for place in places} - deep
    return {name: frozenset(target for chain, target in bare if chain == name) for name in names}


def targets(desired: DesiredTable) -> frozenset[str]:
    """The targets and chains that rules of ours should lead to."""
    texts = [line.text for chain in desired.chains for line in chain.lines] + [p.text for p in desired.placements]
    return frozenset(map(target_of, texts))


def stray_targets(observed: Observed, known: Collection[str]) -> frozenset[str]:
    """What rules of ours lead to beyond the observed chains and the `known` targets: a chain that somebody renamed."""
    found = {rule.target for rules in observed.chains.values() for rule in rules if rule.tag}
    return frozenset(found - observed.chains.keys() - {""} - set(known))


def read_back(
    table: Table, desired: DesiredTable, observed: Observed
) -> Iterator[tuple[str, tuple[str, tuple[str, ...]]]]:
    """What to learn from an observation that is known to show just what we wrote."""
    for chain in desired.chains:
        present = [
            line.text
            for line in chain.lines
            if not line.needs or line.needs in table.builtin_chains or line.needs in observed.chains
        ]
        rules = observed.chains.get(chain.name)
        if rules is not None and len(rules) == len(present):
            yield chain.name, (digest(present), tuple(rule.text for rule in rules))
    for place in desired.placements:
        for rule in observed.chains.get(place.chain, ()):
            if place.tag and rule.tag == place.tag:
                yield f"{place.chain} {place.tag}", (digest([place.text]), (rule.text,))
