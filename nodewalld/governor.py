"""Which configuration is enforced: the folder's, the last good one, one on trial, or none for a while.

Laws: whatever is asked, it ends in a configuration that was in force before or is in force now. A refusal changes
nothing. A trial and a pause end by themselves, in this daemon or its successor. What was begun is on the disk before it
is done.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import structlog

from nodewalld.configuration.errors import ConfigError
from nodewalld.configuration.load import load, recall
from nodewalld.core.config import Config, Sources
from nodewalld.core.events import Event, Kind, duration
from nodewalld.core.lockout import Connection, lockouts
from nodewalld.core.setbook import moved, with_file
from nodewalld.kernel.firewall import FirewallError
from nodewalld.reconciler import Reconciler
from nodewalld.reconciler import Refused as KernelRefused
from nodewalld.service.tenure import Tenure
from nodewalld.service.wire import Refused
from nodewalld.setbook import SetBook

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Trial:
    """A configuration on trial: what it goes back to, and when (seconds since the boot)."""

    config: Config
    before: Config
    until: float


class Governor:
    """Takes what people ask for; for the thread of the loop. Raises wire.Refused, with problems, to say no."""

    def __init__(
        self, directory: Path, reconciler: Reconciler, tenure: Tenure, book: SetBook, record: Callable[[Event], None]
    ) -> None:
        self._directory, self._reconciler, self._tenure, self._record = directory, reconciler, tenure, record
        self._book = book
        self.config = Config(str(directory))
        self.generation = 0
        self.loaded_at = datetime.now(UTC)
        self.error = ""
        self.fallback = ""
        self.idle = False
        self.owed = True
        self.trial: Trial | None = None
        self.paused_until: float | None = None
        self._noted: Config | None = None

    # The start

    def choose(self) -> None:
        """Decide what to begin with. Raises ConfigError when there is nothing good to enforce."""
        self.paused_until = self._tenure.pause
        self.config = self._choose_from_folder()
        self._choose_trial()
        self._follow()

    def _choose_trial(self) -> None:
        stored = self._tenure.trial
        if stored is None:
            return
        on_trial = _recalled(stored.sources) if stored.until > self._tenure.clock() else None
        if on_trial is None:
            self._tenure.end_trial(confirmed=False)
            self.config = self._choose_from_folder()
            return
        good = self._tenure.good
        before = (_recalled(good.sources) if good else None) or self.config
        self.config = on_trial
        self.trial = Trial(on_trial, before, stored.until)

    def _choose_from_folder(self) -> Config:
        good = self._tenure.good
        try:
            config = self._book.load(self._directory, good.sources.sets if good else {})
        except ConfigError as error:
            kept = _recalled(good.sources) if good else None
            if good is None or kept is None:
                raise
            self.error = _in_short(tuple(map(str, error.problems)))
            self.fallback = f"{self.error}; the last good configuration, of {good.time}, is enforced"
            return kept
        kept = _recalled(good.sources) if good and self._tenure.is_unconfirmed(config.sources) else None
        if good and kept:
            self.fallback = (
                f"the configuration in {self._directory} was tried and not confirmed, so the one before it, of "
                f"{good.time}, is enforced; `nodewallctl reload` takes it all the same"
            )
            return kept
        return config

    def start(self) -> None:
        """Try to bring the chosen configuration into force; while it is `owed`, `error` tells what is in the way."""
        self.generation = max(self.generation, 1)
        self._tell_sets(self._book.expire())
        if self.paused_until is not None:
            return
        self.owed = True
        try:
            self._reconciler.enforce(self._book.filled(self.config), strict=False)
        except (FirewallError, KernelRefused, OSError) as error:
            self.error = str(error)
            return
        self.owed = self._reconciler.blocked  # others hold a lock: begun is not done
        if not self.fallback:
            self.error = ""
        if self.trial is None and self._tenure.good is None:  # what is not wholly in force is better than nothing
            self._tenure.enforced(self.config.sources)
        self.note_good()

    def note_good(self) -> None:
        """Remember what is wholly in force, now or since what was in its way has gone, as the last good one."""
        if self._noted is not self.config and self.trial is None and not self.owed and self._reconciler.in_force:
            self._is_good(self.config)

    def _is_good(self, config: Config) -> tuple[str, ...]:
        """A configuration is in force for good; what was dropped of the sets that it doesn't have."""
        self._tenure.enforced(config.sources)
        self._noted = config
        dropped = self._book.keep_only(config)
        self._tell_sets(dropped)
        return tuple(f"set {name}: {what}" for name, what in dropped.items())

    # What people ask for

    def reload(self, connection: Connection | None = None) -> dict[str, Any]:
        """Take the folder's configuration; "warnings" tell what of it shuts the connection that asks."""
        self._refuse_while_paused()
        try:
            config = load(self._directory)
            changed = self._enforce(config)
        except (ConfigError, Refused) as refused:
            problems = refused.problems if isinstance(refused, Refused) else tuple(map(str, refused.problems))
            self.error = _in_short(problems)
            self._tell(Kind.REFUSED, f"the configuration was refused, the old rules stand: {self.error}")
            raise Refused("the configuration was refused; the old rules stand", problems) from refused
        self._tenure.end_trial(confirmed=True)
        self._tenure.forgive()
        self.trial, self.fallback = None, ""
        self._tell(Kind.RELOAD, "the configuration was reloaded" + ("" if changed else "; nothing had to change"))
        self._follow(fresh=True)
        dropped = self._is_good(config)
        return {
            "generation": self.generation,
            "changed": changed,
            "warnings": [*self._shut(config, connection), *dropped],
        }

    def begin_trial(
        self, directory: Path, seconds: float, connection: Connection | None, *, yes: bool
    ) -> dict[str, Any]:
        """Enforce another folder's configuration until it is confirmed, or for so long."""
        self._refuse_while_paused()
        if self.trial:
            raise Refused("a trial is under way already; `nodewallctl confirm` or `nodewallctl revert` ends it")
        if self.idle:
            raise Refused("nothing is enforced to go back to; `nodewallctl reload` first")
        try:
            config = load(directory)
        except ConfigError as error:
            raise Refused("the configuration was refused", tuple(map(str, error.problems))) from error
        shut = self._shut(config, connection)
        if shut and not yes:
            raise Refused("this would shut the connection that you are using; `--yes` tries it all the same", shut)
        before = self.config
        until = self._tenure.begin_trial(config.sources, seconds)
        if until is None:
            raise Refused("the deadline could not be written to the state folder, so no trial was begun")
        try:
            self._enforce(config)
        except Refused:
            self._tenure.end_trial(confirmed=True)
            raise
        self.trial = Trial(config, before, until)
        self._follow(fresh=True)
        self._tell(Kind.RELOAD, f"{directory} is on trial for {duration(seconds * 1000)}, until it is confirmed")
        return {"generation": self.generation, "until": self._wall(until), "warnings": list(shut)}

    def confirm(self) -> dict[str, Any]:
        """Keep what is on trial."""
        trial = self._trial_or_refuse()
        self._tenure.enforced(trial.config.sources)
        self._tenure.end_trial(confirmed=True)
        self.trial, self.fallback, self.error = None, "", ""
        self._tell(Kind.RELOAD, "the configuration on trial was confirmed")
        self._follow()
        elsewhere = trial.config.path != str(self._directory)
        note = f"copy it to {self._directory}, or the next reload or restart takes what is there" if elsewhere else ""
        return {"generation": self.generation, "note": note}

    def revert(self, why: str = "the trial was reverted") -> dict[str, Any]:
        """Go back to what was enforced before the trial."""
        trial = self._trial_or_refuse()
        self._tenure.end_trial(confirmed=False)
        self.trial = None
        self._took(trial.before)
        self._follow()
        self.start()
        self._tell(Kind.RELOAD, f"{why}: the configuration before it is enforced again")
        return {"generation": self.generation}

    def pause(self, seconds: float) -> dict[str, Any]:
        """Take the rules out for a while."""
        if self.trial:
            raise Refused("a trial is under way; `nodewallctl confirm` or `nodewallctl revert` ends it first")
        until = self._tenure.begin_pause(seconds)
        if until is None:
            raise Refused("the end of the pause could not be written to the state folder, so it was not begun")
        try:
            removed = self._remove_all()
        except Refused:
            self._tenure.end_pause()
            self.start()
            raise
        self.paused_until = until
        self._tell(Kind.REMOVE, f"paused for {duration(seconds * 1000)}: {removed['rules']} rules were taken out")
        return {"until": self._wall(until), "removed": removed}

    def resume(self, why: str = "resumed") -> dict[str, Any]:
        """End the pause."""
        if self.paused_until is None:
            raise Refused("there is no pause")
        self._tenure.end_pause()
        self.paused_until = None
        self.start()
        self._tell(Kind.RELOAD, f"{why}: the rules are enforced again")
        return {"generation": self.generation}

    def remove(self) -> dict[str, Any]:
        """Let go of everything until a reload."""
        self._tenure.end_pause()
        self._tenure.end_trial(confirmed=True)
        self.paused_until, self.trial = None, None
        self.idle, self.owed = True, False
        self._book.forget()
        removed = self._remove_all()
        self._tell(Kind.REMOVE, f"all rules were taken out of the kernel: {removed['rules']} rules")
        return {"removed": removed}

    def _remove_all(self) -> dict[str, int]:
        try:
            return self._reconciler.remove()
        except KernelRefused as error:
            raise Refused("some of our rules could not be taken out and are still there", error.problems) from error

    # The content of sets

    def follow_files(self) -> None:
        """Bring into force what the files of sets hold now."""
        before = self.config
        for found in self._book.take():
            if found.file:
                self.config = with_file(self.config, found.text, found.file)
                if self.trial:
                    past = with_file(self.trial.before, found.text, found.file)
                    self.trial = replace(self.trial, config=self.config, before=past)
        if self.config is not before:
            changes = {
                name: f"its files changed: {came} came, {went} went" for name, came, went in moved(before, self.config)
            }
            if changes:
                self._tell_sets(changes, self._refill(strict=False))

    def change_set(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """Add entries to a set, or take such out again."""
        if self.idle:
            raise Refused("nothing is enforced; `nodewallctl reload` first")
        before = self._book.additions
        told = self._book.change(self.config, args)
        try:
            cut = self._refill(strict=True)
        except KernelRefused as error:
            self._book.keep(before)
            raise Refused("the kernel refused it; the set is as before", error.problems) from error
        self._tell_sets({told["set"]: told["what"]}, cut)
        if self.owed or self.paused_until is not None:
            told["notes"].append("it takes effect when the rules are in force again")
        return told

    def list_sets(self, name: object) -> list[dict[str, Any]]:
        """What sets hold; for any thread."""
        return self._book.listing(self.config, name)

    def _refill(self, *, strict: bool) -> int:
        """Returns the number of flows that were cut. What is owed comes into force whole, and with it the sets."""
        return 0 if self.owed else self._reconciler.refill(self._book.filled(self.config), strict=strict)

    def _follow(self, *, fresh: bool = False) -> None:
        self._book.follow((self.config, self.trial.before) if self.trial else (self.config,), fresh=fresh)

    def _tell_sets(self, changes: Mapping[str, str], flows_cut: int = 0) -> None:
        """One event for each set; the flows that were cut are told with the first."""
        for name, what in changes.items():
            told = Event(time=datetime.now(UTC), kind=Kind.SET, what=f"set {name}: {what}", entries=(f"set/{name}",))
            self._record(replace(told, flows_deleted=flows_cut))
            flows_cut = 0

    # Time

    @property
    def due(self) -> float:
        """In how many seconds something ends by itself; infinity when nothing does."""
        ends = [self.trial.until] if self.trial else []
        ends += [self.paused_until] if self.paused_until is not None else []
        ending = min(ends) - self._tenure.clock() if ends else float("inf")
        return min(ending, self._book.due)

    def expire(self) -> None:
        """End what is over."""
        now = self._tenure.clock()
        if self._book.due <= 0:
            over = self._book.expire()
            self._tell_sets(over, self._refill(strict=False))
        if self.trial and now >= self.trial.until:
            self.revert("the trial was not confirmed in time")
        if self.paused_until is not None and now >= self.paused_until:
            self.resume("the pause is over")

    # Within

    def _enforce(self, config: Config) -> bool:
        """All or nothing. Raises Refused."""
        try:
            changed = self._reconciler.enforce(self._book.filled(config))
        except KernelRefused as error:
            raise Refused("the kernel refused the configuration; the old rules stand", error.problems) from error
        except (FirewallError, OSError) as error:
            raise Refused("the configuration could not be enforced; the old rules stand", (str(error),)) from error
        self._took(config)
        return changed

    def _shut(self, config: Config, connection: Connection | None) -> tuple[str, ...]:
        """What of a configuration shuts the connection that asks for it."""
        if connection is None:
            return ()
        return tuple(map(str, lockouts(self._book.filled(config), self._reconciler.environment(), connection)))

    def _took(self, config: Config) -> None:
        self.config, self.error, self.idle, self.owed = config, "", False, False
        self.generation += 1
        self.loaded_at = datetime.now(UTC)

    def _refuse_while_paused(self) -> None:
        if self.paused_until is not None:
            raise Refused(f"paused until {self._wall(self.paused_until)}; `nodewallctl resume` first")

    def _trial_or_refuse(self) -> Trial:
        if self.trial is None:
            raise Refused("there is no trial")
        return self.trial

    def _wall(self, until: float) -> str:
        end = datetime.now(UTC) + timedelta(seconds=until - self._tenure.clock())
        return end.isoformat(timespec="seconds").replace("+00:00", "Z")

    @property
    def reasons(self) -> tuple[str, ...]:
        """What of the choice itself, and of the files of sets, is worth a person's attention."""
        told = [self.fallback] if self.fallback else []
        if self.error and self.owed:
            told.append(self.error)
        return (*told, *self._book.reasons)

    @property
    def note(self) -> str:
        """A sentence about a trial or a pause that is under way."""
        if self.trial:
            return f"on trial until {self._wall(self.trial.until)}"
        return f"paused until {self._wall(self.paused_until)}" if self.paused_until is not None else ""

    def _tell(self, kind: Kind, what: str) -> None:
        cut = self._reconciler.flows_cut if kind is Kind.RELOAD else 0
        self._record(Event(time=datetime.now(UTC), kind=kind, what=what, flows_deleted=cut))


def _recalled(sources: Sources) -> Config | None:
    """What the state folder holds; None, with a warning, when it is damaged or no longer makes a configuration."""
    try:
        return recall(sources)
    except ConfigError as error:
        words = _in_short(tuple(map(str, error.problems)))
        _log.warning(f"A configuration kept in the state folder is of no use any more: {words}; going on without it")
        return None


def _in_short(problems: tuple[str, ...]) -> str:
    return problems[0] if len(problems) == 1 else f"{problems[0]} (and {len(problems) - 1} more)"
