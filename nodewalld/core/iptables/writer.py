"""Collects our chains, and one jump to them for each position in a chain that others write too."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from nodewalld.core.config import Place, Position
from nodewalld.core.decide import Decisions
from nodewalld.core.desired import OWN_PREFIX, PLACED, Desired, DesiredSet, DesiredTable, Line, OwnChain, Placement
from nodewalld.core.ruletext import join, tag_words
from nodewalld.core.words import CHAIN_NAME_MAX, Table

EARLY = Position()
OURS = (-1, 0)
"""The order of what no single entry of the configuration asks for: before all that does."""


def chain_name(kind: str, name: str) -> str:
    """The name of a chain of ours, cut and made unique by a hash where the kernel's limit demands it."""
    full = f"{OWN_PREFIX}{kind}-{name}" if kind else f"{OWN_PREFIX}{name}"
    if len(full) <= CHAIN_NAME_MAX:
        return full
    return f"{full[: CHAIN_NAME_MAX - 7]}-{_short(name)}"


def position_chain(table: Table, chain: str, position: Position, part: int = 1) -> tuple[str, str]:
    """The chain of ours that a position in a foreign chain jumps to, and the tag of that jump."""
    label = position.place.value
    if position.place is Place.BETWEEN:
        label = _short(repr(position))
    if part > 1:
        label = f"{label}-{part}"
    base = chain if chain in table.builtin_chains else f"in-{chain}"
    suffix = "" if label == Place.EARLY.value else f"-{label}"
    return chain_name("", base + suffix), f"{PLACED}{label}"


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


class Writer:
    """Collects chains and placements of one family."""

    def __init__(self, decisions: Decisions) -> None:
        self.decisions = decisions
        self.family = decisions.family
        self.chains: dict[Table, dict[str, list[Line]]] = defaultdict(dict)
        self.placements: dict[Table, list[Placement]] = defaultdict(list)
        self._parts: dict[tuple[Table, str, Position], int] = {}

    def rule(self, entry: str, *parts: Sequence[str], needs: str = "") -> Line:
        """A tagged rule; the parts before the first -m or -j stand first, as iptables prints them."""
        words = [word for part in parts for word in part]
        at = next((i for i, w in enumerate(words) if w in {"-m", "-j", "-g"}), len(words))
        return Line(entry, join([*words[:at], *tag_words(entry), *words[at:]]), needs)

    def add(self, table: Table, chain: str, entry: str, *parts: Sequence[str]) -> None:
        """Write a rule at the end of a chain of ours, which is made when it is first written to."""
        self.chains[table].setdefault(chain, []).append(self.rule(entry, *parts))

    def chain_at(self, table: Table, chain: str, position: Position, order: tuple[int, int], entry: str) -> str:
        """The chain of ours at a position of a foreign chain; its jump is placed when it is first asked for."""
        name, tag = position_chain(table, chain, position, self._parts.get((table, chain, position), 1))
        known = self.placements[table]
        for index, place in enumerate(known):
            if (place.chain, place.tag) == (chain, tag):
                if entry not in place.entries:
                    known[index] = Placement(
                        chain, position, min(place.order, order), tag, place.text, (*place.entries, entry)
                    )
                return name
        text = join([*tag_words(tag), "-j", name])
        known.append(Placement(chain, position, order, tag, text, (entry,)))
        self.chains[table].setdefault(name, [])
        return name

    def stand(self, table: Table, place: Placement) -> None:
        """Place a rule that stands in the foreign chain itself: what is at the same position later comes below it."""
        self.placements[table].append(place)
        key = table, place.chain, place.position
        part = self._parts.get(key, 1)
        _, tag = position_chain(*key, part)
        if any((other.chain, other.tag) == (place.chain, tag) for other in self.placements[table]):
            self._parts[key] = part + 1

    def desired(self) -> Desired:
        """All that has been written."""
        tables = {}
        for table in Table:
            chains = tuple(OwnChain(name, tuple(lines)) for name, lines in self.chains[table].items())
            if chains or self.placements[table]:
                tables[table] = DesiredTable(chains, tuple(self.placements[table]))
        d = self.decisions
        sets = tuple(DesiredSet(name, self.family, networks) for name, networks in d.sets)
        return Desired(self.family, tables, sets, d.yield_to, d.reasons)
