"""Packets through a node, and what became of them.

`serve` puts listeners anywhere in a node; `connect` sends real packets and returns the network's verdict;
`Connection` keeps one flow open.
"""

import ipaddress
import json
import os
import select
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal
from weakref import WeakKeyDictionary

from lab.node import Node
from lab.waiting import LabError

Protocol = Literal["tcp", "udp", "sctp", "icmp"]
Target = tuple[str, int]

PATIENCE = 0.2
"""Seconds of silence until "timeout". Three packets are sent meanwhile, and the agent answers whatever the
kernel delivered before it looks at the clock, so a busy machine does not turn "open" into "timeout"."""

_ANSWER_TIME = 30.0


class Verdict(StrEnum):
    """What became of an attempt, as its sender sees it."""

    OPEN = "open"
    REFUSED = "refused"  # a TCP reset, an SCTP abort, ICMP port or protocol unreachable
    TIMEOUT = "timeout"  # silence
    UNREACHABLE = "unreachable"  # another ICMP error, or no route
    FORBIDDEN = "forbidden"  # EPERM: dropped or rejected in the sender's own OUTPUT


@dataclass(frozen=True, slots=True)
class Answer:
    """A verdict, and the greeting of whoever answered: `server` is its namespace, `peer` whom it saw."""

    verdict: Verdict
    error: str = ""
    server: str = ""
    port: int = 0
    peer: str = ""
    seconds: float = 0.0

    @property
    def open(self) -> bool:
        """Whether somebody answered."""
        return self.verdict is Verdict.OPEN

    def __str__(self) -> str:
        return f"{self.verdict} {self.error or self.server}".strip()


@dataclass(frozen=True, slots=True)
class Probe:
    """One attempt: from which namespace and source address, to whom. For ICMP the port means nothing."""

    ns: str
    to: Target
    source: str = ""
    protocol: Protocol = "tcp"
    source_port: int = 0
    interface: str = ""  # for multicast and broadcast; eth0 when empty


class _Agent:
    """The process within the node that does what this module is asked; usable from several threads."""

    def __init__(self, node: Node) -> None:
        self._process = node.popen(
            [node.python(), "-S", "-m", "lab.agent", "serve"],
            log="agent",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise LabError("the agent has no pipes")
        self._in, self._out = stdin.fileno(), stdout.fileno()
        self._log = node.logs["agent"]
        self._writing = threading.Lock()
        self._reading = threading.Lock()
        self._answers: dict[int, dict[str, Any]] = {}
        self._buffer = b""
        self._number = 0

    def ask(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Hand over requests that run side by side; return their answers in the same order."""
        with self._writing:
            numbers = range(self._number + 1, self._number + 1 + len(requests))
            self._number += len(requests)
            lines = [
                json.dumps({"id": number, **request}) + "\n" for number, request in zip(numbers, requests, strict=True)
            ]
            data = "".join(lines).encode()
            while data:
                data = data[os.write(self._in, data) :]
        end = time.monotonic() + _ANSWER_TIME
        return [self._wait(number, end) for number in numbers]

    def _wait(self, number: int, end: float) -> dict[str, Any]:
        while True:
            with self._reading:
                answer = self._answers.pop(number, None)
                if answer is None:
                    self._read(end)
            if answer is not None:
                if "failed" in answer:
                    raise LabError(answer["failed"])
                return answer

    def _read(self, end: float) -> None:
        if not select.select([self._out], [], [], max(0.0, end - time.monotonic()))[0]:
            raise LabError("the agent does not answer:\n" + self._log.read_text())
        data = os.read(self._out, 1 << 20)
        if not data:
            raise LabError("the agent has died:\n" + self._log.read_text())
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            answer = json.loads(line)
            self._answers[answer["id"]] = answer


_agents: WeakKeyDictionary[Node, _Agent] = WeakKeyDictionary()
_starting = threading.Lock()


def _agent(node: Node) -> _Agent:
    with _starting:
        if node not in _agents:
            _agents[node] = _Agent(node)
        return _agents[node]


def _ports(tcp: Iterable[int], udp: Iterable[int], sctp: Iterable[int]) -> list[tuple[str, int]]:
    by_protocol = (("tcp", tcp), ("udp", udp), ("sctp", sctp))
    return [(protocol, port) for protocol, ports in by_protocol for port in ports]


def serve(node: Node, ns: str, *, tcp: Iterable[int] = (), udp: Iterable[int] = (), sctp: Iterable[int] = ()) -> None:
    """Listen on these ports of a namespace, on all its addresses; they listen when this returns.

    Everybody who comes is greeted with "NAMESPACE PORT PEER"; later lines are echoed. SCTP is played by the
    lab (INIT and INIT ACK, no more), so that it works on kernels without SCTP sockets.
    """
    _agent(node).ask([{"do": "listen", "ns": ns, "ports": _ports(tcp, udp, sctp)}])


def unserve(node: Node, ns: str, *, tcp: Iterable[int] = (), udp: Iterable[int] = (), sctp: Iterable[int] = ()) -> None:
    """Take listeners away again."""
    _agent(node).ask([{"do": "close", "ns": ns, "ports": _ports(tcp, udp, sctp)}])


def serve_cluster(node: Node) -> None:
    """Listen where the captured rulesets lead, and where nodes usually do.

    Pods: 80, 8080 and 8081/tcp, 53/udp. Node: ssh, etcd, kube-apiserver, kubelet and 31002/udp.
    """
    listening = [
        {"do": "listen", "ns": ns, "ports": _ports(tcp, udp, ())}
        for ns, tcp, udp in (
            ("pod1", (80, 8080, 8081), (53,)),
            ("pod2", (80, 8080, 8081), (53,)),
            ("node", (22, 2379, 2380, 6443, 10250), (31002,)),
            ("beyond", (443, 31002), (31002,)),
        )
    ]
    _agent(node).ask(listening)


def _is_group(address: str) -> bool:
    """Whether answers come from another address than the one dialled: multicast, broadcast, anycast."""
    parsed = ipaddress.ip_address(address)
    if parsed.is_multicast or address.endswith(".255"):
        return True
    return parsed.version == 6 and int(parsed) & 0xFFFFFFFFFFFFFFFF == 0 and not parsed.is_unspecified


def connect_all(node: Node, probes: Sequence[Probe], *, timeout: float = PATIENCE) -> list[Answer]:
    """Make many attempts at the same time; silence costs its time only once."""
    requests = [
        {
            "do": "call",
            "ns": probe.ns,
            "to": probe.to[0],
            "port": probe.to[1],
            "source": probe.source,
            "source_port": probe.source_port,
            "protocol": probe.protocol,
            "interface": probe.interface or (node.uplink if probe.ns == "node" else ""),
            "group": _is_group(probe.to[0]),
            "timeout": timeout,
        }
        for probe in probes
    ]
    return [_answer(content) for content in _agent(node).ask(requests)]


def _answer(content: Mapping[str, Any]) -> Answer:
    words = str(content["greeting"]).split()
    greeted = len(words) >= 3 and words[1].isdigit()
    return Answer(
        Verdict(content["verdict"]),
        error=content["error"],
        server=words[0] if greeted else "",
        port=int(words[1]) if greeted else 0,
        peer=words[2] if greeted else "",
        seconds=content["seconds"],
    )


def connect(
    node: Node,
    ns: str,
    *,
    to: Target,
    source: str = "",
    protocol: Protocol = "tcp",
    source_port: int = 0,
    interface: str = "",
    timeout: float = PATIENCE,
) -> Answer:
    """Try to reach `to` from a namespace of the node, by default from its own choice of source address.

    An open door answers in about a millisecond; silence takes `timeout`. UDP reaches multicast, broadcast and
    anycast addresses as well, and takes whoever answers.
    """
    probe = Probe(ns, to, source, protocol, source_port, interface)
    return connect_all(node, [probe], timeout=timeout)[0]


class Connection:
    """A flow that stays open, as an ssh session does: `alive()` sends a line and waits for its echo."""

    def __init__(
        self,
        node: Node,
        ns: str,
        *,
        to: Target,
        source: str = "",
        protocol: Literal["tcp", "udp"] = "tcp",
        source_port: int = 0,
        timeout: float = 5.0,
    ) -> None:
        self._agent = _agent(node)
        content = self._agent.ask(
            [
                {"do": "call", "ns": ns, "to": to[0], "port": to[1], "source": source, "keep": True}
                | {"source_port": source_port, "protocol": protocol, "timeout": timeout}
            ]
        )[0]
        self.answer = _answer(content)
        if not self.answer.open:
            raise LabError(f"no {protocol} connection from {source or ns} to {to}: {self.answer}")
        self._number = content["connection"]

    def alive(self, *, timeout: float = 3.0) -> bool:
        """Whether a line comes back within `timeout`; TCP repeats what is lost on the way."""
        return bool(self.echo(timeout=timeout)["alive"])

    def echo(self, *, timeout: float = 3.0) -> dict[str, Any]:
        """Like `alive`, with the reason in "error" and the time that it took in "seconds"."""
        return self._agent.ask([{"do": "echo", "connection": self._number, "timeout": timeout}])[0]

    def close(self) -> None:
        """Hang up."""
        self._agent.ask([{"do": "hangup", "connection": self._number}])


def notrack(node: Node, *, port: int, protocol: str = "tcp", ns: str = "node") -> None:
    """Let conntrack overlook a port of that namespace, in both directions and both families.

    The rules are foreign ones, put on top of raw PREROUTING and OUTPUT in the node's backend.
    """
    for tool in ("iptables", "ip6tables"):
        for chain in ("PREROUTING", "OUTPUT"):
            for side in ("--dport", "--sport"):
                command = f"{tool} -w -t raw -I {chain} -p {protocol} {side} {port} -j CT --notrack"
                node.run(command.split(), ns=ns)
