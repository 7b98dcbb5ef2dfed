"""Neighbours who misbehave while strangers knock: what nodewalld tells of it, and what the packets tell.

Law: the two are measured apart. Who, what and after how long comes from `nodewallctl history`; how many came through
is counted where they would arrive.
"""

import json
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lab.daemon import Daemon
from lab.flood import Flood, FloodReport
from lab.layout import NODE, STRANGER
from lab.node import Node
from lab.processes import kill_entered
from lab.waiting import LabError, wait_for

Event = Mapping[str, Any]

RATE = 2000
"""Connection attempts a second."""

_BEFORE, _AFTER = 0.25, 0.25  # seconds of knocking around a disturbance
_SILENCE = 0.12  # seconds without another repair until a disturbance counts as over
_PATIENCE = 15.0


class NotAsToldError(Exception):
    """Something is not as the story says; the text is a sentence."""


class Repairs:
    """The repairs as `nodewallctl history -f --json` prints them."""

    def __init__(self, daemon: Daemon) -> None:
        self._process: subprocess.Popen[str] = daemon.popen_ctl("history", "-f", "--json")
        self._seen: list[tuple[float, Event]] = []
        self._started = threading.Event()
        self._reader = threading.Thread(target=self._read, name="history", daemon=True)
        self._reader.start()
        if not self._started.wait(_PATIENCE):
            raise LabError("nodewallctl history -f prints nothing")

    def _read(self) -> None:
        for line in self._process.stdout or ():
            event = json.loads(line)
            if event["kind"] == "repair":
                self._seen.append((time.monotonic(), event))
            self._started.set()  # the daemon's own start is the first line

    def __len__(self) -> int:
        return len(self._seen)

    def since(self, number: int) -> tuple[tuple[float, Event], ...]:
        """The repairs after the first `number`, and when each was told (monotonic)."""
        return tuple(self._seen[number:])

    def wait(self, number: int) -> None:
        """Wait until there are more than `number`, and no further one for a moment."""
        try:
            wait_for(lambda: len(self) > number, timeout=_PATIENCE, what="a repair")
        except LabError as error:
            raise NotAsToldError(f"Nothing was put right within {_PATIENCE:g} s") from error
        wait_for(lambda: time.monotonic() - self._seen[-1][0] > _SILENCE, timeout=_PATIENCE, what="an end of repairs")

    def close(self) -> None:
        """Listen no more."""
        kill_entered(self._process)
        self._reader.join(5)


@dataclass(frozen=True, slots=True)
class Door:
    """A guarded port as a stranger dials it, and where its packets arrive when it is open."""

    port: int
    sinks: Sequence[str]
    sink_port: int

    def flood(self, node: Node) -> Flood:
        """Knocks of the stranger, a SYN each, that are counted where they arrive."""
        return Flood(
            node,
            "client",
            to=(NODE.ipv4, self.port),
            source=STRANGER.ipv4,
            protocol="tcp",
            sinks=self.sinks,
            sink_port=self.sink_port,
            rate=RATE,
            source_ports=20000,
        )


@dataclass(frozen=True, slots=True)
class Incident:
    """One disturbance: the repairs it took, and the knocks meanwhile.

    `open_ms` is what the packets say; `told_ms` is from the deed to the telling of the last repair.
    """

    repairs: tuple[Event, ...]
    told_ms: float
    knocks: int
    slipped: int
    open_ms: float

    @property
    def noticed(self) -> bool:
        """Whether the kernel told of the change, so that nodewalld knows when it was."""
        return all(event["latency_ms"] is not None for event in self.repairs)

    @property
    def again_ms(self) -> float:
        """After how long everything was in force again: as nodewalld says, or, where it can't know, as seen here."""
        return max(float(event["exposed_ms"]) for event in self.repairs) if self.noticed else self.told_ms

    def exposed_by_family(self) -> dict[str, float]:
        """The same for each address family."""
        longest: dict[str, float] = {}
        for event in self.repairs:
            family = str(event["family"])
            longest[family] = max(longest.get(family, 0.0), float(event["exposed_ms"]))
        return longest

    def culprits(self) -> list[str]:
        """Who did it, as far as the kernel told."""
        return list(dict.fromkeys(_culprit(event["by"]) for event in self.repairs if event["by"]))


def _culprit(by: Event) -> str:
    told = f"{by['comm']} (pid {by['pid']})"
    parents = by.get("parents") or ()
    return f"{told}, started by {parents[0]['comm']} (pid {parents[0]['pid']})" if parents else told


def suffer(node: Node, repairs: Repairs, door: Door, misbehave: Callable[[], object]) -> Incident:
    """Let a neighbour misbehave while the stranger knocks, until nodewalld has put everything right."""
    before = len(repairs)
    with door.flood(node) as flood:
        time.sleep(_BEFORE)
        started = time.monotonic()
        misbehave()
        repairs.wait(before)
        over = time.monotonic()
        time.sleep(_AFTER)
        report = flood.stop()
    if early := report.passed_between(until=started):
        raise NotAsToldError(f"{len(early)} knocks came through before anybody had touched the rules")
    if late := report.passed_between(since=over):
        raise NotAsToldError(f"{len(late)} knocks came through although the repair was told")
    return _incident(report, repairs.since(before), started)


def _incident(report: FloodReport, repairs: tuple[tuple[float, Event], ...], started: float) -> Incident:
    slipped = report.passed_between()
    open_ms = (report.sent_at[slipped[-1]] - report.sent_at[slipped[0]]) * 1000 if slipped else 0.0
    told_ms = (repairs[-1][0] - started) * 1000
    knocks = report.sent - sum(report.errors.values())
    return Incident(tuple(event for _, event in repairs), told_ms, knocks, len(slipped), open_ms)
