"""Attempts to reach somebody: each ends in exactly one verdict."""

import contextlib
import errno
import os
import selectors
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lab.agent.headers import SCTP, behind_ip, internet_sum, sctp_packet
from lab.agent.kept import ATTEMPTS, Kept
from lab.agent.loop import Loop
from lab.agent.namespaces import Namespaces
from lab.agent.words import error_name

_IP_RECVERR = 11
_IPV6_RECVERR = 25
_CONNECTED_PATIENCE = 3.0  # a connection that stands gets this long for its greeting
_VERDICTS = {
    errno.ECONNREFUSED: "refused",
    errno.ECONNRESET: "refused",
    errno.ENOPROTOOPT: "refused",
    errno.EPROTO: "refused",
    errno.EPIPE: "refused",
    errno.EPERM: "forbidden",
    errno.ETIMEDOUT: "timeout",
}

Answer = Callable[[dict[str, Any]], None]


class Calls:
    """All attempts of one agent."""

    def __init__(self, namespaces: Namespaces, loop: Loop, kept: Kept) -> None:
        self.namespaces = namespaces
        self.loop = loop
        self.kept = kept
        self._number = 0

    def make(self, request: Mapping[str, Any], answer: Answer) -> None:
        """Begin one; it answers when it has ended."""
        Call(self, request, answer)

    def fresh_port(self) -> int:
        """A port for packets that are made by hand."""
        self._number += 1
        return 20000 + self._number % 10000


class Call:
    """One attempt to reach somebody: ends in exactly one verdict."""

    def __init__(self, calls: Calls, request: Mapping[str, Any], answer: Answer) -> None:
        self._calls = calls
        self._loop = calls.loop
        self._request = request
        self._answer = answer
        self._ns: str = request["ns"]
        self._to: str = request["to"]
        self._port: int = request["port"]
        self._source: str = request.get("source") or ""
        self._source_port: int = request.get("source_port") or 0
        self._keep: bool = request.get("keep") or False
        self._group: bool = request.get("group") or False
        self._timeout: float = request["timeout"]
        self._six = ":" in self._to
        self._sockets: list[socket.socket] = []
        self._standing = False
        self._done = False
        self._started = time.monotonic()
        try:
            getattr(self, "_" + request["protocol"])()
        except OSError as error:
            self._failed(error)
        if not self._done:
            self._loop.after(self._timeout, self._silent)

    def _finish(self, verdict: str, greeting: bytes = b"", error: str = "", keep: socket.socket | None = None) -> None:
        if self._done:
            return
        self._done = True
        for sock in self._sockets:
            if sock is not keep:
                self._loop.forget(sock)
        answer: dict[str, Any] = {"verdict": verdict, "greeting": greeting.decode(errors="replace")}
        answer |= {"error": error, "seconds": time.monotonic() - self._started}
        if keep is not None:
            answer["connection"] = self._calls.kept.keep(keep)
        self._answer(answer)

    def _failed(self, error: OSError) -> None:
        self._finish(_VERDICTS.get(error.errno or 0, "unreachable"), error=error_name(error))

    def _silent(self) -> None:
        if self._standing:  # the handshake is done: leave a slow greeting more time
            self._loop.after(_CONNECTED_PATIENCE, lambda: self._finish("timeout", error="no greeting"))
        else:
            self._finish("timeout")

    def _attempts(self, send: Callable[[], None]) -> None:
        """Send now, and again while nothing has come back."""

        def again() -> None:
            if self._done or self._standing:
                return
            try:
                send()
            except BlockingIOError:
                pass
            except OSError as error:
                self._failed(error)

        send()
        for number in range(1, ATTEMPTS):
            self._loop.after(self._timeout * number / ATTEMPTS, again)

    def _bound(self, kind: int, protocol: int = 0) -> socket.socket:
        family = socket.AF_INET6 if self._six else socket.AF_INET
        sock = self._calls.namespaces.socket(self._ns, family, kind, protocol)
        self._sockets.append(sock)
        if not self._keep:  # hear every ICMP error; a lasting flow must bear some, as others do
            if self._six:
                sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)
            else:
                sock.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
        if self._source or self._source_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((self._source, 0 if kind == socket.SOCK_RAW else self._source_port))
        return sock

    def _heard(self, sock: socket.socket, ours: Callable[[bytes], bool]) -> Iterator[bytes]:
        """What has come to a raw socket, until the call has ended; at most a hundred packets at a time.

        An ICMP error ends the call if it quotes a packet that is `ours`: such a socket hears of its neighbours' too.
        """
        for _ in range(100):
            try:
                data = sock.recv(65536)
            except BlockingIOError:
                return
            except OSError as error:
                if any(ours(quoted) for quoted in _refusals(sock)):
                    self._failed(error)
                return
            yield behind_ip(data, six=self._six)
            if self._done:
                return

    # --- tcp

    def _tcp(self) -> None:
        if self._source_port or self._keep:
            self._tcp_once()
        else:
            self._attempts(self._tcp_once)

    def _tcp_once(self) -> None:
        sock = self._bound(socket.SOCK_STREAM)
        if not self._keep:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        number = sock.connect_ex((self._to, self._port))
        if number not in (0, errno.EINPROGRESS):
            self._failed(OSError(number, os.strerror(number)))
            return
        received = bytearray()

        def read() -> None:
            try:
                data = sock.recv(4096)
            except BlockingIOError:
                return
            except OSError as error:
                self._failed(error)
                return
            received.extend(data)
            if received.endswith(b"\n") or not data:
                self._finish("open", bytes(received), keep=sock if self._keep else None)

        def connected() -> None:
            number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if number:
                self._failed(OSError(number, os.strerror(number)))
                return
            self._standing = True
            self._loop.watch(sock, selectors.EVENT_READ, read)
            read()

        self._loop.watch(sock, selectors.EVENT_WRITE, connected)

    # --- udp

    def _udp(self) -> None:
        sock = self._bound(socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        self._multicast_link(sock)
        target = (self._to, self._port)
        if not self._group:  # one answers from a member's own address, which a connected socket would not accept
            sock.connect(target)
        payload = str(self._request.get("payload") or "").encode()

        def read() -> None:
            try:
                data, _ = sock.recvfrom(65536)
            except BlockingIOError:
                return
            except OSError as error:
                self._failed(error)
                return
            self._finish("open", data, keep=sock if self._keep else None)

        self._loop.watch(sock, selectors.EVENT_READ, read)
        self._attempts(lambda: _ignore(sock.sendto(payload, target) if self._group else sock.send(payload)))

    def _multicast_link(self, sock: socket.socket) -> None:
        """Send to groups by the namespace's first link (eth0 everywhere but on the node)."""
        if not self._group:
            return
        index = socket.if_nametoindex(self._request.get("interface") or "eth0")
        if self._six:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
        else:
            sock.setsockopt(
                socket.IPPROTO_IP, socket.IP_MULTICAST_IF, struct.pack("=4s4si", b"\0" * 4, b"\0" * 4, index)
            )

    # --- sctp

    def _sctp(self) -> None:
        sock = self._bound(socket.SOCK_RAW, SCTP)
        sock.connect((self._to, 0))
        port = self._source_port or self._calls.fresh_port()
        tag = port * 65537
        body = struct.pack(">IIHHI", tag, 65536, 1, 1, tag)
        packet = sctp_packet(port, self._port, 0, 1, body)

        def read() -> None:
            for data in self._heard(sock, lambda quoted: quoted[:2] == packet[:2]):
                if len(data) < 16 or struct.unpack(">HHI", data[:8]) != (self._port, port, tag):
                    continue
                if data[12] == 2:
                    length = struct.unpack(">H", data[14:16])[0]
                    self._finish("open", data[12 + 4 + 16 + 4 : 12 + length])
                elif data[12] == 6:
                    self._finish("refused", error="ABORT")

        self._loop.watch(sock, selectors.EVENT_READ, read)
        self._attempts(lambda: _ignore(sock.send(packet)))

    # --- icmp echo

    def _icmp(self) -> None:
        sock = self._bound(socket.SOCK_RAW, socket.IPPROTO_ICMPV6 if self._six else socket.IPPROTO_ICMP)
        sock.connect((self._to, 0))
        number = self._calls.fresh_port()
        packet = struct.pack(">BBHHH", 128 if self._six else 8, 0, 0, number, 1)
        if not self._six:
            packet = packet[:2] + struct.pack(">H", 0xFFFF ^ internet_sum(packet)) + packet[4:]

        def read() -> None:
            for data in self._heard(sock, lambda quoted: quoted[4:6] == packet[4:6]):
                if len(data) >= 8 and data[0] == (129 if self._six else 0) and data[4:6] == packet[4:6]:
                    self._finish("open")

        self._loop.watch(sock, selectors.EVENT_READ, read)
        self._attempts(lambda: _ignore(sock.send(packet)))


def _refusals(sock: socket.socket) -> list[bytes]:
    """The packets that ICMP errors quote on a raw socket, which hears of those of its neighbours as well."""
    quoted = []
    with contextlib.suppress(OSError):
        while True:
            quoted.append(sock.recvmsg(65536, 1024, socket.MSG_ERRQUEUE)[0])
    return quoted


def _ignore(_: object) -> None:
    """For calls whose result says nothing."""
