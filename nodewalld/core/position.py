"""Positions: which slots among the foreign rules of a chain a rule may take, and which it takes.

Laws: a slot is the number of foreign rules above. A position is an interval of slots; a rule that stands inside its
interval is not moved. Ours are never foreign to one another; at one slot they stand in their order.
"""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from nodewalld.core.config import Anchor, AnchorKind, Place, Position
from nodewalld.core.ruletext import Rule

_RANK = {Place.FIRST: 0, Place.EARLY: 1, Place.BETWEEN: 2, Place.LAST: 3}


@dataclass(frozen=True, slots=True)
class Room:
    """The slots `low` to `high` that a position leaves, and the one a rule that is put in takes.

    `unmet` says which wish could not be kept (missing anchors, anchors that cross); `seen` holds the anchors found.
    """

    low: int
    high: int
    preferred: int
    unmet: str = ""
    seen: frozenset[str] = frozenset()


def rank(position: Position) -> int:
    """The order of the kinds of position among ours."""
    return _RANK[position.place]


def room(position: Position, foreign: Sequence[Rule], yield_to: Sequence[str], *, applies: bool = True) -> Room:
    """The room that a position has in a chain with these foreign rules.

    `applies` False: its anchors can never be there in this family, which is nobody's fault and not told.
    """
    count = len(foreign)
    early = _leading_run(foreign, yield_to)
    match position.place:
        case Place.FIRST:
            return Room(0, 0, 0)
        case Place.EARLY:
            return Room(0, early, early)
        case Place.LAST:
            return Room(count, count, count)
    below = [i for i, rule in enumerate(foreign) if any(rule.matches(a) for a in position.after)]
    above = [i for i, rule in enumerate(foreign) if any(rule.matches(a) for a in position.before)]
    seen = frozenset((["after"] if below else []) + (["before"] if above else []))
    if not seen:
        return Room(0, count, early, _missing(position, foreign) if applies else "", seen)
    low = below[-1] + 1 if below else 0
    high = above[0] if above else count
    if low > high:
        crossed = f"{foreign[below[-1]].shown} stands below {foreign[high].shown}"
        return Room(0, high, high, f"its anchors are in the wrong order ({crossed}), so only `before` is kept", seen)
    return Room(low, high, high if above else low, "", seen)


def _missing(position: Position, foreign: Sequence[Rule]) -> str:
    """That nothing of what it looks for is there, and what may have taken its place: Docker 28 renamed its chains."""
    wanted = (*position.after, *position.before)
    heads = {_head(anchor.pattern) for anchor in wanted if anchor.kind is AnchorKind.TARGET} - {""}
    akin = dict.fromkeys(rule.target for rule in foreign if _head(rule.target) in heads)
    hint = f"; there is {', '.join(akin)}" if akin else ""
    return f"none of its anchors is in the chain ({', '.join(map(_words, wanted))}{hint})"


def _head(name: str) -> str:
    """What the chains of one program have in common: "DOCKER-" of DOCKER-FORWARD."""
    head, dash, _ = name.partition("-")
    return head + dash if dash and head.isalnum() else ""


def _words(anchor: Anchor) -> str:
    return f"the comment {anchor.pattern}" if anchor.kind is AnchorKind.COMMENT else anchor.pattern


def _leading_run(foreign: Sequence[Rule], globs: Sequence[str]) -> int:
    for index, rule in enumerate(foreign):
        if not any(fnmatch.fnmatchcase(rule.target, glob) for glob in globs):
            return index
    return len(foreign)


def choose(rooms: Sequence[Room], standing: Sequence[int | None], anchored: Sequence[bool]) -> list[int]:
    """The slot for each rule of ours, all given in our order.

    Keeps whoever stands in its room, and the order of the anchored ones among each other where their rooms allow it.
    """
    highs = [r.high for r in rooms]
    cap: int | None = None
    for i in reversed(range(len(rooms))):
        if anchored[i]:
            if cap is not None and cap >= rooms[i].low:
                highs[i] = min(highs[i], cap)
            cap = highs[i] if cap is None else min(cap, highs[i])
    slots: list[int] = []
    floor = 0
    for i, space in enumerate(rooms):
        low = space.low
        if anchored[i] and floor <= highs[i]:
            low = max(low, floor)
        now = standing[i]
        slot = now if now is not None and low <= now <= highs[i] else min(max(space.preferred, low), highs[i])
        slots.append(slot)
        if anchored[i]:
            floor = max(floor, slot)
    return slots
