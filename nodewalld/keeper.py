"""Keeps the content of our ipsets. The kernel tells of no change, so they are looked at when somebody asks.

Law: a set is replaced whole, by a swap, or changed by the few entries that come and go; one that rules refer to is
never seen empty or half full.
"""

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime

from nodewalld.core.desired import Desired, DesiredSet
from nodewalld.core.events import Event, Kind, Reason
from nodewalld.core.plan import Change
from nodewalld.kernel.process import ProgramError
from nodewalld.kernel.sets import SetError, Sets
from nodewalld.memory import Memory

_DESTROY_ATTEMPTS = 50


class SetKeeper:
    """The sets of both families. `errors` tell, by set, what could not be loaded at the last try."""

    def __init__(self, memory: Memory, clock: Callable[[], float] = time.monotonic) -> None:
        self._memory, self._clock = memory, clock
        self._sets = Sets()
        self._sound = clock()
        self.errors: dict[str, str] = {}

    @property
    def reasons(self) -> tuple[str, ...]:
        """Each trouble once, with the sets that it keeps away."""
        names: dict[str, list[str]] = {}
        for name, error in self.errors.items():
            names.setdefault(error, []).append(name)
        return tuple(
            error if each[0] in error else f"{error} (for sets {', '.join(each)})" for error, each in names.items()
        )

    def sync(self, wanted: Iterable[DesiredSet], *, strict: bool) -> tuple[Event, ...]:
        """Make and fill sets; returns a repair for each that was there before and had lost its content.

        Strict: raises SetError, ProgramError or OSError at the first that fails and did not fail before. Otherwise
        `errors` tell.
        """
        wanted = tuple(wanted)
        owned, started = self._memory.sets, self._clock()
        broken = frozenset(self.errors)
        self.errors.clear()
        repairs, made = [], set()
        try:
            for entry in wanted:
                try:
                    change = self._sync_one(entry)
                except (SetError, ProgramError, OSError) as error:
                    if strict and entry.name not in broken:
                        raise
                    self.errors[entry.name] = str(error)
                    continue
                made.add(entry.name)
                if change and entry.name in owned:
                    repairs.append(self._repair(entry, change))
        finally:
            # A set that could not be made may be somebody else's, and is never ours to destroy.
            self._memory.keep_sets(owned | made)
        if not self.errors:
            self._sound = started
        return tuple(repairs)

    def refill(self, old: Iterable[Desired], new: Iterable[Desired], *, strict: bool) -> None:
        """Give the sets that are to hold something else than before their new content.

        Strict: raises SetError, ProgramError or OSError at the first that fails, and puts the others back. Otherwise
        `errors` tell.
        """
        before = {entry.name: entry for desired in old for entry in desired.sets}
        done: list[tuple[DesiredSet, DesiredSet]] = []
        for entry in (entry for desired in new for entry in desired.sets):
            was = before.get(entry.name, DesiredSet(entry.name, entry.family, frozenset()))
            if was.networks == entry.networks:
                continue
            try:
                self._sets.change(entry.name, entry.family, was.networks, entry.networks)
            except (SetError, ProgramError, OSError) as error:
                if strict:
                    self._put_back(done)
                    raise
                self.errors[entry.name] = str(error)
            else:
                self.errors.pop(entry.name, None)
                done.append((was, entry))

    def _put_back(self, done: Iterable[tuple[DesiredSet, DesiredSet]]) -> None:
        for was, now in done:
            with suppress(SetError, ProgramError, OSError):  # then the next `sync` does it
                self._sets.change(was.name, was.family, now.networks, was.networks)

    def _sync_one(self, entry: DesiredSet) -> Change | None:
        """Bring one set to its content; what was wrong, or None."""
        header, subject = self._sets.header(entry.name), f"the set {entry.name}"
        if not self._sets.fill(entry.name, entry.family, entry.networks):
            return None
        if header is None:
            return Change(entry.name, Reason.MISSING, subject, "was not there")
        reason = Reason.CHANGED if header.size else Reason.FLUSHED
        return Change(entry.name, reason, subject, "did not hold what it should")

    def _repair(self, entry: DesiredSet, change: Change) -> Event:
        return Event(
            time=datetime.now(UTC),
            kind=Kind.REPAIR,
            what=f"filled {change.subject} again",
            family=entry.family,
            chain=entry.name,
            reason=change.reason,
            entries=(f"set/{entry.name.removesuffix('-v6')}",),
            exposed_ms=round((self._clock() - self._sound) * 1000, 3),
        )

    def drop_all_but(self, wanted: Iterable[str]) -> int:
        """Destroy the sets of ours that nothing needs any more; returns how many."""
        owned, kept = self._memory.sets, frozenset(wanted)
        self.errors = {name: error for name, error in self.errors.items() if name in kept}
        gone = {name for name in owned - kept if self._destroy(name)}
        self._memory.keep_sets(owned - gone)
        return len(gone)

    def _destroy(self, name: str) -> bool:
        """Whether a set is gone. nft frees deleted rules late, so a set may be busy for some milliseconds more."""
        for _ in range(_DESTROY_ATTEMPTS):
            try:
                self._sets.destroy(name)
            except SetError:
                time.sleep(0.01)
            else:
                return True
        return False
