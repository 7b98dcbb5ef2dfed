"""A reconciler with a shield: iptables first, then the shield of the same decisions.

Law: where the shield is required and can't be had, the configuration is refused, and the one before it stands again.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from nodewalld.core.blame import Wake
from nodewalld.core.config import Config, ShieldMode
from nodewalld.core.decide import Decisions
from nodewalld.core.events import Count, Event, ShieldStatus
from nodewalld.core.words import Family
from nodewalld.reconciler import Reconciler, Refused
from nodewalld.service.state import StateFolder
from nodewalld.shield import ShieldError, ShieldKeeper

_Followed = tuple[ShieldMode, Mapping[Family, Decisions]]


class ShieldedReconciler(Reconciler):
    """See `Reconciler`; everything that is asked of it, the shield does as well."""

    def __init__(self, *, state: StateFolder, clock: Callable[[], float] = time.monotonic, **parts: Any) -> None:
        super().__init__(state=state, clock=clock, **parts)
        self._shield = ShieldKeeper(state, clock)
        self._followed: _Followed | None = None

    @property
    def shield(self) -> ShieldStatus:
        """How the shield stands."""
        return self._shield.status

    @property
    def attentive(self) -> bool:
        """Whether any foreign transaction may have changed the shield."""
        return self._shield.is_open

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why not everything is in force as meant, in iptables or in the shield."""
        return (*super().reasons, *self._shield.reasons)

    @property
    def in_force(self) -> bool:
        """Whether every rule that can be written stands right."""
        return super().in_force and not self._shield.error

    def take_own_ports(self) -> frozenset[int]:
        """Those of the shield's writer as well."""
        return super().take_own_ports() | self._shield.own_ports

    def counts(self) -> tuple[Count, ...]:
        """What our rules have seen, in iptables and in the shield."""
        return (*super().counts(), *self._shield.counts())

    def enforce(self, config: Config, *, strict: bool = True) -> bool:
        """Bring a configuration into force; see the module for what is refused."""
        before = self.config
        changed = super().enforce(config, strict=strict)
        try:
            self._follow_decisions()
        except ShieldError as error:
            if strict and before is not None:
                super().enforce(before, strict=False)
                self._follow_quietly()
            raise Refused([str(error)]) from error
        return changed

    def refill(self, config: Config, *, strict: bool) -> int:
        """Bring other contents of the sets into force, in both."""
        cut = super().refill(config, strict=strict)
        self._follow_quietly()
        return cut

    def relink(self) -> None:
        """Links, addresses or routes have changed: decide anew for both."""
        super().relink()
        self._follow_quietly()

    def _follow_decisions(self) -> None:
        """Bring what iptables holds into the shield. Raises ShieldError."""
        if self._world is None or self.config is None:
            return
        followed = self.config.daemon.shield, self._world.decisions
        if self._followed is None or self._shield.error or not _same(self._followed, followed):
            self._followed = followed
            self._shield.enforce(*followed)

    def _follow_quietly(self) -> None:
        with suppress(ShieldError):  # its error is among the reasons
            self._follow_decisions()

    def wake(self, wake: Wake, *, retry: bool = False) -> tuple[Event, ...]:
        """Look at the shield, which may leak nothing, before all else."""
        repairs = self._shield.wake(wake)
        for event in repairs:
            self._record(event)
        return (*repairs, *super().wake(wake, retry=retry))

    def resync(self) -> tuple[Event, ...]:
        """The full check of both."""
        repairs = self._shield.check(Wake(self._sound, exact=False))
        for event in repairs:
            self._record(event)
        return (*repairs, *super().resync())

    def remove(self) -> dict[str, int]:
        """Take everything of ours out of the kernel. Raises Refused when something is still there."""
        self._followed, problems = None, []
        try:
            self._shield.remove()
        except OSError as error:
            problems.append(f"the shield: {error}")
        try:
            removed = super().remove()
        except Refused as refused:
            raise Refused([*problems, *refused.problems]) from refused
        if problems:
            raise Refused(problems)
        return removed


def _same(one: _Followed, other: _Followed) -> bool:
    """Whether it is the very same: decisions are made anew when anything may have changed."""
    return one[0] is other[0] and one[1] is other[1]
