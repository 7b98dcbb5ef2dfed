"""What happened since the start: a bounded ring of events, counters that never forget, readers that follow.

Law: writing never waits for a reader. Followers keep a place in the numbered ring instead of a queue, so a
slow one costs nothing but its own completeness: what has left the ring by then, it has missed.
"""

import threading
from collections import Counter, deque
from collections.abc import Iterator
from datetime import datetime, timedelta
from itertools import islice
from typing import Any

from nodewalld.core.events import Event, Kind
from nodewalld.core.exposed import Exposures, add_up

Json = dict[str, Any]


class History:
    """The last `size` events; may be used from any thread."""

    def __init__(self, size: int = 1000) -> None:
        self._ring: deque[Event] = deque(maxlen=size)
        self._counts: Counter[Kind] = Counter()
        self._total = 0
        self._last_repair: Event | None = None
        self._changed = threading.Condition()

    def add(self, event: Event) -> None:
        """Take in one event and wake the followers."""
        with self._changed:
            self._ring.append(event)
            self._counts[event.kind] += 1
            self._total += 1
            if event.kind is Kind.REPAIR:
                self._last_repair = event
            self._changed.notify_all()

    def last(self, n: int | None = None) -> tuple[Event, ...]:
        """The newest `n` events (all that are kept, without `n`), the oldest first."""
        with self._changed:
            return self._newest(len(self._ring) if n is None else n)

    def count(self, kind: Kind) -> int:
        """How many events of this kind there were, those no longer kept included."""
        with self._changed:
            return self._counts[kind]

    @property
    def last_repair(self) -> Event | None:
        """The newest repair, even when it has left the ring."""
        with self._changed:
            return self._last_repair

    def exposures(self, now: datetime, window: timedelta = timedelta(days=1)) -> Exposures:
        """What was open within the `window` before now, or since the oldest event that is kept, if that is later."""
        with self._changed:
            kept = self._newest(len(self._ring))
        begins = [event.time - timedelta(milliseconds=event.exposed_ms or 0.0) for event in kept[:1]]
        return add_up(kept, max([now - window, *begins]))

    def follow(self, n: int | None = None, *, tick: float = 1.0) -> Iterator[list[Json] | Json | None]:
        """First the list of the newest `n` events as JSON, then each new one; None after `tick` quiet
        seconds.

        Nothing falls between the list and what follows. The None lets the reader look whether anyone still
        listens.
        """
        with self._changed:
            past, seen = self._newest(len(self._ring) if n is None else n), self._total
        yield [event.to_json() for event in past]
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._total > seen, tick)  # noqa: B023 - called within this turn only
                fresh, seen = self._newest(self._total - seen), self._total
            if not fresh:
                yield None
            for event in fresh:
                yield event.to_json()

    def _newest(self, n: int) -> tuple[Event, ...]:
        return tuple(islice(self._ring, max(0, len(self._ring) - max(0, n)), None))
