"""Keeps the shield: the refusals of a configuration in a table of our own, beside those in iptables.

Laws: it only ever adds to what iptables refuses, so where it fails the rules are as they would be without it, and that
is told. An owned table can be changed by nobody else, and is looked at with each full check; a plain one is looked at
after every foreign transaction, and put back whole.
"""

import errno
import os
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Protocol

from nodewalld.core.blame import Wake
from nodewalld.core.config import ShieldMode
from nodewalld.core.decide import Decisions
from nodewalld.core.events import SHIELD, Count, Event, Kind, Reason, ShieldState, ShieldStatus
from nodewalld.core.shield.render import render
from nodewalld.core.shield.rules import TABLE, Shield
from nodewalld.core.words import Family
from nodewalld.kernel.nftshield import OWNED, PLAIN, ShieldTable, stamp

PLAIN_VARIABLE = "NODEWALLD_PLAIN_SHIELD"
"""In the environment: do as on a kernel that knows no owners of tables. For tests of just that."""

_NO_NF_TABLES = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT})
_NOTHING = Shield()
_NOTE = "shield"


class Notes(Protocol):
    """What outlives the daemon."""

    def read(self, name: str) -> Mapping[str, Any] | None:
        """What was written under a name; None when there is nothing."""

    def write(self, name: str, value: Mapping[str, object]) -> bool:
        """Keep this under a name; whether it could be."""


class ShieldError(Exception):
    """The shield is required, and can't be had: the system's fault, in a sentence."""


class ShieldKeeper:
    """For one thread. `error` tells why the table is not as it should be; "" when it is.

    `notes` are kept for the next daemon, which need not write a table that stands as this one left it.
    """

    def __init__(self, notes: Notes, clock: Callable[[], float] = time.monotonic) -> None:
        self._notes, self._clock = notes, clock
        self._table: ShieldTable | None = None
        self._mode = ShieldMode.OFF
        self._wanted = _NOTHING
        self._seen: tuple[int, bytes] = 0, b""
        self._sound = clock()
        self._unavailable = False
        self.error = ""

    # What there is to tell

    @property
    def status(self) -> ShieldStatus:
        """How it stands."""
        return ShieldStatus(self._mode.value, self._state(), self._wanted.rules, self._wanted.iptables_only)

    def _state(self) -> ShieldState:
        if self._mode is ShieldMode.OFF:
            return ShieldState.OFF
        if self.error or self._unavailable:
            return ShieldState.FAILING if self.error else ShieldState.UNAVAILABLE
        if not self._wanted.rules or self._table is None:
            return ShieldState.EMPTY
        return ShieldState.OWNED if self._table.flags else ShieldState.GUARDED

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it is not in force as meant; empty when it is."""
        return (f"shield: {self.error}",) if self.error else ()

    @property
    def is_open(self) -> bool:
        """Whether it stands in a table that others can change."""
        return self._table is not None and not self._table.flags and bool(self._wanted.rules)

    @property
    def own_ports(self) -> frozenset[int]:
        """The port id of our writer, by which events know it."""
        return frozenset({self._table.port}) if self._table else frozenset()

    def counts(self) -> Iterator[Count]:
        """What the rules that refuse have seen."""
        if self._table is None or not self._wanted.rules:
            return
        for tally in self._table.tallies():
            family = next((family for family in Family if tally.chain.startswith(f"{family}-")), None)
            if tally.packets is not None and tally.octets is not None and family:
                yield Count(family, SHIELD, tally.chain, tally.entry, "DROP", tally.packets, tally.octets)

    # Enforcing

    def enforce(self, mode: ShieldMode, decisions: Mapping[Family, Decisions]) -> None:
        """Bring these decisions into the shield. Raises ShieldError where it is required and can't be had."""
        before, self._mode = self._mode, mode
        wanted = _NOTHING if mode is ShieldMode.OFF else render(decisions)
        afresh = before is ShieldMode.OFF or self.error or stamp(wanted) != stamp(self._wanted)
        old, self._wanted = self._wanted, wanted
        try:
            if not wanted.rules:
                self._opened().remove()
            elif afresh:
                self._write()
            else:
                changed = [s for s, b in zip(wanted.sets, old.sets, strict=True) if s.networks != b.networks]
                self._opened().refill(changed)
            self.error, self._unavailable = "", False
        except OSError as error:
            self._failed(error)
        if mode is ShieldMode.REQUIRE and (self.error or self._unavailable):
            raise ShieldError(
                f"the shield is required, and can't be had: {self.error or 'no nf_tables in this kernel'}"
            )

    def _failed(self, error: OSError) -> None:
        self._unavailable = error.errno in _NO_NF_TABLES and not _has_nf_tables()
        self.error = "" if self._unavailable else str(error)

    def _opened(self) -> ShieldTable:
        if self._table is None:
            self._table = ShieldTable(PLAIN if os.environ.get(PLAIN_VARIABLE) else OWNED)
        return self._table

    def _write(self) -> None:
        """Have the whole table, and find it as it was written."""
        table = self._opened()
        if not self._take_over():
            table.write(self._wanted, stamp(self._wanted))
        if not table.is_mine(table.held()) or not table.holds_rules(self._wanted):
            raise OSError(errno.EIO, f"table inet {TABLE} does not hold what was written")
        self._note()

    def _take_over(self) -> bool:
        """Whether the table stands as a daemon before this one left it, and is this one's now."""
        table = self._opened()
        held, noted = table.held(), (self._notes.read(_NOTE) or {}).get("fingerprint")
        if held is None or not table.may_adopt(held) or table.about() != stamp(self._wanted):
            return False
        if table.fingerprint().hex() != noted or not table.holds_sets(self._wanted):
            return False
        table.take_over()
        return True

    def _note(self) -> None:
        """Remember what the sound table looks like."""
        table = self._opened()
        self._seen, self._sound = (table.generation(), table.fingerprint()), self._clock()
        noted = {"fingerprint": self._seen[1].hex()}
        if self._notes.read(_NOTE) != noted:
            self._notes.write(_NOTE, noted)

    # Guarding

    def wake(self, wake: Wake) -> tuple[Event, ...]:
        """After a foreign transaction: put a plain table right; an owned one can't have been touched."""
        return self._guard(wake, full=False) if self.is_open and not self.error else ()

    def check(self, wake: Wake) -> tuple[Event, ...]:
        """The full check, with what the sets hold; and what failed before is tried again."""
        if self._unavailable or not self._wanted.rules:
            return ()
        return self._guard(wake, full=True)

    def _guard(self, wake: Wake, *, full: bool) -> tuple[Event, ...]:
        try:
            wrong = self._wrong(full=full)
            if wrong is None:
                return ()
            since = wake.noticed if wake.exact else self._sound
            self._opened().forget()
            self._write()
        except OSError as error:
            self._failed(error)
            return ()
        failed, self.error = self.error, ""
        return () if failed else (self._repair(wake, wrong, since),)

    def _wrong(self, *, full: bool) -> Reason | None:
        """What is wrong with the table; None when it is right."""
        table = self._opened()
        if self.error:
            return Reason.CHANGED
        if table.flags:
            return self._head_wrong()
        generation = table.generation()
        if generation == self._seen[0] and not full:
            return None
        if wrong := self._head_wrong():
            return wrong
        if table.fingerprint() != self._seen[1] or (full and not table.holds_sets(self._wanted)):
            return Reason.CHANGED
        self._seen, self._sound = (generation, self._seen[1]), self._clock()
        return None

    def _head_wrong(self) -> Reason | None:
        held = self._opened().held()
        if held is None:
            return Reason.MISSING
        return None if self._opened().is_mine(held) else Reason.CHANGED

    def _repair(self, wake: Wake, reason: Reason, since: float) -> Event:
        by = next(iter((wake.who() or wake.later())[-1:]), None)
        now = self._clock()
        return Event(
            time=datetime.now(UTC),
            kind=Kind.REPAIR,
            what="put back the shield",
            chain=f"inet {TABLE}",
            reason=reason,
            by=by,
            exposed_ms=round((now - since) * 1000, 3),
            latency_ms=round((now - wake.noticed) * 1000, 3) if wake.exact else None,
        )

    # Taking it out

    def remove(self) -> bool:
        """Take the table out, whoever of ours made it; whether there was one. Raises OSError when it stays."""
        self._mode, self._wanted, self.error = ShieldMode.OFF, _NOTHING, ""
        try:
            return self._opened().remove()
        except OSError:
            if _has_nf_tables():
                raise
            return False


def _has_nf_tables() -> bool:
    """Whether this kernel answers for nf_tables at all."""
    try:
        table = ShieldTable()
        try:
            table.generation()
        finally:
            table.close()
    except OSError:
        return False
    return True
