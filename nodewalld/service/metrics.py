"""What Prometheus is told: a file for node_exporter's textfile collector, in the words of the official client library.

Law: metrics are made of the events and the status that everything else speaks from. A file that can't be written harms
nothing: that is told once, and the rules are held. The library (12 MiB) is imported only where somebody wants metrics.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from nodewalld.core.events import SHIELD, Count, Event, Kind, ShieldState, State, Status

FILE_NAME = "nodewalld.prom"

WRITE_EVERY = 5.0
"""Seconds between two writes at the least: nobody scrapes more often, and a busy node makes many passes."""

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0, 300.0)
_CULPRITS_MAX = 30  # strangers choose their names; each is a time series for ever
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How things stand at one moment; `sets` holds the number of entries by kernel set."""

    status: Status
    sets: Mapping[str, int]
    counts: tuple[Count, ...]


class Metrics:
    """Counts events and passes, and writes the file. For the thread of the loop.

    Counters begin when metrics are first wanted: a restart sets them to 0, as Prometheus expects of counters.
    """

    def __init__(self) -> None:
        self._book: _Book | None = None
        self._path: Path | None = None
        self._written = -WRITE_EVERY
        self._owed = False
        self._error = ""

    @property
    def due(self) -> float:
        """When (monotonic) there is something to write; infinity when there is not."""
        return self._written + WRITE_EVERY if self._owed else float("inf")

    def take(self, event: Event) -> None:
        """Count an event."""
        if self._book and event.kind is Kind.REPAIR:
            self._book.count_repair(event)

    def passed(self, seconds: float) -> None:
        """Count a pass: from the wake-up until everything that it asked for was done."""
        if self._book:
            self._book.passes.observe(seconds)
            self._owed = True

    def write(self, folder: str, look: Callable[[], Snapshot], now: float) -> None:
        """Write the file if it is wanted (`folder` is not "") and due; `now` is monotonic."""
        path = Path(folder) / FILE_NAME if folder else None
        if path != self._path:
            self.close()
            self._path = path
            self._book = _Book() if path else None
            self._owed = path is not None
        if path is None or self._book is None or now < self.due:
            return
        self._written, self._owed = now, False
        try:
            _replace(path, self._book.text(look()))
        except OSError as error:
            if str(error) != self._error:
                _log.error(f"Metrics can't be written to {path}: {error.strerror or error}")
            self._error = str(error)
        else:
            self._error = ""

    def close(self) -> None:
        """Take the file away: what nobody writes any more would go on to say that all is well."""
        if self._path:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
        self._path, self._written = None, -WRITE_EVERY


class _Book:
    """The metrics of one life of the daemon."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram  # noqa: PLC0415 - heavy

        self.registry = CollectorRegistry()
        self._repairs = Counter(
            "nodewalld_repairs",
            "Repairs, by place, by what was wrong, and by the program that did it where the kernel tells.",
            ("family", "table", "chain", "reason", "by"),
            registry=self.registry,
        )
        self._exposures = Histogram(
            "nodewalld_exposure_seconds",
            "How long rules were not in force, a repair at a time.",
            ("family", "table"),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.passes = Histogram(
            "nodewalld_pass_seconds",
            "How long a pass of the main loop took, from the wake-up.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._culprits: set[str] = set()

    def count_repair(self, event: Event) -> None:
        """Who did it, what it was, and how long it was open."""
        by = event.by.name if event.by else "unknown"
        if by not in self._culprits and len(self._culprits) >= _CULPRITS_MAX:
            by = "other"
        self._culprits.add(by)
        table = event.table.value if event.table else "ipset" if event.family else SHIELD
        family = event.family.value if event.family else ""
        reason = event.reason.value if event.reason else ""
        self._repairs.labels(family, table, event.chain or "", reason, by).inc()
        if event.exposed_ms is not None:
            self._exposures.labels(family, table).observe(event.exposed_ms / 1000)

    def text(self, now: Snapshot) -> bytes:
        """The whole file."""
        from prometheus_client import generate_latest  # noqa: PLC0415 - heavy

        moment = _Moment(now)
        self.registry.register(moment)
        try:
            return generate_latest(self.registry)
        finally:
            self.registry.unregister(moment)


class _Moment:
    """Hands the library what is so at one moment, as a collector of its kind."""

    def __init__(self, now: Snapshot) -> None:
        self._now = now

    def collect(self) -> Iterable[Any]:
        """The gauges, and the kernel's own counters."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily  # noqa: PLC0415 - heavy

        status = self._now.status

        def gauge(name: str, text: str, labels: tuple[str, ...], values: Mapping[Any, float]) -> Any:
            metric = GaugeMetricFamily(f"nodewalld_{name}", text, labels=labels)
            for key, value in values.items():
                metric.add_metric(key, value)
            return metric

        backend = status.backend.value if status.backend else ""
        config = status.config
        loaded = config.loaded_at.timestamp() if config.loaded_at else 0.0
        contests: Counter[tuple[str, ...]] = Counter()
        for c in status.contention:
            contests[c.family.value, c.table.value, c.chain] += c.repairs
        families = {(f.value,): float(state is State.ENFORCING) for f, state in status.families.items()}
        sets = {(name,): float(size) for name, size in self._now.sets.items()}
        yield gauge("info", "1; version and backend.", ("version", "backend"), {(status.version, backend): 1.0})
        yield gauge("state", "1 for the state it is in.", ("state",), {(s.value,): s is status.state for s in State})
        yield gauge("family_enforcing", "1 while a family is wholly in force.", ("family",), families)
        yield gauge("rules_desired", "Rules that there should be.", (), {(): status.desired})
        yield gauge("rules_in_place", "Rules that stand right.", (), {(): status.in_place})
        shield = {(state.value,): float(state is status.shield.state) for state in ShieldState}
        yield gauge("shield", "1 for how the shield stands.", ("state",), shield)
        yield gauge("shield_rules", "Rules of the shield.", (), {(): status.shield.rules})
        yield gauge("config_generation", "How many configurations were taken.", (), {(): config.generation})
        yield gauge("config_loaded_timestamp_seconds", "When it was taken.", (), {(): loaded})
        yield gauge("config_refused", "1 while what is on the disk is refused.", (), {(): bool(config.error)})
        yield gauge(
            "contention", "Places taken back again and again: how often.", ("family", "table", "chain"), contests
        )
        lost = {(each.name,): float(len(each.jumps)) for each in status.neighbours}
        yield gauge("neighbour_lost", "Jumps of its own that another program has lost.", ("neighbour",), lost)
        yield gauge("set_entries", "Entries of a set, by the name it has in the kernel.", ("set",), sets)
        labels = ("family", "table", "chain", "entry", "target")
        packets = CounterMetricFamily("nodewalld_rule_packets", "Packets that our rules have matched.", labels=labels)
        octets = CounterMetricFamily("nodewalld_rule_bytes", "Bytes that our rules have matched.", labels=labels)
        for key, (seen, size) in _summed(self._now.counts).items():
            packets.add_metric(key, seen)
            octets.add_metric(key, size)
        yield packets
        yield octets


def _summed(counts: Iterable[Count]) -> dict[tuple[str, ...], tuple[int, int]]:
    """Several rules of one entry may have one target in one chain: one time series."""
    found: dict[tuple[str, ...], tuple[int, int]] = {}
    for one in counts:
        key = (one.family.value, str(one.table), one.chain, one.entry, one.target)
        packets, octets = found.get(key, (0, 0))
        found[key] = packets + one.packets, octets + one.octets
    return found


def _replace(path: Path, content: bytes) -> None:
    """Whole or not at all; for everybody to read, since node_exporter is not root."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:  # noqa: PTH123 - a descriptor
        os.fchmod(descriptor, 0o644)  # whatever the umask says
        file.write(content)
    temporary.replace(path)
