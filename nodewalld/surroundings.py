"""What stands around our rules and concerns whoever runs the node: what neighbours have lost, what goes past our rules.

Laws: nothing of others is ever written. A look costs some dumps of built-in chains, so it is taken with the resync and
after a repair that followed a flush, never for each event. What was seen is remembered over a restart of the daemon, so
that a loss does not end by it, and forgotten by a reboot, after which everybody writes anew.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import structlog

from nodewalld.core.blame import Wake
from nodewalld.core.bypasses import bypasses
from nodewalld.core.events import Bypass, Culprit, Event, Kind, Neighbour, Process, Reason, rfc3339
from nodewalld.core.lifelines import KNOWN, Jump, Key, Ledger, Missing, keys
from nodewalld.core.words import Backend, Family
from nodewalld.kernel.jumps import JumpReader
from nodewalld.kernel.paths import observe_paths
from nodewalld.service.state import StateFolder
from nodewalld.service.tenure import boot_id

_FLUSHES = frozenset({Reason.FLUSHED, Reason.MISSING})
_REST = 1000  # of the processor's time goes to looking beside iptables at the most one part
_WRITERS = 32  # between two looks; of more, nobody is asked for and nobody named
_FLUSHERS = 8  # of one burst, the last ones
_BURST = 1.0  # seconds within which a program that flushes one chain flushes the others as well
_AGAIN = 1.0  # seconds after a look that others' writing made impossible
_STATE = "neighbours"
_LINES = {line.name: line for line in KNOWN}

_log = structlog.get_logger(__name__)


class Surroundings:
    """For the thread of the loop. `record` takes every event; `strangers` gives who wrote since it was last called."""

    def __init__(
        self,
        state: StateFolder,
        record: Callable[[Event], None],
        strangers: Callable[[], Sequence[Culprit] | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._strangers = strangers
        self._state, self._record, self._clock = state, record, clock
        self._boot = boot_id()
        self._reader = JumpReader()
        self._writers: list[Culprit] | None = []
        self._unread = ""
        self._not_before, self._soon = float("-inf"), float("inf")
        self._flush: tuple[datetime, list[Culprit]] | None = None
        self._kept = state.read(_STATE) or {"boot": self._boot, "seen": [], "lost": []}
        self._ledger = _restored(self._kept, self._boot, clock())
        self._paths_due = float("-inf")
        self.neighbours: tuple[Neighbour, ...] = self._ledger.neighbours()
        """Who has lost jumps of its own, and what would bring them back."""
        self.bypasses: tuple[Bypass, ...] = ()
        """What leads packets past our rules, or judges them once more."""

    @property
    def due(self) -> float:
        """When (monotonic) a look is due though nothing happens; else infinity."""
        return max(min(self._ledger.due, self._soon), self._not_before)

    def woken(self, wake: Wake, repairs: Iterable[Event]) -> None:
        """Remember who wrote; when our own rules were flushed, look around as soon as the burst is over."""
        if self._writers is not None:
            self._writers = [*self._writers, *wake.who()]
            self._writers = self._writers if len(self._writers) <= _WRITERS else None
        flushes = [event for event in repairs if event.reason in _FLUSHES]
        if flushes:
            moment, named = self._flush or (flushes[0].time, [])
            self._flush = moment, [*named, *(event.by for event in flushes if event.by)][-_FLUSHERS:]
            self._soon = min(self._soon, self._clock() + _BURST)

    def look(self, backend: Backend | None) -> None:
        """Look around. Of what is newly missing, who flushed ours is named, or who alone wrote since the last look.

        `backend` holds our rules; None while none are held.
        """
        try:
            rules = self._reader.rules()
        except OSError as error:
            if str(error) != self._unread:
                _log.info(f"What neighbours have lost can't be seen now: {error}")
            self._unread, self._not_before = str(error), self._clock() + _AGAIN
            return
        now, alone = datetime.now(UTC), self._alone()
        moment, writers = self._flush or (now, alone)
        lost, healed = self._ledger.look(keys(rules), writers, self._clock(), now, moment)
        self._unread, self._soon, self._flush = "", float("inf"), None
        self._keep()
        self._look_beside(rules, backend)
        for neighbour in lost:
            self._record(Event(time=now, kind=Kind.NEIGHBOUR, what=neighbour.what, by=neighbour.by))
        for sentence in healed:
            self._record(Event(time=now, kind=Kind.HEALED, what=sentence))

    def _alone(self) -> list[Culprit]:
        """All that one program has written since the last look, when nobody else has."""
        strangers, known = self._strangers(), self._writers
        self._writers = []
        if strangers is None or known is None:
            return []
        writers = [*known, *strangers]
        return writers if len({culprit.name for culprit in writers}) == 1 else []

    def _look_beside(self, rules: frozenset[Jump], backend: Backend | None) -> None:
        """Look at what isn't iptables': rarely where that takes long, since nothing waits for it."""
        if self._clock() >= self._paths_due:
            started = time.thread_time()
            self.bypasses = bypasses(observe_paths(rules), backend)
            self._paths_due = self._clock() + _REST * (time.thread_time() - started)

    def forget(self) -> None:
        """Take the node as it is: what is away was taken out on purpose."""
        self._ledger.forget()
        self._keep()

    def _keep(self) -> None:
        self.neighbours = self._ledger.neighbours()
        stored = {
            "boot": self._boot,
            "seen": [[*_stored(key), number] for key, number in self._ledger.seen.items()],
            "lost": [_stored_loss(key, missing) for key, missing in self._ledger.lost.items()],
        }
        if stored != self._kept:
            self._kept = stored
            self._state.write(_STATE, stored)


def _stored(key: Key) -> list[str]:
    return [key.backend.value, key.family.value, key.line.name]


def _stored_loss(key: Key, missing: Missing) -> list[Any]:
    by = missing.by
    named = [] if by is None else [[by.pid, by.comm], *([parent.pid, parent.comm] for parent in by.parents)]
    return [*_stored(key), rfc3339(missing.since), named]


def _restored(stored: dict[str, Any], boot: str, now: float) -> Ledger:
    """As remembered; nothing of another boot, and nothing that isn't of that form."""
    ledger = Ledger()
    if not boot or stored.get("boot") != boot:
        return ledger
    for entry in _entries(stored.get("seen")):
        if (key := _key(entry[:3])) and len(entry) == 4 and type(entry[3]) is int:
            ledger.seen[key] = entry[3]
    for entry in _entries(stored.get("lost")):
        key, since = _key(entry[:3]), _moment(entry[3:4])
        if key and since and key in ledger.seen:
            ledger.lost[key] = Missing(since, now, _culprit(entry[4:]))
    return ledger


def _entries(value: object) -> Iterable[list[Any]]:
    return (entry for entry in value if isinstance(entry, list)) if isinstance(value, list) else ()


def _key(entry: list[Any]) -> Key | None:
    match entry:
        case [str(backend), str(family), str(name)]:
            if backend in set(Backend) and family in set(Family) and name in _LINES:
                return Key(Backend(backend), Family(family), _LINES[name])
    return None


def _moment(entry: list[Any]) -> datetime | None:
    match entry:
        case [str(text)]:
            try:
                moment = datetime.fromisoformat(text)
            except ValueError:
                return None
            return moment if moment.tzinfo else None
    return None


def _culprit(entry: list[Any]) -> Culprit | None:
    named = [Process(*each) for each in _entries(entry[0] if entry else None) if _names(each)]
    return Culprit(named[0].pid, named[0].comm, tuple(named[1:])) if named else None


def _names(value: list[Any]) -> bool:
    return len(value) == 2 and type(value[0]) is int and isinstance(value[1], str)
