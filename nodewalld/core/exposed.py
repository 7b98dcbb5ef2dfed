"""For how long rules were not in force: what the repairs of a while add up to.

Law: one disturbance may be told by several repairs, one for each chain; time that they share is counted once.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from nodewalld.core.events import Event, rfc3339

_CULPRITS = 3


@dataclass(frozen=True, slots=True)
class Exposures:
    """How often something of ours was open since a moment, in milliseconds in all and at most; by whom most often."""

    since: datetime
    count: int = 0
    total_ms: float = 0.0
    longest_ms: float = 0.0
    by: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """`exposures` in `status --json`."""
        return {
            "since": rfc3339(self.since),
            "count": self.count,
            "total_ms": self.total_ms,
            "longest_ms": self.longest_ms,
            "by": list(self.by),
        }


def add_up(events: Iterable[Event], since: datetime) -> Exposures:
    """The exposures that ended after `since`; of one that began earlier, what came after."""
    spans: list[tuple[datetime, datetime]] = []
    culprits: Counter[str] = Counter()
    for event in events:
        if not event.exposed_ms or event.time <= since:
            continue
        spans.append((max(since, event.time - timedelta(milliseconds=event.exposed_ms)), event.time))
        culprits.update([event.by.name] if event.by else [])
    merged: list[tuple[datetime, datetime]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    lengths = [(end - begin) / timedelta(milliseconds=1) for begin, end in merged]
    names = tuple(name for name, _ in culprits.most_common(_CULPRITS))
    return Exposures(since, len(lengths), round(sum(lengths), 3), round(max(lengths, default=0.0), 3), names)
