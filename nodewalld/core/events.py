"""What happened and how things stand: frozen values, the JSON of the contract, and a sentence for people.

Law: CLI, journal, sd_notify and metrics all speak from these values and add nothing of their own. Names of
foreign processes are data that strangers choose: they leave this module printable, on one line.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, NamedTuple

from nodewalld.core.words import Backend, Family, Table


class Kind(StrEnum):
    """What an event tells of."""

    START = "start"
    STOP = "stop"
    REPAIR = "repair"
    RELOAD = "reload"
    REFUSED = "refused"
    CONTENTION = "contention"
    PEACE = "peace"
    DEGRADED = "degraded"
    RECOVERED = "recovered"
    REMOVE = "remove"
    SET = "set"
    NEIGHBOUR = "neighbour"
    HEALED = "healed"

    @property
    def level(self) -> str:
        """How loudly a log says it, in structlog's words."""
        return _LEVELS.get(self, "info")


_LEVELS = {
    Kind.REPAIR: "warning",
    Kind.CONTENTION: "warning",
    Kind.DEGRADED: "error",
    Kind.REFUSED: "error",
    Kind.NEIGHBOUR: "warning",
}

_COMPLETE = {Kind.CONTENTION, Kind.PEACE}  # their words name the place and the program themselves


class Reason(StrEnum):
    """What was wrong with a rule."""

    MISSING = "missing"
    DISPLACED = "displaced"
    CHANGED = "changed"
    FLUSHED = "flushed"


class State(StrEnum):
    """Are the rules in force?"""

    STARTING = "starting"
    ENFORCING = "enforcing"
    DEGRADED = "degraded"
    PAUSED = "paused"
    IDLE = "idle"


def printable(text: str) -> str:
    """The text on one line, with every control, format and undecodable character escaped as Python would."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def rfc3339(time: datetime) -> str:
    """The moment in UTC, always with microseconds, so that the texts sort as the moments do."""
    return time.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def duration(milliseconds: float) -> str:
    """A length of time as people read it: "0.4 ms", "1.2 s", "3 min"."""
    if milliseconds < 1000:
        return f"{milliseconds:.1f} ms" if milliseconds < 100 else f"{milliseconds:.0f} ms"
    seconds = milliseconds / 1000
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


@dataclass(frozen=True, slots=True)
class Process:
    """A process as the kernel or /proc named it."""

    pid: int
    comm: str

    def to_json(self) -> dict[str, Any]:
        """As in the contract."""
        return {"pid": self.pid, "comm": printable(self.comm)}

    def __str__(self) -> str:
        return f"{printable(self.comm)} (pid {self.pid})"


_TOOLS = ("iptables", "ip6tables", "xtables", "nft", "ipset")


@dataclass(frozen=True, slots=True)
class Culprit:
    """The process that changed something; `parents` from its own parent upwards, as /proc told."""

    pid: int
    comm: str
    parents: tuple[Process, ...] = ()

    @property
    def is_tool(self) -> bool:
        """Whether it is a tool, which runs for one command of somebody else's."""
        return self.comm.startswith(_TOOLS)

    @property
    def lineage(self) -> frozenset[int]:
        """The processes by which it is known again; a tool lives for one command, so none where /proc told nothing."""
        own = () if self.is_tool else (self.pid,)
        return frozenset((*own, *(parent.pid for parent in self.parents)))

    @property
    def name(self) -> str:
        """The program to look at: the one that used the tool, where it is known, else the tool."""
        if self.is_tool:
            for parent in self.parents:
                if not parent.comm.startswith(_TOOLS):
                    return printable(parent.comm)
        return printable(self.comm)

    def to_json(self) -> dict[str, Any]:
        """As in the contract, and `name`."""
        own = Process(self.pid, self.comm).to_json()
        return {**own, "name": self.name, "parents": [parent.to_json() for parent in self.parents]}

    def __str__(self) -> str:
        text = f"{printable(self.comm)} (pid {self.pid}"
        return f"{text}, started by {self.parents[0]})" if self.parents else f"{text})"


def place(family: Family | None, table: Table | None, chain: str | None) -> str:
    """Where, as far as known: "mangle PREROUTING (IPv4)"."""
    words = [word for word in (table, chain) if word]
    if family:
        words.append(f"({_FAMILY_WORDS[family]})")
    return printable(" ".join(words))


_FAMILY_WORDS = {Family.IPV4: "IPv4", Family.IPV6: "IPv6"}

_WRONG = {
    Reason.MISSING: ("it was missing", "; removed by {}"),
    Reason.DISPLACED: ("it was displaced", " by {}"),
    Reason.CHANGED: ("it was changed", " by {}"),
    Reason.FLUSHED: ("it was flushed", " by {}"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened. `what` leaves the place out: "put back the jump to NODEWALL-PREROUTING"."""

    time: datetime
    kind: Kind
    what: str
    family: Family | None = None
    table: Table | None = None
    chain: str | None = None
    reason: Reason | None = None
    entries: tuple[str, ...] = ()
    by: Culprit | None = None
    exposed_ms: float | None = None
    latency_ms: float | None = None
    flows_deleted: int = 0

    def __post_init__(self) -> None:
        """A time without a zone would mean another moment on each reader's machine."""
        if self.time.tzinfo is None:
            raise ValueError("the time of an event needs a time zone")

    @property
    def place(self) -> str:
        """Where, as far as known: "mangle PREROUTING (IPv4)"."""
        return place(self.family, self.table, self.chain)

    def sentence(self) -> str:
        """All of it in one line, as the journal's MESSAGE says it."""
        what = printable(self.what)
        what = what[:1].upper() + what[1:]
        if self.kind in _COMPLETE:
            return what
        parts = [what + (f" in {self.place}" if self.table else f" {self.place}" if self.place else "")]
        wrong = self._wrong()
        if wrong:
            parts[0] += f": {wrong}"
        if self.exposed_ms is not None:
            parts.append(f"exposed for {duration(self.exposed_ms)}")
        if self.flows_deleted:
            parts.append(f"{self.flows_deleted} {'flow' if self.flows_deleted == 1 else 'flows'} cut")
        return "; ".join(parts)

    def _wrong(self) -> str:
        if self.reason is None:
            return f"by {self.by}" if self.by and self.kind is not Kind.NEIGHBOUR else ""
        state, blame = _WRONG[self.reason]
        return state + (blame.format(self.by) if self.by else "")

    def to_json(self) -> dict[str, Any]:
        """As in the contract, and `message`, which is `sentence()`."""
        return {
            "time": rfc3339(self.time),
            "kind": self.kind.value,
            "family": self.family and self.family.value,
            "table": self.table and self.table.value,
            "chain": self.chain,
            "reason": self.reason and self.reason.value,
            "what": self.what,
            "entries": list(self.entries),
            "by": self.by and self.by.to_json(),
            "exposed_ms": self.exposed_ms,
            "latency_ms": self.latency_ms,
            "flows_deleted": self.flows_deleted,
            "message": self.sentence(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Contention:
    """Another program that takes the same place again and again; `what` says who, how often and what would
    end it, `takers` by which rules (none where it takes ours out)."""

    family: Family
    table: Table
    chain: str
    what: str
    repairs: int
    since: datetime
    by: Culprit | None = None
    takers: tuple[str, ...] = ()

    @property
    def identity(self) -> tuple[object, ...]:
        """Chain and opponent: what makes two tellings tell of one contention."""
        return self.family, self.table, self.chain, self.takers

    def to_json(self) -> dict[str, Any]:
        """One element of `contention` in `status --json`."""
        return {
            "family": self.family.value,
            "table": self.table.value,
            "chain": self.chain,
            "what": printable(self.what),
            "repairs": self.repairs,
            "since": rfc3339(self.since),
            "by": self.by and self.by.to_json(),
            "takers": [printable(text) for text in self.takers],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """Another program that has lost jumps of its own; `what` says what is dead, since when, by whom, and the cure."""

    name: str
    what: str
    since: datetime
    cure: str
    jumps: tuple[str, ...]
    by: Culprit | None = None

    def to_json(self) -> dict[str, Any]:
        """One element of `neighbours` in `status --json`."""
        return {
            "name": self.name,
            "what": printable(self.what),
            "since": rfc3339(self.since),
            "cure": self.cure,
            "jumps": list(self.jumps),
            "by": self.by and self.by.to_json(),
        }


@dataclass(frozen=True, slots=True)
class Bypass:
    """One way past our rules, or one more judge beside them; `kind` never changes its meaning."""

    kind: str
    what: str

    def to_json(self) -> dict[str, Any]:
        """One element of `bypasses` in `status --json`."""
        return {"kind": self.kind, "what": printable(self.what)}


SHIELD = "shield"
"""Stands where a table is named, for our own table of nf_tables."""


class ShieldState(StrEnum):
    """How the shield stands."""

    OWNED = "owned"  # nobody else can change it
    GUARDED = "guarded"  # put back when somebody has
    EMPTY = "empty"  # there is nothing for it to refuse
    OFF = "off"
    UNAVAILABLE = "unavailable"  # no nf_tables in this kernel
    FAILING = "failing"


@dataclass(frozen=True, slots=True)
class ShieldStatus:
    """How the shield stands. `iptables_only`: what of the configuration it doesn't carry, and why."""

    mode: str = "off"
    state: ShieldState = ShieldState.OFF
    rules: int = 0
    iptables_only: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """`shield` in `status --json`."""
        only = [{"entry": entry, "reason": reason} for entry, reason in self.iptables_only]
        return {"mode": self.mode, "state": self.state.value, "rules": self.rules, "iptables_only": only}


class Count(NamedTuple):
    """What one rule of an entry has seen; `target` is "" for a rule that only counts, `table` may be SHIELD."""

    family: Family
    table: str
    chain: str
    entry: str
    target: str
    packets: int
    octets: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigStatus:
    """Which configuration is enforced. `error` tells why the files on disk are not, when they are not."""

    path: str
    generation: int = 0
    loaded_at: datetime | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """`config` in `status --json`."""
        return {
            "path": self.path,
            "generation": self.generation,
            "loaded_at": self.loaded_at and rfc3339(self.loaded_at),
            "error": self.error,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How things stand. `since` is when `state` began; `families` holds the state of each family in use."""

    state: State
    since: datetime
    version: str
    pid: int
    config: ConfigStatus
    reasons: tuple[str, ...] = ()
    backend: Backend | None = None
    desired: int = 0
    in_place: int = 0
    repairs: int = 0
    last_repair: Event | None = None
    contention: tuple[Contention, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    bypasses: tuple[Bypass, ...] = ()
    families: Mapping[Family, State] = field(default_factory=dict)
    note: str = ""
    shield: ShieldStatus = ShieldStatus()

    def sentence(self) -> str:
        """The line of `systemctl status`."""
        rules = f"{self.in_place} of {self.desired} rules in place"
        if self.state is State.ENFORCING:
            rules = f"{self.desired} {'rule' if self.desired == 1 else 'rules'} in force"
        backend = f" ({self.backend.value})" if self.backend else ""
        parts = [f"{self.state.value.capitalize()}: {rules}{backend}"]
        parts += [self.note] if self.note else []
        parts += [printable(reason) for reason in self.reasons[:1]]
        if len(self.reasons) > 1:
            parts.append(f"{len(self.reasons) - 1} more (nodewallctl status)")
        if self.repairs:
            parts.append(f"{self.repairs} {'repair' if self.repairs == 1 else 'repairs'}{self._last()}")
        return "; ".join(parts)

    def _last(self) -> str:
        event = self.last_repair
        if event is None:
            return ""
        by = f", by {event.by.name}" if event.by else ""
        return f", the last at {event.time.astimezone(UTC):%H:%M:%S} UTC in {event.place}{by}"

    def to_json(self) -> dict[str, Any]:
        """The answer of `nodewallctl status --json`."""
        return {
            "state": self.state.value,
            "since": rfc3339(self.since),
            "reasons": list(self.reasons),
            "backend": self.backend and self.backend.value,
            "version": self.version,
            "pid": self.pid,
            "config": self.config.to_json(),
            "rules": {"desired": self.desired, "in_place": self.in_place},
            "repairs": self.repairs,
            "last_repair": self.last_repair and self.last_repair.to_json(),
            "contention": [one.to_json() for one in self.contention],
            "neighbours": [one.to_json() for one in self.neighbours],
            "bypasses": [one.to_json() for one in self.bypasses],
            "note": self.note or None,
            "shield": self.shield.to_json(),
            "families": {family.value: state.value for family, state in self.families.items()},
        }
