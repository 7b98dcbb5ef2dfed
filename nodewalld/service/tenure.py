"""What outlives the daemon about *which* configuration is enforced: the last good one, a trial, a pause.

Laws: a deadline is kept as seconds since the boot and the boot's id, so that no clock change moves it and a reboot ends
it. What was tried and not confirmed is known by its content, so that no restart brings it back unasked.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nodewalld.core.config import Sources
from nodewalld.service.state import StateFolder

LONGEST = 7 * 24 * 3600.0
"""The longest trial or pause, in seconds."""

_GOOD, _TRIAL, _PAUSE, _UNCONFIRMED = "last-good", "trial", "pause", "unconfirmed"


@dataclass(frozen=True, slots=True)
class Good:
    """The configuration that was in force last, and when it came into force."""

    sources: Sources
    time: str


@dataclass(frozen=True, slots=True)
class Trial:
    """A configuration that is enforced for a while; `until` in seconds since the boot."""

    sources: Sources
    until: float


def boot_id(proc: Path = Path("/proc")) -> str:
    """The id of this boot (random(4)), and when its first process began; without /proc every start counts as a boot.

    A container that boots has the kernel's id each time (nspawn's own one is hidden by the unit's sandbox), but another
    first process.
    """
    try:
        kernel = (proc / "sys/kernel/random/boot_id").read_text().strip()
        began = (proc / "1/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
    return f"{kernel}/{began}"


def since_boot() -> float:
    """Seconds since the boot, suspended ones included; nobody can set this clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def digest(sources: Sources) -> str:
    """A name for exactly these texts; not for the content of set files, which is followed whatever is enforced."""
    return hashlib.sha256(json.dumps(list(sources.texts.items())).encode()).hexdigest()


class Tenure:
    """The memory of the state folder; what can't be read counts as not there."""

    def __init__(
        self, state: StateFolder, *, clock: Callable[[], float] = since_boot, boot: Callable[[], str] = boot_id
    ) -> None:
        self._state, self.clock, self._boot = state, clock, boot()

    @property
    def good(self) -> Good | None:
        """The last good configuration."""
        stored = self._state.read(_GOOD) or {}
        sources = _sources(stored.get("sources"))
        return Good(sources, str(stored.get("time", ""))) if sources else None

    def enforced(self, sources: Sources) -> None:
        """This configuration is in force for good: it is what a failing successor falls back to."""
        good = self.good
        if good is None or good.sources != sources:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            self._state.write(_GOOD, {"time": now, "sources": _json(sources)})

    @property
    def trial(self) -> Trial | None:
        """The trial that was begun, also one whose time is over; one of an earlier boot is over."""
        stored = self._state.read(_TRIAL) or {}
        sources = _sources(stored.get("sources"))
        return Trial(sources, self._until(stored)) if sources else None

    def begin_trial(self, sources: Sources, seconds: float) -> float | None:
        """Remember a trial; when it ends, in seconds since the boot. None when the disk doesn't take it."""
        return self._begin(_TRIAL, seconds, {"sources": _json(sources)})

    def end_trial(self, *, confirmed: bool) -> None:
        """Forget the trial; an unconfirmed one is remembered as that."""
        trial = self.trial
        if trial and not confirmed:
            self._state.write(_UNCONFIRMED, {"digest": digest(trial.sources)})
        self._state.remove(_TRIAL)

    def is_unconfirmed(self, sources: Sources) -> bool:
        """Whether exactly this configuration was tried last, and not confirmed."""
        return (self._state.read(_UNCONFIRMED) or {}).get("digest") == digest(sources)

    def forgive(self) -> None:
        """Somebody has asked for the configuration in so many words."""
        self._state.remove(_UNCONFIRMED)

    @property
    def pause(self) -> float | None:
        """When the pause ends, in seconds since the boot; None when there is none."""
        stored = self._state.read(_PAUSE)
        until = self._until(stored) if stored else 0.0
        return until if until > self.clock() else None

    def begin_pause(self, seconds: float) -> float | None:
        """Remember a pause; when it ends. None when the disk doesn't take it."""
        return self._begin(_PAUSE, seconds, {})

    def end_pause(self) -> None:
        """Forget the pause."""
        self._state.remove(_PAUSE)

    def _begin(self, name: str, seconds: float, more: dict[str, Any]) -> float | None:
        until = self.clock() + seconds
        if self._state.write(name, {"boot": self._boot, "until": until, **more}):
            return until
        self._state.remove(name)  # nor may it be written later, when nobody wants it any more
        return None

    def _until(self, stored: dict[str, Any]) -> float:
        """0, long over, for what no daemon of this boot can have written."""
        until = stored.get("until")
        same_boot = bool(self._boot) and stored.get("boot") == self._boot
        if not same_boot or not isinstance(until, int | float) or not 0 <= until <= self.clock() + LONGEST:
            return 0.0
        return float(until)


def _json(sources: Sources) -> dict[str, Any]:
    return {"directory": sources.directory, "texts": dict(sources.texts), "sets": dict(sources.sets)}


def _sources(value: Any) -> Sources | None:
    match value:
        case {"directory": str(directory), "texts": dict(texts), "sets": dict(sets)}:
            if all(isinstance(text, str) for text in (*texts.values(), *sets.values())):
                return Sources(directory, texts, sets)
    return None
