"""One action again and again under a flood of 10,000 packets a second: what passes drops that the shield carries.

Laws: one flood, one node and one daemon for the runs with the shield and for those without, so that they differ in
nothing else. Whatever passes from the first run's beginning to the end of the last counts, also while the action is
undone and prepared. Before anything is refused the flood's packets pass; where they don't, nothing is measured.
"""

import time
from dataclasses import dataclass
from typing import Any

from lab.flood import Flood, FloodReport
from lab.layout import NODE, STRANGER
from lab.node import BackendName
from lab.rivals import PORTS
from lab.waiting import LabError
from neighbours.actions.stage import SOURCE_PORT, Action, Stage
from neighbours.measure import ask, guarded, taken_out

DROPS = dict(zip(("port", "forward"), PORTS[:2], strict=True))
"""What drops the flow, by port: a `[[port]]` what goes to the node itself, a `[[forward]]` what is routed."""

RATE = 12_000.0
"""Packets a second to both together; a busy machine sends fewer than it is asked for."""

_OPEN = 0.1  # seconds for which all passes at first

_CONFIGURATION = f"""\
[daemon]
backend = "{{backend}}"
resync = "1h"
shield = "{{shield}}"

[[port]]
name = "own"
ports = [{DROPS["port"]}]
protocol = ["udp"]
action = "drop"

[[forward]]
name = "routed"
protocol = "udp"
ports = [{DROPS["forward"]}]
action = "drop"
"""


def configuration(backend: BackendName, shield: str) -> str:
    """What nodewalld holds: one drop of either kind."""
    return _CONFIGURATION.format(backend=backend, shield=shield)


@dataclass(frozen=True, slots=True)
class Runs:
    """So many runs in so many seconds: packets sent in all, and those that passed, by what should have dropped them."""

    number: int
    seconds: float
    sent: int
    passed: dict[str, int]

    def kept(self) -> dict[str, Any]:
        """As it stands in the file."""
        rate = round(self.sent / self.seconds)
        return {"runs": self.number, "sent": self.sent, "a_second": rate, "passed": self.passed}


@dataclass(frozen=True, slots=True)
class Shielded:
    """The same with the shield and without."""

    with_shield: Runs
    without: Runs

    def kept(self) -> dict[str, Any]:
        """As it stands in the file."""
        return {"with": self.with_shield.kept(), "without": self.without.kept()}


def shielded(stage: Stage, action: Action, number: int) -> Shielded:
    """Do it so many times with the shield, and as often without.

    Raises LabError where the flood's packets do not pass before nodewalld comes, where there is no shield, and as
    `Guarded.repeat` does.
    """
    backend = stage.node.backend
    _pass_without_us(stage)
    times = []
    with _flood(stage) as flood, guarded(stage, configuration(backend, "auto")) as guard:
        for mode, states in (("auto", {"owned", "guarded"}), ("off", {"off"})):
            guard.configure(configuration(backend, mode))
            if (state := ask(guard.daemon, "status")["shield"]["state"]) not in states:
                raise LabError(f'with shield = "{mode}" it is {state}')
            times.append(time.monotonic())
            guard.repeat(action, number)
            times.append(time.monotonic())
        report = flood.stop()
    return Shielded(_runs(report, stage, number, *times[:2]), _runs(report, stage, number, *times[2:]))


def _pass_without_us(stage: Stage) -> None:
    """See that they do."""
    taken_out(stage)
    with _flood(stage) as flood:
        stage.establish()
        since = time.monotonic()
        time.sleep(_OPEN)
        found = _runs(flood.stop(), stage, 1, since, time.monotonic())
    if shut := [name for name, passed in found.passed.items() if not passed]:
        raise LabError(f"nothing that a {' or '.join(shut)} should drop passes without us")


def _flood(stage: Stage) -> Flood:
    stage.forgetful()
    return Flood(
        stage.node,
        "client",
        to=(NODE.ipv4, DROPS["port"]),
        more=[(stage.to, DROPS["forward"])],
        source=STRANGER.ipv4,
        source_port=SOURCE_PORT,
        source_ports=40_000 if stage.translated else 0,
        sinks=("node", stage.sink),
        rate=RATE,
    )


def _runs(report: FloodReport, stage: Stage, number: int, since: float, until: float) -> Runs:
    # What comes to the node itself because its translation was flushed is no business of a [[forward]].
    arrived = {n for n, _, sink in report.passed if sink == stage.sink or report.port_of(n) == DROPS["port"]}
    passed = [n for n in arrived if since <= report.sent_at[n] <= until]
    return Runs(
        number=number,
        seconds=until - since,
        sent=len(report.sent_between(since, until)),
        passed={name: sum(report.port_of(n) == port for n in passed) for name, port in DROPS.items()},
    )
