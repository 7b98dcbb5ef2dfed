"""What becomes of a packet, and how: the answer of `judge`, as values to print, to count and to compare."""

from dataclasses import dataclass
from enum import StrEnum

from nodewalld.core.shield.rules import Stage
from nodewalld.core.words import Backend, Table
from nodewalld.walk.packet import Packet, State
from nodewalld.walk.rules import Rule
from nodewalld.walk.table import Hit, Supposed
from nodewalld.walk.world import SHIELD


class Outcome(StrEnum):
    """How a way ends."""

    DELIVERED = "delivered"
    """To this node's own programs."""
    FORWARDED = "forwarded"
    """Out by another interface."""
    SENT = "sent"
    """Out, from a program of this node."""
    DROPPED = "dropped"
    REJECTED = "rejected"
    UNKNOWN = "unknown"


PASSES = frozenset({Outcome.DELIVERED, Outcome.FORWARDED, Outcome.SENT})
STOPS = frozenset({Outcome.DROPPED, Outcome.REJECTED})


@dataclass(frozen=True, slots=True)
class Step:
    """One table, or one decision of the kernel, that a packet passed.

    `place` names a base chain that isn't iptables'; without table and place it is the kernel's, told by `text`.
    """

    hook: str
    state: State
    """As it left."""
    backend: Backend | None = None
    table: Table | None = None
    hits: tuple[Hit, ...] = ()
    text: str = ""
    place: str = ""


@dataclass(frozen=True, slots=True)
class End:
    """Where a way ends: `rule` is what decided, None for a policy, the routing, or nothing that stopped it."""

    outcome: Outcome
    text: str
    hook: str = ""
    backend: Backend | None = None
    table: Table | None = None
    rule: Rule | None = None
    place: str = ""

    @property
    def in_shield(self) -> bool:
        """Whether the shield decided."""
        return self.place.startswith(SHIELD)

    @property
    def is_last_resort(self) -> bool:
        """Whether the shield decided what iptables should have answered before."""
        return self.in_shield and self.place.endswith(Stage.LAST)


@dataclass(frozen=True, slots=True)
class Path:
    """One way of the packet. `supposed` says under which conditions; `doubts` what might stop it and isn't understood.

    `alike` counts further ways, under other conditions, that came to the same packet at the same place.
    """

    state: State
    steps: tuple[Step, ...] = ()
    supposed: tuple[Supposed, ...] = ()
    doubts: tuple[str, ...] = ()
    alike: int = 0
    end: End | None = None

    @property
    def passes(self) -> bool | None:
        """Whether the packet gets through this way; None if that can't be told."""
        if self.end is None or self.end.outcome is Outcome.UNKNOWN:
            return None
        if self.end.outcome in STOPS:
            return False
        return None if self.doubts else True


@dataclass(frozen=True, slots=True)
class Verdict:
    """Every way that can't be ruled out; a packet takes one of them."""

    packet: Packet
    paths: tuple[Path, ...]

    @property
    def passes(self) -> bool | None:
        """Whether the packet gets through; None when that hangs on what isn't known. Ways that end alike agree."""
        answers = {path.passes for path in self.paths}
        return next(iter(answers)) if len(answers) == 1 else None

    @property
    def outcomes(self) -> frozenset[Outcome]:
        """How it can end."""
        return frozenset(path.end.outcome for path in self.paths if path.end)

    @property
    def deciders(self) -> tuple[Rule, ...]:
        """The rules that end it, each once."""
        return tuple(dict.fromkeys(path.end.rule for path in self.paths if path.end and path.end.rule))
