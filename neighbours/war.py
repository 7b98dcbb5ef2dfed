"""Felix in Insert mode beside a rule of ours in filter FORWARD: minutes of refreshes, and what both sides wrote.

Law: Felix is played by the clock that the caller gives it; nodewalld is the real one, by its own. Ours counts as having
written when its history has another repair, Felix when it has run iptables-restore.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lab.daemon import Daemon
from lab.node import BackendName
from lab.rivals import Rival
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


@dataclass(frozen=True, slots=True)
class Score:
    """Where it stands after so many seconds: repairs of ours, writes of Felix's, what status tells of contention."""

    seconds: float
    repairs: int
    writes: int
    told: tuple[str, ...]


class War:
    """One node with both sides."""

    def __init__(self, daemon: Daemon, felix: Rival) -> None:
        self.daemon, self.felix = daemon, felix
        self._begun = time.monotonic()
        felix.do("rest")
        self._repairs, self._writes = self._status()["repairs"], felix.writes

    def _status(self) -> dict[str, Any]:
        status: dict[str, Any] = client.call(
            self.daemon.runtime_directory / "control.sock", {"command": "status"}, 20.0
        )
        return status

    def score(self) -> Score:
        """Since the beginning."""
        self.felix.do("rest")
        status = self._status()
        told = tuple(str(one["what"]) for one in status["contention"])
        seconds = time.monotonic() - self._begun
        return Score(seconds, status["repairs"] - self._repairs, self.felix.writes - self._writes, told)

    def until(self, good: Callable[[Score], bool], seconds: float) -> list[Score]:
        """The scores, one each tenth of a second, until one is good or the time is over."""
        scores = [self.score()]
        while not good(scores[-1]) and scores[-1].seconds < seconds:
            time.sleep(0.1)
            scores.append(self.score())
        return scores


@contextmanager
def war(backend: BackendName, position: str, clock: float) -> Iterator[War]:
    """With both sides at work; Felix has looked once since our rule came."""
    with calico(backend) as node, Daemon(node, _CONFIGURATION.format(backend=backend, position=position)) as daemon:
        daemon.wait_ready()
        played = felix(node, "Insert", clock)
        played.do("start")
        yield War(daemon, played)


def fought(backend: BackendName, position: str, seconds: float) -> str:
    """So many real seconds of it, in a line for people."""
    with war(backend, position, 1.0) as between:
        recognised = between.until(lambda score: bool(score.told), seconds)[-1]
        late = between.until(lambda score: score.seconds >= seconds - 60, seconds)[-1]
        end = between.until(lambda score: score.seconds >= seconds, seconds)[-1]
    words = f"after {recognised.writes} rounds" if recognised.told else "not at all"
    whole = f"{end.repairs} repairs and {end.writes} writes of Felix's in {end.seconds:.0f} s"
    minute = f"{end.repairs - late.repairs} and {end.writes - late.writes} in the last minute"
    return f"position {position}, {backend}: {whole}, {minute}; contention told {words}"
