"""Throw-away nodes to measure in: with foreign rules, with a nodewalld, and with the process that works inside.

Law: everything lives in nodes of the package `lab` and dies with them.
"""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.crowd import sync
from lab.daemon import Daemon
from lab.node import BackendName, Node
from lab.waiting import LabError
from nodewalld.service import client

PORT = 31002
"""Guarded in mangle and, for routed packets, by the jump in filter FORWARD that the bench displaces."""

_CONFIGURATION = """\
[daemon]
backend = "{backend}"
resync = "{resync}"

[set.friends]
entries = ["10.90.0.7", "fd90::7"]

[[port]]
name = "vault"
ports = [{port}]
allow = ["@friends"]

[[port]]
name = "kubelet"
ports = [10250]
action = "reject"

[[rule]]
name = "transit"
table = "filter"
chain = "FORWARD"
rule = "-p udp --dport {port} -j DROP"
position = "first"
"""
_LIMIT = 600.0  # seconds for one command inside


def configuration(backend: BackendName = "nft", *, resync: str = "30s") -> str:
    """What most rows are measured with."""
    return _CONFIGURATION.format(backend=backend, resync=resync, port=PORT)


@dataclass
class Stage:
    """The nodes of a run. Crowded ones, dear to build, are kept for the rows to come."""

    python: str = field(default_factory=Node.python)
    _nodes: dict[int, Node] = field(default_factory=dict)
    _numbers: int = 0
    _stack: ExitStack = field(default_factory=ExitStack)

    def crowded(self, rules: int) -> Node:
        """A node (nft) with so many foreign rules in nat."""
        if rules not in self._nodes:
            node = self._stack.enter_context(Node("nft"))
            write(node, "crowd", sync(rules))
            if rules:
                node.run("iptables-nft-restore --noflush < /run/crowd", timeout=_LIMIT)
            self._nodes[rules] = node
        return self._nodes[rules]

    @contextmanager
    def daemon(self, node: Node, config: str | dict[str, str]) -> Iterator[Daemon]:
        """A nodewalld that is ready and at rest; afterwards its rules are taken out and it is stopped."""
        self._numbers += 1
        with Daemon(node, config, name=f"nodewalld-{self._numbers}") as daemon:
            daemon.wait_ready(timeout=120)
            try:
                yield daemon
            finally:
                if daemon.running:
                    client.call(daemon.runtime_directory / "control.sock", {"command": "remove"}, _LIMIT)
                    daemon.stop()

    def close(self) -> None:
        """Take all nodes away."""
        self._nodes.clear()
        self._stack.close()


def write(node: Node, name: str, text: str) -> str:
    """Put a file into the node's /run; its path there."""
    node.run(f"cat > /run/{name}", stdin=text)
    return f"/run/{name}"


def inside(node: Node, command: str, **arguments: Any) -> dict[str, Any]:
    """Let the process within the node do something; see the module `inside`. Raises LabError."""
    argv = [node.python(), "-m", "bench.inside", command, json.dumps(arguments)]
    answer = json.loads(node.run(argv, timeout=_LIMIT).stdout)
    if not isinstance(answer, dict):
        raise LabError(f"{command} answered {answer!r}")
    return answer


def cpu_ms(pid: int) -> float:
    """Processor time so far of a process's threads, to the nanosecond, and of the children it has waited for."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    own = sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads)
    children = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[13:15]
    return own / 1e6 + sum(map(int, children)) * 1000 / os.sysconf("SC_CLK_TCK")


def resident_mib(pid: int) -> float:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / (1 << 20)


def inner_number(pid: int) -> int:
    """How a process is numbered within its node."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("NSpid:"):
            return int(line.split()[-1])
    raise LabError(f"process {pid} has no number in its node")
