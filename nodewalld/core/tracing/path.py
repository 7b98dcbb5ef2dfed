"""From what the kernel tells of traced packets, step by step and mixed, to one path for each packet.

Laws: a packet is known by what no NAT changes in it, or by the kernel's own number for it; a step without either
belongs to the packet that the number was last seen with. A path is handed out once, when it has ended: nothing more
was heard of the packet for a while, or it was dropped. The backends tell by channels of their own, each in its order;
where both have told, the hooks' order says what came first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from heapq import merge

from nodewalld.core.shield.rules import TABLE as SHIELD
from nodewalld.core.shield.rules import Stage
from nodewalld.core.tracing.header import Header
from nodewalld.core.words import Backend, Family, Table

QUIET = 0.15
"""Seconds without news of a packet after which its path is taken to have ended."""

_COMING = ("PREROUTING", "INPUT", "FORWARD", "POSTROUTING", "OUTPUT")
_SENT = ("OUTPUT", "POSTROUTING", "PREROUTING", "INPUT", "FORWARD")  # by lo it comes in again
_TABLES = tuple(table.value for table in Table)


class Kind(StrEnum):
    """Why the kernel tells of a place."""

    RULE = "rule"
    RETURN = "return"
    POLICY = "policy"


@dataclass(frozen=True, slots=True)
class Spot:
    """A place in the rules: `tables` is the family of the table in nft's words (ip, ip6, inet ...).

    `number` is the rule's handle (nft) or its number in the chain (legacy).
    """

    backend: Backend
    tables: str
    table: str
    chain: str
    kind: Kind
    number: int


@dataclass(frozen=True, slots=True)
class Sighting:
    """One message of the kernel: a packet has come to a spot.

    `verdict` is as the kernel has it, "" where it doesn't tell; interfaces are names, "" where there is none;
    `identity` is the kernel's number for the packet.
    """

    spot: Spot
    family: Family
    header: Header | None
    verdict: str = ""
    coming: str = ""
    going: str = ""
    mark: int = 0
    identity: int | None = None


@dataclass(slots=True)
class Path:
    """What has been seen of one packet; `began` and `last` as the caller's clock has it.

    `header` and `coming`, the interface, are as it was first seen.
    """

    began: float
    last: float
    header: Header
    coming: str
    sightings: list[Sighting] = field(default_factory=list)
    ended: bool = False


class Paths:
    """Puts sightings together. `start` is the table whose only purpose is to begin a trace; it is not shown.

    `hook` is the chain of table raw in which packets are first seen.
    """

    def __init__(self, hook: str, start: str = "") -> None:
        self._hook, self._start = hook, start
        self._open: list[Path] = []
        self._by_identity: dict[int, Path] = {}

    def add(self, sighting: Sighting, now: float) -> None:
        """Take what the kernel tells; what belongs to no packet of ours is passed over."""
        path = self._find(sighting)
        if path is None:
            if sighting.header is None or not self._may_begin(sighting):
                return
            path = Path(now, now, sighting.header, sighting.coming)
            self._open.append(path)
        path.last = now
        if sighting.identity is not None:
            self._by_identity[sighting.identity] = path
        spot = sighting.spot
        if spot.table == self._start:
            return
        before = path.sightings[-1].spot if path.sightings else None
        if before and spot.kind is Kind.POLICY and before == replace(spot, kind=Kind.RETURN, number=before.number):
            path.sightings.pop()  # nf_tables tells of the end of a base chain and then of its policy
        path.sightings.append(sighting)
        path.ended = sighting.verdict == "drop"

    def _may_begin(self, sighting: Sighting) -> bool:
        """Others may trace packets of their own with nft; legacy has one channel for all, which is ours then."""
        spot = sighting.spot
        return spot.backend is Backend.LEGACY or not self._start or self._is_start(spot)

    def _is_start(self, spot: Spot) -> bool:
        """Whether it is our own rule that matched: what others have traced meets the end of our chain as well."""
        return spot.table == self._start and spot.kind is Kind.RULE

    def _find(self, sighting: Sighting) -> Path | None:
        header = sighting.header
        if header is None:
            return self._by_identity.get(sighting.identity) if sighting.identity is not None else None
        path = next((path for path in reversed(self._open) if path.header.key == header.key), None)
        if path and self._is_back(path, sighting.spot):
            path.ended = True
            return None
        return path

    def _is_back(self, path: Path, spot: Spot) -> bool:
        """Whether this is where packets begin, and the path has been further: then it is another, exactly like it."""
        if self._is_start(spot):
            return bool(path.sightings)
        before = [sighting.spot.table for sighting in path.sightings if sighting.spot.backend is spot.backend]
        return (spot.table, spot.chain) == (Table.RAW, self._hook) and before[-1:] not in ([], [Table.RAW])

    def done(self, now: float, *, all_of_them: bool = False) -> Iterator[Path]:
        """The packets whose paths have ended, each once; in the end all, as far as they came."""
        for path in [path for path in self._open if all_of_them or path.ended or now - path.last >= QUIET]:
            self._open.remove(path)
            self._by_identity = {number: other for number, other in self._by_identity.items() if other is not path}
            path.sightings = self._in_order(path.sightings)
            yield path

    def _in_order(self, sightings: Sequence[Sighting]) -> list[Sighting]:
        hooks = _SENT if self._hook == "OUTPUT" else _COMING
        told = ([s for s in sightings if s.spot.backend is backend] for backend in Backend)
        return [sighting for _, sighting in merge(*(_ranked(each, hooks) for each in told), key=lambda pair: pair[0])]

    @property
    def due(self) -> float:
        """When the next path ends if nothing more is heard; infinity when none is open."""
        return min((path.last if path.ended else path.last + QUIET for path in self._open), default=float("inf"))


def _ranked(sightings: Sequence[Sighting], hooks: Sequence[str]) -> Iterator[tuple[tuple[int, float], Sighting]]:
    """Each with the place of its hook and table; what isn't a chain that a hook asks counts as what was before it."""
    rank = (-1, -1.0)
    for sighting in sightings:
        spot = sighting.spot
        if spot.chain in hooks and spot.table in _TABLES:
            late = spot.table == Table.NAT and spot.chain == "INPUT"  # for source addresses: behind all others
            rank = hooks.index(spot.chain), len(_TABLES) if late else _TABLES.index(spot.table)
        elif spot.table == SHIELD and (hook := spot.chain.removesuffix(Stage.LAST).upper()) in hooks:
            before = len(_TABLES) if spot.chain.endswith(Stage.LAST) else _TABLES.index(Table.MANGLE)
            rank = hooks.index(hook), before - 0.5
        yield rank, sighting
