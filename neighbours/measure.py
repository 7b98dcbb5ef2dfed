"""One action of one program, again and again under a flood: what it did, what passed, when all stood again.

Laws: the same rules, flood and windows with nodewalld and without it, where they are put in by hand before each run. A
window goes from the action's beginning until everything has been still for a while. Between two runs the daemon is made
to forget who took its places where it would take many runs for a war: there it slows down, as it should.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from lab.daemon import Daemon
from lab.flood import Flood, FloodReport
from lab.layout import STRANGER
from lab.node import BackendName
from lab.rivals import PORTS
from lab.waiting import LabError
from neighbours.actions.stage import SOURCE_PORT, Action, Stage
from nodewalld.core.config import DaemonConfig
from nodewalld.service import client

PLACES = dict(zip(("FORWARD", "DOCKER-USER", "mangle"), PORTS, strict=True))
"""Where the flow is dropped, by port: filter FORWARD, filter DOCKER-USER, mangle FORWARD."""

RATE = 1000.0
"""Packets a second to each port."""

_TOGETHER = 2  # runs that the daemon remembers: three are a war
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
    """One run: packets that passed by place, and what the daemon told of it.

    `lost` are the places where they pass for good, `always` those where they did before. `repairs` are (table, chain,
    reason) of either family, `exposed_ms` the longest of their exposures, `untold_ms` for how long packets passed
    FORWARD while no exposure was told. `complaint`: what the program said when the action failed.
    """

    passed: dict[str, int]
    lost: frozenset[str]
    always: frozenset[str] = frozenset()
    repairs: frozenset[tuple[str, str, str]] = frozenset()
    exposed_ms: float | None = None
    untold_ms: float = 0.0
    complaint: str = ""


_Window = tuple[float, float, list[dict[str, Any]], str]
"""When it began and ended, the repairs, the complaint."""


class Guarded:
    """A stage with nodewalld on it, where one action after the other is tried."""

    def __init__(self, stage: Stage, daemon: Daemon, text: str) -> None:
        self._stage, self.daemon, self._text = stage, daemon, text
        self._lives = 0
        self._remembered = 0  # runs in which it had something to put right, since it was made to forget

    def runs(self, action: Action, number: int) -> list[Run]:
        """Do it so many times under the flood of the three places. Raises LabError as `repeat` does."""
        with _flood(self._stage) as flood:
            windows = self.repeat(action, number)
            report = flood.stop()
        return [_run(report, *window) for window in windows]

    def repeat(self, action: Action, number: int) -> list[_Window]:
        """Do it so many times, and undo it.

        Raises LabError where the rules do not come to rest, or are not in force at the end.
        """
        windows = []
        for again in range(number):
            if self._remembered == _TOGETHER:
                self._forget()
            if action.undo and again:
                action.undo(self._stage)
            if action.prepare:
                action.prepare(self._stage)
            # Where nothing has been done since, all is still from the last run.
            if not again or action.undo or action.prepare:
                _still(self.daemon, action.settle)
            windows.append(self._once(action))
        if (plan := self.daemon.ctl("plan")).returncode:
            raise LabError(f"after {action.name} the rules are not in force:\n{plan.stdout}")
        if action.undo:
            action.undo(self._stage)
        return windows

    def configure(self, text: str) -> None:
        """Have it hold something else, at once."""
        self._text = text
        self._reload(text)

    def _reload(self, text: str) -> None:
        self.daemon.configure(text)
        ask(self.daemon, "reload")
        _still(self.daemon, _LAST)

    def _forget(self) -> None:
        """Where others may stand above, it is no matter who did before. A restart would take ten times as long."""
        self._lives += 1
        others = json.dumps([*DaemonConfig().yield_to, f"NOBODY-{self._lives}"])
        self._reload(self._text.replace("[daemon]\n", f"[daemon]\nyield_to = {others}\n", 1))
        self._remembered = 0

    def _once(self, action: Action) -> _Window:
        stage, daemon = self._stage, self.daemon
        stage.establish()
        time.sleep(_LAST / 2)
        told = ask(daemon, "history")[-1]["time"]
        begun = time.monotonic()
        complaint = _done(stage, action)
        _still(daemon, action.settle)
        ended = time.monotonic()
        events = [event for event in ask(daemon, "history") if event["time"] > told and event["kind"] == "repair"]
        self._remembered += bool(events)
        return begun, ended, events, complaint


@contextmanager
def guarded(stage: Stage, text: str) -> Iterator[Guarded]:
    """With nodewalld, until the end of the block; `text` is what it holds, from a section [daemon] on."""
    taken_out(stage)
    with Daemon(stage.node, text, name=f"nodewalld-{time.monotonic_ns()}") as daemon:
        daemon.wait_ready()
        _still(daemon, 0.1)
        try:
            yield Guarded(stage, daemon, text)
        finally:
            daemon.ctl("remove")


def alone(stage: Stage, action: Action, number: int) -> list[Run]:
    """The same without nodewalld, with rules that are put in by hand before each run."""
    windows: list[_Window] = []
    with _flood(stage) as flood:
        for _ in range(number):
            if action.prepare:
                action.prepare(stage)
            stage.node.run(_BY_HAND)
            stage.establish()
            time.sleep(_LAST)
            begun = time.monotonic()
            complaint = _done(stage, action)
            time.sleep(action.settle + 2 * _LAST)
            windows.append((begun, time.monotonic(), [], complaint))
            if action.undo:
                action.undo(stage)
        report = flood.stop()
    return [_run(report, *window) for window in windows]


def _done(stage: Stage, action: Action) -> str:
    """Do it; what its program complains of, if it does."""
    try:
        action.act(stage)
    except LabError as error:
        return str(error)
    return ""


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
_TAKE_OUT = ";".join(f"iptables -w -t {table} -D {chain} {rule} 2>&-" for table, chain, rule in _RULES) + ";:"


def taken_out(stage: Stage) -> None:
    """Take the rules out that were put in by hand."""
    stage.node.run(_TAKE_OUT)


@contextmanager
def _flood(stage: Stage) -> Iterator[Flood]:
    first, *more = PORTS
    stage.forgetful()
    with Flood(
        stage.node,
        "client",
        to=(stage.to, first),
        more=more,
        source=STRANGER.ipv4,
        source_port=SOURCE_PORT,
        source_ports=20000 if stage.translated else 0,
        sinks=(stage.sink,),
        rate=RATE * len(PORTS),
    ) as flood:
        yield flood


def ask(daemon: Daemon, command: str) -> Any:
    """What the control socket answers."""
    return client.call(daemon.runtime_directory / "control.sock", {"command": command}, _LIMIT)


def _still(daemon: Daemon, seconds: float) -> None:
    """Wait until all rules have been in place, and nothing had to be put right, for so long."""
    since = begun = time.monotonic()
    last = None
    while time.monotonic() - since < seconds:
        time.sleep(0.02)
        status = ask(daemon, "status")
        seen = status["repairs"], status["rules"]["desired"] - status["rules"]["in_place"]
        if seen != last or seen[1]:
            since, last = time.monotonic(), seen
        if time.monotonic() - begun > _LIMIT:
            raise LabError(f"the rules do not come to rest: {status}")


def _run(report: FloodReport, begun: float, ended: float, repairs: list[dict[str, Any]], complaint: str) -> Run:
    exposed = [event["exposed_ms"] for event in repairs if event.get("exposed_ms") is not None]

    def passing(since: float, until: float) -> frozenset[str]:
        return frozenset(place for place, port in PLACES.items() if report.passed_to(port, since, until))

    always = passing(begun - _LAST / 2, begun)
    return Run(
        passed={place: len(report.passed_to(port, begun, ended)) for place, port in PLACES.items()},
        lost=passing(ended - _LAST, ended) - always,
        always=always,
        repairs=frozenset((str(e["table"]), str(e["chain"]), str(e["reason"])) for e in repairs),
        exposed_ms=max(exposed, default=None),
        untold_ms=_untold(report, begun, ended, repairs),
        complaint=complaint,
    )


def _untold(report: FloodReport, begun: float, ended: float, repairs: Sequence[dict[str, Any]]) -> float:
    """Milliseconds of packets that passed FORWARD at a time of which no repair tells that it was open."""
    offset = time.time() - time.monotonic()
    told = []
    for event in repairs:
        if (event["family"], event["table"], event["chain"]) == ("ipv4", "filter", "FORWARD"):
            end = datetime.fromisoformat(event["time"]).timestamp() - offset
            told.append((end - event["exposed_ms"] / 1000, end))
    passed = (report.sent_at[number] for number in report.passed_to(PLACES["FORWARD"], begun, ended))
    return sum(not any(first <= when <= last for first, last in told) for when in passed) / RATE * 1000
