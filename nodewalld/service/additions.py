"""What outlives the daemon of the entries that were added to sets at run time.

Laws: within one boot a term ends at so many seconds since the boot, so that no clock change moves it. The next boot
goes by the wall clock, and however that was set, an entry lives no longer than its whole term once more. What is
damaged counts as not there, and is told.
"""

import time
from collections.abc import Callable
from ipaddress import ip_network
from typing import Any

import structlog

from nodewalld.core.setbook import LONGEST, Additions, Term
from nodewalld.core.words import Network
from nodewalld.service.state import StateFolder
from nodewalld.service.tenure import boot_id, since_boot

_log = structlog.get_logger(__name__)

_ADDITIONS = "additions"


class AdditionStore:
    """The additions in the state folder; `clock` gives seconds since the boot, `wall` those since 1970."""

    def __init__(
        self,
        state: StateFolder,
        *,
        clock: Callable[[], float] = since_boot,
        wall: Callable[[], float] = time.time,
        boot: Callable[[], str] = boot_id,
    ) -> None:
        self._state, self.clock, self._wall, self._boot = state, clock, wall, boot()

    def read(self) -> Additions:
        """What was added, with terms in this boot's seconds; those that are over are still in it."""
        stored = self._state.read(_ADDITIONS) or {}
        same_boot = bool(self._boot) and stored.get("boot") == self._boot
        additions: dict[str, dict[Network, Term | None]] = {}
        sets = stored.get("sets", {})
        damaged = [] if isinstance(sets, dict) else [sets]
        for name, held in sets.items() if isinstance(sets, dict) else ():
            for written, term in held.items() if isinstance(held, dict) else [("", held)]:
                try:
                    additions.setdefault(name, {})[ip_network(written)] = self._term(term, same_boot=same_boot)
                except (ValueError, OverflowError):
                    damaged.append(written)
        if damaged:
            _log.warning(f"{len(damaged)} of the entries added to sets are damaged in {self._state.path}; left out")
        return additions

    def _term(self, value: Any, *, same_boot: bool) -> Term | None:
        """A term as it was written. Raises ValueError."""
        match value:
            case None:
                return None
            case [int() | float() as end, int() | float() as wall, int() | float() as seconds]:
                now = self.clock()
                left = end - now if same_boot else wall - self._wall()
                return Term(now + min(left, seconds, LONGEST), seconds)
        raise ValueError("no term")

    def write(self, additions: Additions) -> bool:
        """Remember exactly these; whether they are on the disk."""
        kept = {name: held for name, held in additions.items() if held}
        if not kept:
            return self._state.remove(_ADDITIONS)
        ahead = self._wall() - self.clock()
        sets = {
            name: {str(n): [term.end, term.end + ahead, term.seconds] if term else None for n, term in held.items()}
            for name, held in kept.items()
        }
        return self._state.write(_ADDITIONS, {"boot": self._boot, "sets": sets})
