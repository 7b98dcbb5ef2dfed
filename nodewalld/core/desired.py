"""What should stand in one family: our chains, our rules in foreign chains, our sets. Values only.

`Line.text` and `Placement.text` are what iptables-restore takes after `-A CHAIN`, our tag included. They are never
compared with what the kernel prints; see `Learned` in `nodewalld.core.observed`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from nodewalld.core.config import Position
from nodewalld.core.words import Family, Network, Table

OWN_PREFIX = "NODEWALL-"
"""Every chain with this prefix is ours, and so is whatever stands in it."""

PLACED = "at/"
"""The tag of a jump at a position in a foreign chain begins with this; no rule in a chain of ours has it."""


@dataclass(frozen=True, slots=True)
class Line:
    """One rule in a chain of ours. It waits while the foreign chain that it `needs` isn't there ("": needs none)."""

    entry: str
    text: str
    needs: str = ""


@dataclass(frozen=True, slots=True)
class OwnChain:
    """A chain of ours, replaced as a whole or not at all."""

    name: str
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """A rule that must stand at a position in a chain that others write too.

    `tag` is how it is found again; "" only for a `[[jump]]`, which is written as its owner writes it and is found by
    its whole text. `order` sorts ours among ours at the same place. `creates` names a chain to make if missing.
    """

    chain: str
    position: Position
    order: tuple[int, int]
    tag: str
    text: str
    entries: tuple[str, ...]
    needs: str = ""
    creates: str = ""


@dataclass(frozen=True)
class DesiredTable:
    """Everything of ours in one table."""

    chains: tuple[OwnChain, ...] = ()
    placements: tuple[Placement, ...] = ()

    @cached_property
    def rules(self) -> int:
        """How many rules this is."""
        return sum(len(chain.lines) for chain in self.chains) + len(self.placements)


@dataclass(frozen=True, slots=True)
class DesiredSet:
    """One kernel ipset of type hash:net and what must be in it."""

    name: str
    family: Family
    networks: frozenset[Network]


@dataclass(frozen=True, slots=True)
class Desired:
    """Everything of ours in one family. `reasons` tell what could not be written as it was meant."""

    family: Family
    tables: Mapping[Table, DesiredTable]
    sets: tuple[DesiredSet, ...]
    yield_to: tuple[str, ...]
    reasons: tuple[str, ...] = ()

    @property
    def rules(self) -> int:
        """How many rules this is."""
        return sum(table.rules for table in self.tables.values())


def merge(old: Desired, new: Desired) -> Desired:
    """The new rules, and of the old ones those that the new ones no longer have in the same table.

    Enforced first when a reload changes more than one table, so that an entry that moves from one table to another
    is in force in the second before it leaves the first.
    """
    tables = {
        table: _merge_table(old.tables.get(table, DesiredTable()), new.tables.get(table, DesiredTable()))
        for table in Table
        if table in old.tables or table in new.tables
    }
    names = {entry.name for entry in new.sets}
    sets = (*new.sets, *(entry for entry in old.sets if entry.name not in names))
    return Desired(new.family, tables, sets, new.yield_to, new.reasons)


def _merge_table(old: DesiredTable, new: DesiredTable) -> DesiredTable:
    kept_entries = {line.entry for chain in new.chains for line in chain.lines}
    new_chains = {chain.name: chain for chain in new.chains}
    chains = dict(new_chains)
    for chain in old.chains:
        if chain.name in new_chains:
            extra = tuple(line for line in chain.lines if line.entry not in kept_entries)
            chains[chain.name] = OwnChain(chain.name, (*new_chains[chain.name].lines, *extra))
        else:
            chains[chain.name] = chain
    places = {(place.chain, place.tag or place.text) for place in new.placements}
    extra_places = tuple(p for p in old.placements if (p.chain, p.tag or p.text) not in places)
    return DesiredTable(tuple(chains.values()), (*new.placements, *extra_places))
