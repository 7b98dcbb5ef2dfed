"""Tells a flood of repairs in a few sentences: the first few each, the rest summed up.

Laws: nothing is lost, only said shorter, and never late by more than `LONGEST`. Only repairs are summed up; everything
else is told at once, after what came before it.
"""

from collections import Counter

from nodewalld.core.events import Event, Kind

FIRST_FEW = 12
"""Repairs that a burst may tell one by one: a flush of everything is some ten."""

QUIET = 1.0
"""Seconds without a repair that end a burst."""

LONGEST = 10.0
"""Seconds after which a burst that goes on is told of."""


class Summary:
    """Decides what of the events is told, and when. The clock is the caller's, in seconds."""

    def __init__(self) -> None:
        self._told = 0
        self._kept: list[Event] = []
        self._began = self._last = float("-inf")

    def take(self, event: Event, now: float) -> tuple[Event, ...]:
        """What to tell now that this has happened."""
        before = self.flush(now, at_once=event.kind is not Kind.REPAIR)
        if event.kind is not Kind.REPAIR:
            return (*before, event)
        if now - self._last > QUIET:
            self._told = 0
        self._last = now
        if self._told < FIRST_FEW:
            self._told += 1
            return (*before, event)
        if not self._kept:
            self._began = now
        self._kept.append(event)
        return before

    @property
    def due(self) -> float:
        """When `flush` has something to tell; infinity when nothing is kept."""
        return min(self._last + QUIET, self._began + LONGEST) if self._kept else float("inf")

    def flush(self, now: float, *, at_once: bool = False) -> tuple[Event, ...]:
        """The sum of what is kept, if it is time."""
        if not self._kept or (now < self.due and not at_once):
            return ()
        kept, self._kept = self._kept, []
        return (kept[0],) if len(kept) == 1 else (_sum(kept, self._last - self._began),)


def _sum(kept: list[Event], seconds: float) -> Event:
    """One event for many: who, how many, where most, how long the longest. Wall clocks jump, `seconds` do not."""
    last = kept[-1]
    who = Counter(event.by.name for event in kept if event.by)
    named = (
        f"all by {next(iter(who))}" if len(who) == 1 and sum(who.values()) == len(kept) else _several(who, len(kept))
    )
    where = Counter(event.place for event in kept).most_common(1)[0]
    exposed = [event.exposed_ms for event in kept if event.exposed_ms is not None]
    what = f"{len(kept)} more repairs in {max(seconds, 0.1):.1f} s"
    what += f", {named}" if named else ""
    what += f"; {where[1]} of them in {where[0]}"
    entries = tuple(dict.fromkeys(entry for event in kept for entry in event.entries))
    return Event(
        time=last.time,
        kind=Kind.REPAIR,
        what=what,
        entries=entries,
        by=last.by if len(who) == 1 else None,
        exposed_ms=max(exposed) if exposed else None,
        flows_deleted=sum(event.flows_deleted for event in kept),
    )


def _several(who: Counter[str], total: int) -> str:
    parts = [f"{count} by {name}" for name, count in who.most_common(3)]
    unknown = total - sum(who.values())
    return ", ".join([*parts, *([f"{unknown} by unknown"] if unknown and parts else [])])
