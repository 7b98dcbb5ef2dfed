"""Programs that can't be run here, played from what is known of them: they write what those write, when those do.

How they do it is in `lab.played`, which runs within the node.

    kube-proxy   writes its jumps on top where they are missing, and everything by one --noflush restore; looks each
                 30 s whether its canaries live, and begins anew when the one in mangle is gone
    felix        writes nothing while its jumps lead their chains (or end them, in Append mode); looks after each write
                 of its own, and each 90 s
    kube-router  forces its jumps to number 1, reads the whole filter table, and some time later writes it back
    flannel      looks each 5 s whether its rules are there, and appends them again
    docker28     deletes its two jumps and inserts them again, at its start and for each network
"""

import json
import select
import subprocess
from typing import NamedTuple

from lab.node import Node
from lab.waiting import LabError

PODS = {"iptables": "10.42.0.0/16", "ip6tables": "fd42::/48"}
POD1 = {"iptables": "10.42.0.2", "ip6tables": "fd42::2"}
PORTS = (31001, 31002, 31003)
"""UDP ports that every one of them lets through to pod1, or to the container on docker0."""

_ANSWER = 60.0


class Take(NamedTuple):
    """Rules that Felix has put into a chain, in the place that it wants: when it began to (time.time()), and where."""

    time: float
    tool: str
    table: str
    chain: str


class Rival:
    """One of them in a node; `clock` makes its own timetable that many times faster."""

    def __init__(self, node: Node, name: str, *, clock: float = 1.0, **options: str) -> None:
        self.name, self._node = name, node
        spec = {"name": name, "clock": clock, **options}
        command = [node.python(), "-m", "lab.played", json.dumps(spec)]
        self._process = node.popen(command, log=name, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.writes = 0
        self.takes: tuple[Take, ...] = ()

    def do(self, *words: str) -> None:
        """Have it do one thing now ("start", "sync", ...), to its end.

        `writes` says how often it has written since it was made, `takes` in which chains if it is Felix.
        """
        out, into = self._process.stdout, self._process.stdin
        if out is None or into is None:
            raise LabError(f"{self.name} has no pipes")
        into.write(" ".join(words) + "\n")
        into.flush()
        answered = select.select([out], [], [], _ANSWER)[0]
        line = out.readline() if answered else ""
        if not line:
            raise LabError(f"{self.name} does not answer:\n{self._node.logs[self.name].read_text()[-3000:]}")
        told = json.loads(line)
        self.writes, self.takes = told["writes"], tuple(Take(*take) for take in told["takes"])
