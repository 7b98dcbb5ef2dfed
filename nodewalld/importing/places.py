"""Where a hand-made rule stood among the neighbours' rules, as a position that nodewalld can hold.

Law: the position is tried by the very function that will enforce it (`core.position.room`), against the neighbours'
rules of the dump. It names the nearest neighbours by the chain they jump to, which outlives their details, else whole.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nodewalld.core.config import Anchor, AnchorKind, DaemonConfig, Place, Position
from nodewalld.core.iptables.render import needed_chain
from nodewalld.core.position import room
from nodewalld.core.ruletext import Rule, join

EARLY = Position()
_LAST = Position(Place.LAST)


@dataclass(frozen=True, slots=True)
class Found:
    """A position, and what is to be said of it; `note` "" when it is the very place."""

    position: Position
    note: str = ""


def place(slot: int, foreign: Sequence[Rule]) -> Found:
    """The position of a rule with `slot` of the foreign rules above it."""
    yield_to = DaemonConfig().yield_to
    early = room(EARLY, foreign, yield_to).high
    if slot <= early:
        if slot == early:
            return Found(EARLY)
        above = foreign[slot].target
        return Found(EARLY, f'stood above {above}, whose owner insists on the top: "first" would be a war')
    if slot == len(foreign):
        return Found(_LAST)
    for position in _between(slot, foreign):
        left = room(position, foreign, yield_to)
        if left.preferred == slot and not left.unmet:
            return Found(position)
    return Found(EARLY, "stood between rules that can't be told apart: give it a position")


def _between(slot: int, foreign: Sequence[Rule]) -> Iterator[Position]:
    """The positions that may mean this slot, the closest first."""
    above, below = list(_anchors(foreign[slot - 1])), list(_anchors(foreign[slot]))
    for after in above:
        for before in below:
            yield Position(Place.BETWEEN, (after,), (before,))
    for before in below:
        yield Position(Place.BETWEEN, (), (before,))
    for after in above:
        yield Position(Place.BETWEEN, (after,), ())


def _anchors(rule: Rule) -> Iterator[Anchor]:
    if chain := needed_chain(rule.words):
        yield Anchor(AnchorKind.TARGET, chain)
    if rule.bare:
        yield Anchor(AnchorKind.RULE, join(rule.bare))
    for comment in rule.comments:
        if not set(comment) & set("*?["):
            yield Anchor(AnchorKind.COMMENT, comment)
