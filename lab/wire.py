"""Packets made by hand, everything that arrives because of them, and what NFLOG rules in the node say about them.

Laws: nothing waits for silence. The last packet of an exchange is a ping, which always passes; one processor carries
them all, so that whatever the others caused has arrived when its answer is back. Arrival is what a raw socket is given:
behind INPUT for a packet to the namespace itself.

Run as `python -m lab.wire SPEC` within a node by `exchange`.
"""

import contextlib
import errno
import json
import os
import selectors
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lab.agent.namespaces import Namespaces
from lab.node import Node
from lab.waiting import LabError

ICMP, IGMP, IPIP, TCP, UDP, GRE, ICMPV6, SCTP = 1, 2, 4, 6, 17, 47, 58, 132

_CONFIG, _PACKET = 0x401, 0x400  # NFNL_SUBSYS_ULOG << 8 | NFULNL_MSG_CONFIG, ..._PACKET
_PREFIX = 10  # NFULA_PREFIX
_PATIENCE = 5.0


@dataclass(frozen=True, slots=True)
class Packet:
    """A packet from a namespace: `payload` follows the IP header, or, with a port, TCP's SYN or one UDP datagram.

    `device` is for groups and link-local addresses, which mean nothing without one.
    """

    ns: str
    to: str
    protocol: int
    payload: str = ""
    port: int = 0
    source: str = ""
    source_port: int = 0
    device: str = ""


@dataclass(frozen=True, slots=True)
class Arrival:
    """What a raw socket of a namespace was given: all that follows the IP header."""

    ns: str
    protocol: int
    source: str
    content: bytes

    @property
    def icmp(self) -> tuple[int, int]:
        """Type and code."""
        return self.content[0], self.content[1]

    @property
    def reset(self) -> bool:
        """Whether it is a TCP reset."""
        return self.protocol == TCP and bool(self.content[13] & 4)


@dataclass(frozen=True, slots=True)
class Exchange:
    """What a few packets came to; `seconds` is how long it all took."""

    arrivals: tuple[Arrival, ...]
    logged: tuple[str, ...]
    seconds: float

    def at(self, ns: str, protocol: int) -> list[Arrival]:
        """What arrived there of one IP protocol."""
        return [arrival for arrival in self.arrivals if (arrival.ns, arrival.protocol) == (ns, protocol)]

    def payloads(self, ns: str, protocol: int) -> set[str]:
        """The contents of what arrived there, in hexadecimal as they were sent."""
        return {arrival.content.hex() for arrival in self.at(ns, protocol)}


def icmp(kind: int, code: int = 0, body: bytes = b"\0" * 8) -> str:
    """An ICMP message with its checksum, as a payload; the kernel itself computes ICMPv6's."""
    plain = struct.pack(">BBH", kind, code, 0) + body
    return (plain[:2] + struct.pack(">H", _checksum(plain)) + plain[4:]).hex()


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF ^ total


def exchange(node: Node, packets: Sequence[Packet], *, fence: str) -> Exchange:
    """Send packets in their order, then a ping from the first one's namespace to `fence`, and wait for its answer.

    Told is what arrived in the packets' namespaces and in the node; LabError when the ping was not answered.
    """
    spec = {"fence": fence, "packets": [asdict(packet) for packet in packets]}
    told = node.run([node.python(), "-m", "lab.wire", json.dumps(spec)], timeout=30.0).stdout
    found = json.loads(told)
    if not found["fenced"]:
        raise LabError(f"no answer to the ping to {fence}: {found}")
    arrivals = (Arrival(ns, protocol, source, bytes.fromhex(text)) for ns, protocol, source, text in found["arrivals"])
    return Exchange(tuple(arrivals), tuple(found["logged"]), found["seconds"])


# --- within the node


class _Ears:
    """Raw sockets for every protocol in question, and the log, all read in one loop."""

    def __init__(self, six: bool) -> None:
        self.family = socket.AF_INET6 if six else socket.AF_INET
        self.arrivals: list[tuple[str, int, str, str]] = []
        self.logged: list[str] = []
        self._poll = selectors.DefaultSelector()

    def listen(self, sock: socket.socket, ns: str, protocol: int) -> None:
        """Note what this raw socket is given."""
        self._poll.register(sock, selectors.EVENT_READ, lambda: self._arrived(sock, ns, protocol))

    def _arrived(self, sock: socket.socket, ns: str, protocol: int) -> None:
        data, peer = sock.recvfrom(65536)
        if self.family == socket.AF_INET:
            data = data[(data[0] & 15) * 4 :]
        self.arrivals.append((ns, protocol, str(peer[0]).split("%")[0], data.hex()))

    def hear_log(self, sock: socket.socket) -> None:
        """Note what NFLOG says to group 0, its default, in the namespace of a netlink socket."""
        sock.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)  # SO_RCVBUFFORCE
        bind = struct.pack("=HHB3x", 5, 1, 1)  # NFULA_CFG_CMD: NFULNL_CFG_CMD_BIND
        mode = struct.pack(">4s I BB2x", struct.pack("=HH", 10, 2), 0, 1, 0)  # NFULA_CFG_MODE: no payload
        each = struct.pack(">4s I", struct.pack("=HH", 8, 5), 1)  # NFULA_CFG_QTHRESH: message by message
        body = struct.pack(">BBH", 0, 0, 0) + bind + mode + each
        sock.send(struct.pack("=IHHII", 16 + len(body), _CONFIG, 5, 1, 0) + body)  # NLM_F_REQUEST | NLM_F_ACK
        if struct.unpack("=i", sock.recv(4096)[16:20])[0]:
            raise OSError("the log can't be heard: is somebody else listening?")
        self._poll.register(sock, selectors.EVENT_READ, lambda: self.logged.extend(_prefixes(sock.recv(65536))))

    def until(self, good: Callable[[], bool], end: float) -> bool:
        """Read until the condition holds, then what there is besides."""
        while not good() and time.monotonic() < end:
            self._read(end - time.monotonic())
        while self._read(0):
            pass
        return good()

    def _read(self, seconds: float) -> bool:
        ready = self._poll.select(max(0.0, seconds))
        for key, _ in ready:
            with contextlib.suppress(BlockingIOError):
                key.data()
        return bool(ready)


def _prefixes(data: bytes) -> Iterator[str]:
    """The prefixes in a datagram of log messages."""
    while len(data) >= 20:
        length, kind = struct.unpack("=IH", data[:6])
        attributes, data = data[20:length], data[(length + 3) & ~3 :]
        while kind == _PACKET and len(attributes) >= 4:
            size, name = struct.unpack("=HH", attributes[:4])
            if name == _PREFIX:
                yield attributes[4:size].rstrip(b"\0").decode()
            attributes = attributes[(size + 3) & ~3 :]


def _send(namespaces: Namespaces, family: int, packet: dict[str, Any]) -> socket.socket:
    """Send one; the socket is to be kept, for its end could cause packets as well."""
    kind = socket.SOCK_RAW
    if packet["port"]:
        kind = socket.SOCK_STREAM if packet["protocol"] == TCP else socket.SOCK_DGRAM
    protocol = packet["protocol"] if kind == socket.SOCK_RAW else 0
    sock = namespaces.socket(packet["ns"], family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    if packet["device"]:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, packet["device"].encode())
    if packet["source"] or packet["source_port"]:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((packet["source"], packet["source_port"]))
    to = (packet["to"], packet["port"])
    if kind == socket.SOCK_STREAM:
        if sock.connect_ex(to) not in (0, errno.EINPROGRESS):
            raise OSError(f"no SYN to {to}")
    else:
        with contextlib.suppress(PermissionError):  # its own OUTPUT may say no
            sock.sendto(bytes.fromhex(packet["payload"]), to)
    return sock


def _main(spec: dict[str, Any]) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    started = time.monotonic()
    packets, fence = spec["packets"], spec["fence"]
    ears, namespaces = _Ears(":" in fence), Namespaces()
    ping, pong = (ICMPV6, 129) if ":" in fence else (ICMP, 0)
    protocols = {packet["protocol"] for packet in packets} | {ping}
    for ns in {"node", *(packet["ns"] for packet in packets)}:
        for protocol in protocols:
            ears.listen(namespaces.socket(ns, ears.family, socket.SOCK_RAW, protocol), ns, protocol)
    ears.hear_log(namespaces.socket("node", socket.AF_NETLINK, socket.SOCK_RAW, 12))
    kept = [_send(namespaces, ears.family, packet) for packet in packets]
    body = os.urandom(4) + b"fence..."
    last = Packet(packets[0]["ns"], fence, ping, icmp(128 if pong else 8, body=body))
    kept.append(_send(namespaces, ears.family, asdict(last)))

    def answered() -> bool:
        return any(
            (ns, protocol) == (last.ns, ping) and text.startswith(f"{pong:02x}") and text.endswith(body.hex())
            for ns, protocol, _, text in ears.arrivals
        )

    fenced = ears.until(answered, time.monotonic() + _PATIENCE)
    found = {"fenced": fenced, "arrivals": ears.arrivals, "logged": ears.logged}
    print(json.dumps(found | {"seconds": time.monotonic() - started}))


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
