"""What the state folder remembers of the kernel: how its tool prints our texts, and what is ours but bears no tag.

Law: losing it harms nobody. Without it rules are written once more at the next start, and a set or an empty foreign
chain may stay behind after a removal.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from nodewalld.core.observed import Learned
from nodewalld.core.words import Backend, Family, Table
from nodewalld.service.state import StateFolder

Made = tuple[Backend, Family, Table, str]
"""A foreign chain that a `[[jump]]` needed, and that nobody else had made."""

_PRINTS, _OWNED, _BACKEND = "prints", "owned", "backend"
_SET_NAME = re.compile(r"[A-Za-z0-9_-]{1,31}")


class Memory:
    """Typed access to the state folder; what is damaged counts as not there."""

    def __init__(self, state: StateFolder) -> None:
        self._state = state

    @property
    def backend(self) -> Backend | None:
        """The backend used last."""
        known = (self._state.read(_BACKEND) or {}).get("backend")
        return Backend(known) if isinstance(known, str) and known in set(Backend) else None

    @backend.setter
    def backend(self, used: Backend) -> None:
        if self.backend is not used:
            self._state.write(_BACKEND, {"backend": used.value})

    def prints(self, backend: Backend) -> dict[Family, dict[Table, Learned]]:
        """How the tool of a backend prints what we wrote."""
        stored = (self._state.read(_PRINTS) or {}).get(backend.value)
        prints: dict[Family, dict[Table, Learned]] = {}
        for family in Family:
            tables = stored.get(family.value) if isinstance(stored, dict) else None
            if isinstance(tables, dict):
                prints[family] = {Table(t): _learned(v) for t, v in tables.items() if t in set(Table)}
        return prints

    def keep_prints(self, backend: Backend, learned: Mapping[Family, Mapping[Table, Learned]]) -> None:
        """Remember them; the disk is written only when they have changed."""
        now = {
            family.value: {
                table.value: {key: [digest, list(lines)] for key, (digest, lines) in each.prints.items()}
                for table, each in tables.items()
            }
            for family, tables in learned.items()
        }
        stored = self._state.read(_PRINTS) or {}
        if stored.get(backend.value) != now:
            self._state.write(_PRINTS, {**stored, backend.value: now})

    @property
    def sets(self) -> frozenset[str]:
        """The kernel sets that we have made or taken over."""
        names = self._owned().get("sets")
        if not isinstance(names, list):
            return frozenset()
        return frozenset(name for name in names if isinstance(name, str) and _SET_NAME.fullmatch(name))

    def keep_sets(self, names: Iterable[str]) -> None:
        """Remember exactly these."""
        wanted = sorted(names)
        if wanted != sorted(self.sets):
            self._state.write(_OWNED, {**self._owned(), "sets": wanted})

    @property
    def made(self) -> frozenset[Made]:
        """The foreign chains that we have made."""
        entries = self._owned().get("chains")
        return (
            frozenset(made for entry in entries if (made := _made(entry))) if isinstance(entries, list) else frozenset()
        )

    def keep_made(self, chains: Iterable[Made]) -> None:
        """Remember these as well."""
        known = self.made
        wanted = known | set(chains)
        if wanted != known:
            self._state.write(_OWNED, {**self._owned(), "chains": sorted(map(list, wanted))})

    def forget(self) -> None:
        """Forget all but the backend: nothing of ours is in the kernel any more."""
        self._state.remove(_OWNED)
        self._state.remove(_PRINTS)

    def _owned(self) -> dict[str, Any]:
        return self._state.read(_OWNED) or {}


def _learned(value: object) -> Learned:
    """As stored; whatever isn't of that form is left out and learned anew."""
    prints = {}
    for key, entry in value.items() if isinstance(value, dict) else ():
        match entry:
            case [str(digest), [*lines]] if all(isinstance(line, str) for line in lines):
                prints[key] = (digest, tuple(lines))
    return Learned(prints)


def _made(value: object) -> Made | None:
    match value:
        case [str(backend), str(family), str(table), str(chain)]:
            if backend in set(Backend) and family in set(Family) and table in set(Table):
                return Backend(backend), Family(family), Table(table), chain
    return None
