"""The daemon's book of set contents: what the files of sets hold by now, and what people have added.

Laws: what is added is on the disk before it is in force, so that no restart misses it. A file that can't be taken whole
changes nothing: what it held before stays, and `reasons` tell why.
"""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from nodewalld.configuration.errors import ConfigError
from nodewalld.configuration.load import load
from nodewalld.configuration.setfiles import read_set, set_files, typed_networks
from nodewalld.core import setbook
from nodewalld.core.config import Config
from nodewalld.core.decide import kernel_set_name
from nodewalld.core.events import duration, rfc3339
from nodewalld.core.setbook import LONGEST, Additions, Declined, Listed, Term
from nodewalld.core.words import Family
from nodewalld.follower import Follower, Found
from nodewalld.service.additions import AdditionStore
from nodewalld.service.wire import Refused

_PROBLEMS_MAX = 20


class SetBook:
    """For the thread of the loop, but for `listing`. `ring` wakes the loop when there is something to `take`."""

    def __init__(self, store: AdditionStore, follower: Follower) -> None:
        self._store, self._follower = store, follower
        self._troubles: dict[str, str] = {}
        self.additions = store.read()
        self._next_end = setbook.next_end(self.additions)

    def __enter__(self) -> Self:
        if self.additions:
            self._store.write(self.additions)  # terms of an earlier boot end in this one's time from now on
        self._follower.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._follower.__exit__(kind, error, trace)

    def filled(self, config: Config) -> Config:
        """A configuration with what was added to its sets."""
        return setbook.filled(config, self.additions)

    # Files

    @property
    def reasons(self) -> tuple[str, ...]:
        """Which files could not be taken, and why."""
        return tuple(self._troubles.values())

    def follow(self, configs: Iterable[Config], *, fresh: bool = False) -> None:
        """Follow the files of these; `fresh`: all were found good just now."""
        paths = {path for config in configs for path in config.sources.sets}
        self._troubles = {} if fresh else {path: why for path, why in self._troubles.items() if path in paths}
        self._follower.follow(paths)

    def take(self) -> tuple[Found, ...]:
        """The files that could be read since the last call, with what they hold."""
        found = self._follower.take()
        self._note(found)
        return tuple(one for one in found if one.file)

    def _note(self, found: Iterable[Found]) -> None:
        for one in found:
            self._troubles.pop(one.path, None)
            if one.problems:
                more = f" (and {len(one.problems) - 1} more)" if len(one.problems) > 1 else ""
                self._troubles[one.path] = f"{one.problems[0]}{more}; what the file held before stays in force"

    def load(self, directory: Path, kept: Mapping[str, str]) -> Config:
        """As `load`, but with the `kept` text of each set file that is bad now. Raises ConfigError."""
        bad = []

        def text(path: str) -> str:
            try:
                return read_set(path)[0]
            except ConfigError as error:
                if path not in kept:
                    return set_files().read(Path(path), check_owner=True)  # as a reload would say what is wrong
                bad.append(Found(path, problems=error.problems))
                return kept[path]

        try:
            return load(directory)
        except ConfigError:
            if not kept:
                raise
        config = load(directory, set_file=text)
        self._note(bad)
        return config

    # Additions

    def change(self, config: Config, args: Mapping[str, Any]) -> dict[str, Any]:
        """Do what `set add` or `set del` asks, but for the kernel; what to tell of it. Raises Refused."""
        name, words, seconds = args.get("name"), args.get("addresses"), args.get("seconds")
        if not isinstance(name, str) or not isinstance(words, list) or not all(isinstance(w, str) for w in words):
            raise Refused("a name and a list of addresses are needed")
        if seconds is not None and (not isinstance(seconds, int | float) or not 0 < seconds <= LONGEST):
            raise Refused(f"the time must be more than 0 and at most {LONGEST / 86400:g} days")
        networks, problems = typed_networks(words)
        if problems or not networks:
            raise Refused("nothing was changed", _some(problems or ("no address was given",)))
        term = Term(self._store.clock() + seconds, float(seconds)) if seconds else None
        notes: tuple[str, ...] = ()
        try:
            if args.get("action") == "add":
                additions = setbook.add(config, self.additions, name, networks, term)
                what = "added at run time" + (f" for {duration(seconds * 1000)}" if seconds else "")
            else:
                additions, what = setbook.take_out(config, self.additions, name, networks), "taken out again"
                notes = _some(setbook.still_held(config, name, networks))
        except Declined as declined:
            raise Refused(str(declined), _some(declined.problems)) from declined
        if not self.keep(additions):
            notes = (*notes, "the disk does not take it, so a restart loses it")
        number = len(set(networks))
        return {"set": name, "entries": number, "what": f"{_entries(number)} {what}", "notes": list(notes)}

    def keep(self, additions: Additions) -> bool:
        """Remember exactly these; whether they are on the disk."""
        self.additions, self._next_end = additions, setbook.next_end(additions)
        return self._store.write(additions)

    @property
    def due(self) -> float:
        """In how many seconds a term is over; infinity when none is."""
        return self._next_end - self._store.clock()

    def expire(self) -> dict[str, str]:
        """Forget what is over; what to tell of it, by the set."""
        return self._drop(setbook.without_ended(self.additions, self._store.clock()), "the time is over for {}")

    def keep_only(self, config: Config) -> dict[str, str]:
        """Forget the additions to sets that a configuration doesn't have; what to tell of it, by the set."""
        names = {entry.name for entry in config.sets}
        kept = {name: held for name, held in self.additions.items() if name in names}
        return self._drop(kept, "the configuration doesn't have it any more, which drops {}")

    def forget(self) -> None:
        """Forget all additions, and follow nothing."""
        self.keep({})
        self.follow(())

    def _drop(self, kept: Additions, what: str) -> dict[str, str]:
        gone = {name: len(held) - len(kept.get(name, {})) for name, held in self.additions.items()}
        told = {n: what.format(f"{_entries(number)} added at run time") for n, number in gone.items() if number}
        if told:
            self.keep(kept)
        return told

    def listing(self, config: Config, name: object) -> list[dict[str, Any]]:
        """What `set list` prints, from frozen values. Raises Refused."""
        additions, ahead = self.additions, datetime.now(UTC) - timedelta(seconds=self._store.clock())
        names = [entry.name for entry in config.sets] if name is None else [str(name)]
        try:
            return [
                {
                    "name": one,
                    "ipsets": {family.value: kernel_set_name(one, family) for family in config.daemon.families},
                    "entries": [_row(listed, ahead) for listed in setbook.entries_of(config, additions, one)],
                }
                for one in names
            ]
        except Declined as declined:
            raise Refused(str(declined)) from declined


def _row(listed: Listed, boot: datetime) -> dict[str, Any]:
    family = Family.IPV4 if listed.network.version == 4 else Family.IPV6
    return {
        "entry": setbook.shown(listed.network),
        "family": family.value,
        "source": "configuration" if listed.where else "run time",
        "file": listed.where and listed.where.file,
        "line": listed.where and listed.where.line,
        "until": listed.term and rfc3339(boot + timedelta(seconds=listed.term.end)),
    }


def _entries(number: int) -> str:
    return f"{number} {'entry' if number == 1 else 'entries'}"


def _some(problems: tuple[str, ...]) -> tuple[str, ...]:
    more = len(problems) - _PROBLEMS_MAX
    return (*problems[:_PROBLEMS_MAX], f"(and {more} more)") if more > 0 else problems
