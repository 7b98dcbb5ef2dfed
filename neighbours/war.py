"""Felix in Insert mode beside a rule of ours in filter FORWARD: minutes of refreshes, and what both sides wrote.

Law: Felix is played by the clock that the caller gives it; nodewalld is the real one, by its own. Ours counts as having
written in a chain when the history tells of a repair there, Felix when an iptables-restore of its own has put rules
into it. Each family is a war of its own.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from lab.daemon import Daemon
from lab.layout import FAMILIES
from lab.node import BackendName
from lab.rivals import Rival, Take
from neighbours.actions.kubernetes import calico, felix
from nodewalld.service import client

_CONFIGURATION = """\
[daemon]
backend = "{backend}"
resync = "30s"

[[rule]]
name = "transit"
table = "filter"
chain = "FORWARD"
rule = "-p udp --dport 31001 -j DROP"
position = "{position}"
"""

HEAD = (
    "| position | backend | seconds | chain | our repairs | Felix's writes | our last repairs | told in status |\n"
    "|---|---|---|---|---|---|---|---|\n"
)

Where = tuple[str, str, str]
"""A family, a table, a chain."""


@dataclass(frozen=True, slots=True)
class Front:
    """One chain of one family: when ours wrote there, when Felix did, when a contention was told (time.time())."""

    ours: tuple[float, ...] = ()
    theirs: tuple[float, ...] = ()
    told: float | None = None

    @property
    def rounds(self) -> int | None:
        """How often Felix had written there, in answer to us, when it was told; None while it is not."""
        return None if self.told is None else sum(when <= self.told for when in self.theirs)


@dataclass(frozen=True, slots=True)
class Score:
    """Where it stands after so many seconds; `contended` is what status tells of it."""

    seconds: float
    fronts: Mapping[Where, Front]
    contended: tuple[str, ...]

    @property
    def repairs(self) -> int:
        """Of ours, in all chains."""
        return sum(len(front.ours) for front in self.fronts.values())

    @property
    def writes(self) -> int:
        """Of Felix's, in all chains."""
        return sum(len(front.theirs) for front in self.fronts.values())


FORWARD: tuple[Where, ...] = tuple((family, "filter", "FORWARD") for family in FAMILIES)
"""Where the rule of ours is."""


class War:
    """One node with both sides, from when Felix starts beside a rule of ours that stands."""

    def __init__(self, daemon: Daemon, felix: Rival) -> None:
        self.daemon, self.felix = daemon, felix
        self._begun = time.monotonic()
        self._events = len(self._ask("history"))
        felix.do("start")

    def _ask(self, command: str) -> Any:
        return client.call(self.daemon.runtime_directory / "control.sock", {"command": command}, 20.0)

    def score(self) -> Score:
        """Since the beginning."""
        self.felix.do("rest")
        history = self._ask("history")[self._events :]
        contended = tuple(str(one["what"]) for one in self._ask("status")["contention"])
        wheres = dict.fromkeys((*FORWARD, *map(_of_take, self.felix.takes), *map(_of_event, _only(history, "repair"))))
        fronts = {where: self._front(where, history) for where in wheres}
        return Score(time.monotonic() - self._begun, fronts, contended)

    def _front(self, where: Where, history: list[dict[str, Any]]) -> Front:
        ours, told = (
            [_time(event) for event in _only(history, kind) if _of_event(event) == where]
            for kind in ("repair", "contention")
        )
        theirs = (take.time for take in self.felix.takes if _of_take(take) == where)
        return Front(tuple(ours), tuple(theirs), min(told, default=None))

    def until(self, good: Callable[[Score], bool], seconds: float, *, every: float = 0.1) -> Score:
        """The first good score, looked for so often; or the last, when the time is over."""
        while not good(score := self.score()) and score.seconds < seconds:
            time.sleep(every)
        return score


def _only(history: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in history if event["kind"] == kind]


def _of_event(event: Mapping[str, Any]) -> Where:
    return event["family"], event["table"], event["chain"]


def _of_take(take: Take) -> Where:
    return "ipv6" if take.tool == "ip6tables" else "ipv4", take.table, take.chain


def _time(event: Mapping[str, Any]) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()


@contextmanager
def war(backend: BackendName, position: str, clock: float) -> Iterator[War]:
    """With both sides at work."""
    with calico(backend) as node, Daemon(node, _CONFIGURATION.format(backend=backend, position=position)) as daemon:
        daemon.wait_ready()
        yield War(daemon, felix(node, "Insert", clock))


def fought(backend: BackendName, position: str, seconds: float) -> str:
    """So many real seconds of it, in the lines of a table (`HEAD`) for people."""
    with war(backend, position, 1.0) as between:
        end = between.until(lambda score: score.seconds >= seconds, seconds, every=1.0)
    lines = []
    for (family, table, chain), front in end.fronts.items():
        apart = f"{front.ours[-1] - front.ours[-2]:.0f} s apart" if len(front.ours) > 1 else "-"
        told = "no" if front.rounds is None else f"after Felix's write number {front.rounds}"
        cells = (f"`{position}`", backend, f"{end.seconds:.0f}", f"{table} {chain}, {family}", len(front.ours))
        lines.append("| " + " | ".join(map(str, (*cells, len(front.theirs), apart, told))) + " |\n")
    return "".join(lines)
