"""Thousands of numbered packets a second through a node, and exactly which of them passed, and when.

Times are `time.monotonic()` of this machine: all namespaces share that clock.
"""

import array
import base64
import json
import select
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

from lab.node import Node
from lab.processes import kill_entered
from lab.traffic import Target
from lab.waiting import LabError


@dataclass(frozen=True, slots=True)
class FloodReport:
    """What a flood came to. Packet n was sent at `sent_at[n]`; `passed` holds (n, when, at which sink).

    `errors` counts what the sender's own kernel refused to send, by errno name. Packet n was sent to
    `ports[n % len(ports)]`.
    """

    sent_at: Sequence[float]
    passed: Sequence[tuple[int, float, str]]
    errors: Mapping[str, int] = field(default_factory=dict)
    ports: Sequence[int] = ()

    @property
    def sent(self) -> int:
        """How many packets were sent."""
        return len(self.sent_at)

    @property
    def received(self) -> int:
        """How many arrived, repeated ones counted once."""
        return len({number for number, _, _ in self.passed})

    def port_of(self, number: int) -> int:
        """The port that a packet was sent to."""
        return self.ports[number % len(self.ports)]

    def sent_between(self, since: float, until: float = float("inf")) -> list[int]:
        """The numbers of the packets sent in that time."""
        return [number for number, when in enumerate(self.sent_at) if since <= when <= until]

    def passed_between(self, since: float = 0.0, until: float = float("inf")) -> list[int]:
        """The numbers, in order, of the packets sent in that time that arrived."""
        return sorted({number for number, _, _ in self.passed if since <= self.sent_at[number] <= until})

    def passed_to(self, port: int, since: float = 0.0, until: float = float("inf")) -> list[int]:
        """The same of one of the ports."""
        return [number for number in self.passed_between(since, until) if self.port_of(number) == port]

    def lost_between(self, since: float = 0.0, until: float = float("inf")) -> list[int]:
        """The numbers of the packets sent in that time that never arrived."""
        arrived = {number for number, _, _ in self.passed}
        return [number for number in self.sent_between(since, until) if number not in arrived]

    def ranges(self) -> list[tuple[int, int]]:
        """The runs of consecutive numbers that arrived, first and last of each."""
        runs: list[tuple[int, int]] = []
        for number in self.passed_between():
            if runs and runs[-1][1] == number - 1:
                runs[-1] = (runs[-1][0], number)
            else:
                runs.append((number, number))
        return runs

    def leaks(self) -> list[tuple[float, float]]:
        """The times during which packets passed: (first sent, last sent) of each run."""
        return [(self.sent_at[first], self.sent_at[last]) for first, last in self.ranges()]


class Flood:
    """A steady stream of numbered packets towards `to`, counted where they should (or should not) arrive.

    UDP sends datagrams to sockets bound in the namespaces `sinks`. With `more` (UDP only), other ports there or other
    targets, each of another port, the packets go to one after the other. TCP sends SYNs, and counts them on raw
    sockets: so a NodePort that is TCP can be watched without connecting. The packets come from `source_ports` different
    ports in turn (0: TCP 64, UDP one), each a connection of its own. `sink_port` is the port after DNAT. The sink is
    read after each packet sent: what the report counts is exact.
    """

    def __init__(
        self,
        node: Node,
        ns: str,
        *,
        to: Target,
        source: str = "",
        protocol: Literal["tcp", "udp"] = "udp",
        sinks: Sequence[str] = ("node",),
        sink_port: int = 0,
        more: Sequence[int | Target] = (),
        rate: float = 5000.0,
        source_port: int = 0,
        source_ports: int = 0,
    ) -> None:
        self._node = node
        targets = [to, *(other if isinstance(other, tuple) else (to[0], other) for other in more)]
        self._ports = tuple(port for _, port in targets)
        self._spec = {
            "ns": ns,
            "to": [address for address, _ in targets],
            "ports": self._ports,
            "source": source,
            "protocol": protocol,
            "sinks": list(sinks),
            "sink_ports": [sink_port or to[1], *self._ports[1:]],
            "rate": rate,
            "source_port": source_port,
            "source_ports": source_ports,
        }
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> Self:
        """Start; the first packet is on its way when this returns."""
        self._process = self._node.popen(
            [self._node.python(), "-S", "-m", "lab.agent", "flood", json.dumps(self._spec)],
            log="flood",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        out = self._process.stdout
        if out is None or not select.select([out], [], [], 20)[0] or out.readline() != "ready\n":
            raise LabError("the flood did not start:\n" + self._node.logs["flood"].read_text())
        return self

    def stop(self) -> FloodReport:
        """Stop, wait for what is still on its way, and report."""
        process, self._process = self._process, None
        if process is None:
            raise LabError("the flood is not running")
        try:
            stdout, _ = process.communicate("stop\n", timeout=30)
        except subprocess.TimeoutExpired as error:
            kill_entered(process)
            raise LabError("the flood does not stop") from error
        if process.returncode:
            raise LabError("the flood has died:\n" + self._node.logs["flood"].read_text())
        report = json.loads(stdout)
        sinks = report["sinks"]
        passed = zip(
            _unpacked("q", report["numbers"]),
            _unpacked("d", report["times"]),
            (sinks[int(index)] for index in _unpacked("q", report["where"])),
            strict=True,
        )
        return FloodReport(
            sent_at=_unpacked("d", report["sent"]),
            passed=[(int(number), when, where) for number, when, where in passed],
            errors=report["errors"],
            ports=self._ports,
        )

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            kill_entered(self._process)
            self._process = None


def _unpacked(code: Literal["d", "q"], text: str) -> list[float]:
    values: array.array[float] = array.array(code)
    values.frombytes(base64.b64decode(text))
    return values.tolist()
