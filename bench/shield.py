"""What the shield costs the packets that it lets through: a flow through the node, with it and without it in turn.

Law: both are measured one after the other, again and again, so that whatever else the machine does meets both; what
counts is the difference within each pair.
"""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from bench.figures import median
from bench.results import FULL, Outcome, Result, Scale
from bench.stage import Stage
from lab.daemon import Daemon
from lab.layout import ALLOWED, BEYOND
from lab.node import Node
from lab.processes import kill_entered
from lab.waiting import LabError
from nodewalld.service import client

_PORTS, _FIRST = 100, 20_000
_JUDGED = 20_050  # judged, and allowed by the set
_CONNECTIONS = 5  # of each kind in a run: what a TCP connection costs depends on how it happens to settle
_TIMES = {"udp": 10_000, "tcp": 3_000}  # of a full run, for each connection
_WHAT = {"udp": "a datagram of 64 bytes", "tcp": "64 KiB of a stream"}
_MODES = "auto", "off"


def cost(stage: Stage, scale: Scale) -> Outcome:
    """Processor time for a small datagram, and for a piece of a TCP stream."""
    entries = min(10_000, scale.set_size)
    set_file = "\n".join(f"10.{n >> 8 & 255}.{n & 255}.{n >> 16}/32" for n in range(entries)) + "\n"
    counts = {protocol: times * scale.runs // FULL.runs for protocol, times in _TIMES.items()}
    spent: dict[tuple[str, str], list[float]] = {(p, mode): [] for p in _TIMES for mode in _MODES}
    with Node("nft") as node, stage.daemon(node, _configuration(node, set_file)) as daemon, ExitStack() as stack:
        for protocol in _TIMES:
            stack.enter_context(_sink(node, protocol))
        for number in range(max(scale.runs * 4 // 3, 3) + 1):
            pair = dict.fromkeys(spent, 0.0)
            for part in range(_CONNECTIONS):
                for mode in _MODES if (number + part) % 2 else reversed(_MODES):
                    _set(daemon, mode)
                    for protocol, times in counts.items():
                        pair[protocol, mode] += _sent(node, protocol, times) / times / _CONNECTIONS * 1e6
            for which, one in pair.items():
                if number:  # the first pair warms up
                    spent[which].append(one)
    return Outcome([_result(p, spent[p, "auto"], spent[p, "off"], entries) for p in _TIMES])


def _result(protocol: str, shielded: list[float], bare: list[float], entries: int) -> Result:
    more = [100 * (a - b) / b for a, b in zip(shielded, bare, strict=True)]
    low, high = _interval(more)
    what = f"the shield: CPU for {_WHAT[protocol]} through the node, {_PORTS} ports, a set of {entries:,}"
    told = {"more, %": median(more), "at least, %": low, "at most, %": high}
    figure, without = median(shielded), median(bare)
    goal = "at most 3 % more"
    return Result("shield", what, figure, "µs CPU", goal, median(more), 3.0, without, "without it", len(more), told)


def _configuration(node: Node, entries: str) -> dict[str, str]:
    path = node.directory / "many"
    path.write_text(entries)
    ports = "".join(
        f'[[port]]\nname = "p{number}"\nports = [{number}]\nprotocol = ["tcp", "udp"]\n'
        'allow = ["@many"]\ndestination = "any"\n'
        for number in range(_FIRST, _FIRST + _PORTS)
    )
    sets = f'[set.many]\nfiles = ["{path}"]\nentries = ["{ALLOWED.ipv4}"]\n'
    return {"nodewalld.toml": f"{sets}{ports}", "conf.d/shield.toml": ""}


def _interval(sample: list[float]) -> tuple[float, float]:
    """Where the median lies with 95 % confidence, by the ranks of the sample (normal approximation of the binomial)."""
    ordered, half = sorted(sample), 0.98 * len(sample) ** 0.5
    middle = (len(sample) - 1) / 2
    return ordered[max(round(middle - half), 0)], ordered[min(round(middle + half), len(sample) - 1)]


def _set(daemon: Daemon, mode: str) -> None:
    (daemon.config_directory / "conf.d/shield.toml").write_text(f'[daemon]\nshield = "{mode}"\n')
    client.call(daemon.runtime_directory / "control.sock", {"command": "reload"}, 60.0)


@contextmanager
def _sink(node: Node, protocol: str) -> Iterator[None]:
    command = [node.python(), "-m", "bench.flow", "sink", protocol, str(_JUDGED)]
    sink = node.popen(command, ns="beyond", log=f"sink-{protocol}", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        if sink.stdout is None or sink.stdout.readline() != "ready\n":
            raise LabError("the sink does not listen")
        yield
    finally:
        kill_entered(sink)
        sink.communicate()


def _sent(node: Node, protocol: str, times: int) -> float:
    to = ALLOWED.ipv4, BEYOND.ipv4, str(_JUDGED)
    command = [node.python(), "-m", "bench.flow", "send", protocol, *to, str(times)]
    return float(node.run(command, ns="client").stdout)
