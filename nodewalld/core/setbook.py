"""The content of sets beside their configuration: what was added at run time, and what a set file holds by now.

Laws: an addition belongs to the name of a set, whichever configuration is enforced. A call that asks for several
entries is granted whole, or declined with all that is wrong. Time is seconds of one clock, the caller's.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from nodewalld.core.config import Config, SetEntry, SetFile, Where
from nodewalld.core.words import Network

LONGEST = 366 * 24 * 3600.0
"""The longest term of an addition, in seconds."""

MOST = 65536
"""Additions of all sets together; more belongs into a file."""


@dataclass(frozen=True, slots=True)
class Term:
    """How long an addition stays: until `end`; `seconds` is all the time that it was given."""

    end: float
    seconds: float


Additions = Mapping[str, Mapping[Network, Term | None]]
"""What was added at run time, by the name of the set; without a term it stays for good."""


@dataclass(frozen=True, slots=True)
class Listed:
    """An entry of a set: written in the configuration or a file of the set (`where`), or added at run time."""

    network: Network
    where: Where | None = None
    term: Term | None = None


class Declined(Exception):
    """What was asked can't be done, and nothing was; each problem is a sentence about one entry."""

    def __init__(self, error: str, problems: Iterable[str] = ()) -> None:
        super().__init__(error)
        self.problems = tuple(problems)


def numbered(text: str) -> Iterator[tuple[int, str]]:
    """Each entry of a set file's text with its line; `#` begins a comment."""
    for number, line in enumerate(text.split("\n"), start=1):
        entry = line.partition("#")[0].strip()
        if entry:
            yield number, entry


def filled(config: Config, additions: Additions) -> Config:
    """The configuration with what was added to its sets."""
    sets = tuple(replace(entry, added=tuple(additions.get(entry.name, ()))) for entry in config.sets)
    return replace(config, sets=sets)


def with_file(config: Config, text: str, file: SetFile) -> Config:
    """The configuration as if it had found this in a file of its sets; itself when that is what it found."""
    if config.sources.sets.get(file.path, text) == text:
        return config
    sets = tuple(
        replace(entry, files=tuple(file if file.path == one.path else one for one in entry.files))
        for entry in config.sets
    )
    return replace(config, sets=sets, sources=replace(config.sources, sets={**config.sources.sets, file.path: text}))


def moved(before: Config, after: Config) -> Iterator[tuple[str, int, int]]:
    """The sets that hold something else than before, each with how many entries came, and how many went."""
    for old, new in zip(before.sets, after.sets, strict=True):
        was, now = frozenset(old.members()), frozenset(new.members())
        if was != now:
            yield new.name, len(now - was), len(was - now)


def entries_of(config: Config, additions: Additions, name: str) -> Iterator[Listed]:
    """All that a set holds and where that comes from; an entry may come from several places. Raises Declined."""
    entry = _set_of(config, name)
    yield from (Listed(network, where) for network, where in entry.entries)
    for file in entry.files:
        lines = (number for number, _ in numbered(config.sources.sets.get(file.path, "")))
        yield from (
            Listed(network, Where(file.path, line)) for network, line in zip(file.networks, lines, strict=False)
        )
    yield from (Listed(network, term=term) for network, term in additions.get(name, {}).items())


def _set_of(config: Config, name: str) -> SetEntry:
    for entry in config.sets:
        if entry.name == name:
            return entry
    meant = [entry.name for entry in config.sets if f"@{entry.name}" == name]
    known = ", ".join(entry.name for entry in config.sets) or "none"
    raise Declined(f"there is no set {name} ({f'say {meant[0]}' if meant else f'the configuration has: {known}'})")


def add(
    config: Config, additions: Additions, name: str, networks: Iterable[Network], term: Term | None
) -> dict[str, Mapping[Network, Term | None]]:
    """The additions with these; what was added before has the new term. Raises Declined."""
    _set_of(config, name)
    wanted = dict.fromkeys(networks, term)
    versions = {family.version for family in config.daemon.families}
    foreign = [network for network in wanted if network.version not in versions]
    if foreign:
        raise Declined("nothing was added", (f"{shown(n)}: IPv{n.version} is not in daemon.families" for n in foreign))
    granted = {**additions, name: {**additions.get(name, {}), **wanted}}
    if sum(map(len, granted.values())) > MOST:
        raise Declined(
            f"all sets together take {MOST} entries at run time; put more into a file (files of [set.{name}])"
        )
    return granted


def take_out(
    config: Config, additions: Additions, name: str, networks: Iterable[Network]
) -> dict[str, Mapping[Network, Term | None]]:
    """The additions without these. Raises Declined, also for what the configuration itself holds."""
    _set_of(config, name)
    wanted, held = frozenset(networks), additions.get(name, {})
    strange = [network for network in wanted if network not in held]
    if strange:
        written = _Written(config, name)
        raise Declined("nothing was taken out", sorted(_not_added(network, written) for network in strange))
    return {**additions, name: {network: term for network, term in held.items() if network not in wanted}}


class _Written:
    """What the configuration itself and its files hold in a set, and where. Raises Declined."""

    def __init__(self, config: Config, name: str) -> None:
        self._lines = entries_of(config, {}, name)
        self._networks = frozenset(replace(_set_of(config, name), added=()).members())
        self._lengths = sorted({network.prefixlen for network in self._networks}, reverse=True)

    def holder(self, network: Network) -> tuple[Network, str] | None:
        """The closest entry that holds a network, and its place."""
        for length in self._lengths:
            if length <= network.prefixlen:
                wide = network.supernet(new_prefix=length)
                if wide in self._networks:
                    where = self._places[wide]
                    return wide, f"{where.file}:{where.line}"
        return None

    @cached_property
    def _places(self) -> Mapping[Network, Where]:
        """Made when it is needed: it takes as long as all the rest."""
        return {listed.network: listed.where for listed in self._lines if listed.where}


def _not_added(network: Network, written: _Written) -> str:
    """Why it can't be taken out: whoever wrote it into a file would have it back at the next reload."""
    wide, place = written.holder(network) or (None, "")
    if wide == network:
        return f"{shown(network)}: stands in {place}; take it out there"
    return f"{shown(network)}: was not added at run time" + (f" ({wide} in {place} covers it)" if wide else "")


def still_held(config: Config, name: str, networks: Iterable[Network]) -> tuple[str, ...]:
    """Which of these the configuration holds as well: nothing changes for them when they are taken out."""
    written = _Written(config, name)
    held = ((network, holder) for network in dict.fromkeys(networks) if (holder := written.holder(network)))
    return tuple(
        f"{shown(network)} is still in the set: {shown(wide)} stands in {place}" for network, (wide, place) in held
    )


def shown(network: Network) -> str:
    """As people write it: a single address without its length."""
    return str(network.network_address) if network.prefixlen == network.max_prefixlen else str(network)


def without_ended(additions: Additions, now: float) -> dict[str, Mapping[Network, Term | None]]:
    """Those whose term is not over."""
    return {
        name: {network: term for network, term in held.items() if term is None or term.end > now}
        for name, held in additions.items()
    }


def next_end(additions: Additions) -> float:
    """When the next term is over; infinity when there is none."""
    ends = (term.end for held in additions.values() for term in held.values() if term)
    return min(ends, default=float("inf"))
