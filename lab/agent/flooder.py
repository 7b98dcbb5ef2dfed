"""Thousands of numbered packets a second, and exactly which of them arrived, and when.

Laws: packets go out one by one, at an even pace. The receiving side is emptied after every packet sent: so a packet's
time of arrival is true to some tens of microseconds, and the count is exact, as nothing is ever dropped for want of a
buffer.
"""

import array
import base64
import os
import selectors
import socket
import struct
import time
from typing import Any

from lab.agent.headers import behind_ip, internet_sum
from lab.agent.namespaces import Namespaces
from lab.agent.words import error_name, say

_IPV6_CHECKSUM = 7
_SO_RCVBUFFORCE = 33
_SO_SNDBUFFORCE = 32
_MAGIC_WINDOW = 4242  # tells a flood's SYNs from all others


class Flooder:
    """Numbered packets at an even pace, and the sinks that count them, in one loop."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec = spec
        self._namespaces = Namespaces()
        self._to = spec["to"]
        self._six = ":" in self._to[0]
        self._tcp = spec["protocol"] == "tcp"
        self._sent = array.array("d")
        self._numbers = array.array("q")
        self._times = array.array("d")
        self._where = array.array("q")
        self._errors: dict[str, int] = {}
        family = socket.AF_INET6 if self._six else socket.AF_INET
        kind = socket.SOCK_RAW if self._tcp else socket.SOCK_DGRAM
        protocol = socket.IPPROTO_TCP if self._tcp else 0
        self._sinks = []  # of each namespace one for each port
        for ns in spec["sinks"]:
            for port in spec["sink_ports"]:
                sink = self._namespaces.socket(ns, family, kind, protocol)
                sink.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 27)
                if not self._tcp:
                    sink.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    sink.bind(("", port))
                self._sinks.append(sink)
        self._many = not self._tcp and spec["source_ports"]  # a socket has one port: then headers are made by hand
        if self._many:
            kind, protocol = socket.SOCK_RAW, socket.IPPROTO_UDP
        self._sender = self._namespaces.socket(spec["ns"], family, kind, protocol)
        self._sender.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 1 << 24)
        if spec.get("source"):
            self._sender.bind((spec["source"], 0 if kind == socket.SOCK_RAW else spec.get("source_port") or 0))
        if kind == socket.SOCK_RAW and self._six:
            self._sender.setsockopt(socket.IPPROTO_IPV6, _IPV6_CHECKSUM, 16 if self._tcp else 6)
        if self._tcp and not self._six:
            self._sender.connect((self._to[0], 0))  # for the source address of the checksum
            source = socket.inet_aton(self._sender.getsockname()[0])
            self._base = internet_sum(source + socket.inet_aton(self._to[0]) + struct.pack(">HH", 6, 20))
            # A second socket sends: a connected raw one would also be given every TCP packet of the peer.
            self._sender.close()
            self._sender = self._namespaces.socket(spec["ns"], family, kind, protocol)
            self._sender.bind((socket.inet_ntoa(source), 0))

    def _packet(self, number: int) -> bytes:
        if not self._tcp:
            data = struct.pack(">Q", number)
            if not self._many:
                return data
            port = self._spec["ports"][number % len(self._spec["ports"])]
            return struct.pack(">HHHH", 20000 + number % self._many, port, 8 + len(data), 0) + data  # no checksum
        ports = self._spec["source_ports"] or 64
        sport = 40000 + number % ports
        head = struct.pack(">HHIIBBHHH", sport, self._spec["ports"][0], number, 0, 0x50, 2, _MAGIC_WINDOW, 0, 0)
        if self._six:
            return head
        total = self._base + internet_sum(head)
        total = (total & 0xFFFF) + (total >> 16)
        return head[:16] + struct.pack(">H", 0xFFFF ^ ((total & 0xFFFF) + (total >> 16))) + head[18:]

    def _drain(self) -> bool:
        """Count what has arrived; whether anything had."""
        any_yet = False
        for place, sink in enumerate(self._sinks):
            index = place // len(self._spec["sink_ports"])
            while True:
                try:
                    data = sink.recv(2048)
                except BlockingIOError:
                    break
                except OSError:
                    continue
                now = time.monotonic()
                if self._tcp:
                    head = behind_ip(data, six=self._six)[:16]
                    _, dport, number, _, _, flags, window = struct.unpack(">HHIIBBH", head)
                    if dport != self._spec["sink_ports"][0] or flags != 2 or window != _MAGIC_WINDOW:
                        continue
                elif len(data) == 8:
                    number = struct.unpack(">Q", data)[0]
                else:
                    continue
                any_yet = True
                self._numbers.append(number)
                self._times.append(now)
                self._where.append(index)
        return any_yet

    def run(self) -> None:
        """Flood until a line or the end comes on standard input; then print the report."""
        os.set_blocking(0, False)
        raw = self._tcp or self._many
        ports = self._spec["ports"]
        targets = [(to, 0 if raw else port) for to, port in zip(self._to, ports, strict=True)]
        interval = 1.0 / self._spec["rate"]
        poll = selectors.SelectSelector()  # epoll rounds each wait up to a millisecond: then ten packets come at once
        poll.register(0, selectors.EVENT_READ)
        for sink in self._sinks:
            poll.register(sink, selectors.EVENT_READ)
        os.write(1, b"ready\n")
        due = time.monotonic()
        number = 0
        stopping = False
        while not stopping:
            now = time.monotonic()
            if now - due > 0.05:  # the machine stood still: do not make up for it with a burst
                due = now
            while due <= now:
                self._sent.append(time.monotonic())
                try:
                    self._sender.sendto(self._packet(number), targets[number % len(targets)])
                except OSError as error:
                    name = error_name(error)
                    self._errors[name] = self._errors.get(name, 0) + 1
                number += 1
                due += interval
                self._drain()
                now = time.monotonic()
            for key, _ in poll.select(max(0.0, due - time.monotonic())):
                if key.fd == 0:
                    stopping = True
            self._drain()
        poll.unregister(0)
        quiet_since = time.monotonic()
        while time.monotonic() - quiet_since < 0.03:  # what is still on its way
            if poll.select(0.01) and self._drain():
                quiet_since = time.monotonic()
        report = {
            "errors": self._errors,
            "sinks": self._spec["sinks"],
            **{
                name: base64.b64encode(values.tobytes()).decode()
                for name, values in (
                    ("sent", self._sent),
                    ("numbers", self._numbers),
                    ("times", self._times),
                    ("where", self._where),
                )
            },
        }
        say(report)
