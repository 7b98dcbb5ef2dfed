"""One action of one program, again and again under a flood: what it did, what passed, when all stood again.

Laws: the same rules, flood and windows with nodewalld and without it, where they are put in by hand before each run. A
window goes from the action's beginning until everything has been still for a while. Between two runs the daemon is
started anew where it would take many runs for a war: there it slows down, as it should.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lab.daemon import Daemon
from lab.node import STRANGER, BackendName, LabError
from lab.rivals import PORTS
from lab.traffic import Flood, FloodReport
from neighbours.actions import SOURCE_PORT, Action, Stage
from nodewalld.service import client

PLACES = dict(zip(("FORWARD", "DOCKER-USER", "mangle"), PORTS, strict=True))
"""Where the flow is dropped, by port: filter FORWARD, filter DOCKER-USER, mangle FORWARD."""

RATE = 1000.0
"""Packets a second to each port."""

_TOGETHER = 2  # runs of one life of the daemon: three are a war
_LIMIT = 20.0
_LAST = 0.05  # seconds at the end of a window: what passes then passes for good

_CONFIGURATION = f"""\
[daemon]
backend = "{{backend}}"
resync = "1h"

[[port]]
name = "guarded"
ports = [32002]
action = "reject"

[[jump]]
name = "docker-user"
table = "filter"
from = "FORWARD"
to = "DOCKER-USER"

[[rule]]
name = "in-input"
table = "filter"
chain = "INPUT"
rule = "-p udp --dport {PLACES["FORWARD"]} -j DROP"

[[rule]]
name = "in-forward"
table = "filter"
chain = "FORWARD"
rule = "-p udp --dport {PLACES["FORWARD"]} -j DROP"

[[rule]]
name = "in-docker-user"
table = "filter"
chain = "DOCKER-USER"
rule = "-p udp --dport {PLACES["DOCKER-USER"]} -j DROP"

[[rule]]
name = "in-mangle"
table = "mangle"
chain = "FORWARD"
rule = "-p udp --dport {PLACES["mangle"]} -j DROP"
"""


def configuration(backend: BackendName) -> str:
    """What nodewalld holds: the three drops, the jump to DOCKER-USER, a rule in INPUT, and a guarded port."""
    return _CONFIGURATION.format(backend=backend)


@dataclass(frozen=True, slots=True)
class Run:
    """One run: packets that passed by place, places where they pass for good, and what the daemon told of it.

    `repairs` are (table, chain, reason) of IPv4 and IPv6, `exposed_ms` the longest of their exposures.
    """

    passed: dict[str, int]
    lost: frozenset[str]
    repairs: frozenset[tuple[str, str, str]] = frozenset()
    exposed_ms: float | None = None


def guarded(stage: Stage, action: Action, runs: int) -> list[Run]:
    """The runs with nodewalld. Raises LabError where its rules do not come back."""
    with _daemon(stage) as daemon, _flood(stage) as flood:
        windows = []
        for number in range(runs):
            if number and number % _TOGETHER == 0:
                daemon.restart()
                _still(daemon, 0.1)
            if action.prepare:
                action.prepare(stage)
                _still(daemon, action.settle)
            stage.establish()
            told = _ask(daemon, "history")[-1]["time"]
            begun = time.monotonic()
            action.act(stage)
            _still(daemon, action.settle)
            windows.append((begun, time.monotonic(), told, [e for e in _ask(daemon, "history") if e["time"] > told]))
            if action.undo:
                action.undo(stage)
                _still(daemon, action.settle)
        report = flood.stop()
        if daemon.ctl("plan").returncode:
            raise LabError(f"after {action.name} the rules are not in force:\n{daemon.ctl('plan').stdout}")
    return [_run(report, begun, ended, events) for begun, ended, _, events in windows]


def alone(stage: Stage, action: Action, runs: int) -> list[Run]:
    """The runs without nodewalld."""
    with _flood(stage) as flood:
        windows = []
        for _ in range(runs):
            if action.prepare:
                action.prepare(stage)
            stage.node.run(_BY_HAND)
            stage.establish()
            begun = time.monotonic()
            action.act(stage)
            time.sleep(action.settle + 2 * _LAST)
            windows.append((begun, time.monotonic()))
            if action.undo:
                action.undo(stage)
        report = flood.stop()
    return [_run(report, *window, ()) for window in windows]


_RULES = (
    ("filter", "FORWARD", f"-p udp --dport {PLACES['FORWARD']} -j DROP"),
    ("filter", "DOCKER-USER", f"-p udp --dport {PLACES['DOCKER-USER']} -j DROP"),
    ("filter", "FORWARD", "-j DOCKER-USER"),
    ("mangle", "FORWARD", f"-p udp --dport {PLACES['mangle']} -j DROP"),
)
_BY_HAND = "iptables -w -N DOCKER-USER 2>&-;" + ";".join(
    f"iptables -w -t {table} -D {chain} {rule} 2>&-; iptables -w -t {table} -I {chain} {rule}"
    for table, chain, rule in _RULES
)
_TAKEN_OUT = ";".join(f"iptables -w -t {table} -D {chain} {rule} 2>&-" for table, chain, rule in _RULES) + ";:"


@contextmanager
def _daemon(stage: Stage) -> Iterator[Daemon]:
    stage.node.run(_TAKEN_OUT)
    name = f"nodewalld-{time.monotonic_ns()}"
    with Daemon(stage.node, configuration(stage.node.backend), name=name) as daemon:
        daemon.wait_ready()
        _still(daemon, 0.1)
        yield daemon
        _ask(daemon, "remove")


@contextmanager
def _flood(stage: Stage) -> Iterator[Flood]:
    first, *more = PORTS
    flow = {"source": STRANGER.ipv4, "source_port": SOURCE_PORT, "sinks": (stage.sink,), "more": more}
    with Flood(stage.node, "client", to=(stage.to, first), rate=RATE * len(PORTS), **flow) as flood:  # type: ignore[arg-type]
        yield flood


def _ask(daemon: Daemon, command: str) -> Any:
    return client.call(daemon.runtime_directory / "control.sock", {"command": command}, _LIMIT)


def _still(daemon: Daemon, seconds: float) -> None:
    """Wait until all rules have been in place, and nothing had to be put right, for so long."""
    since = begun = time.monotonic()
    last = None
    while time.monotonic() - since < seconds:
        time.sleep(0.02)
        status = _ask(daemon, "status")
        seen = status["repairs"], status["rules"]["desired"] - status["rules"]["in_place"]
        if seen != last or seen[1]:
            since, last = time.monotonic(), seen
        if time.monotonic() - begun > _LIMIT:
            raise LabError(f"the rules do not come to rest: {status}")


def _run(report: FloodReport, begun: float, ended: float, events: Sequence[dict[str, Any]]) -> Run:
    repairs = [event for event in events if event["kind"] == "repair"]
    exposed = [event["exposed_ms"] for event in repairs if event.get("exposed_ms") is not None]
    passed = {place: report.passed_to(port, begun, ended) for place, port in PLACES.items()}
    return Run(
        {place: len(numbers) for place, numbers in passed.items()},
        frozenset(place for place, port in PLACES.items() if report.passed_to(port, ended - _LAST, ended)),
        frozenset((str(e["table"]), str(e["chain"]), str(e["reason"])) for e in repairs),
        max(exposed, default=None),
    )
