"""The lab's hand inside a node: one process that opens sockets in all of its network namespaces.

Run as a script within the node (never imported): `agent.py serve` reads requests and prints answers, one JSON
object a line; `agent.py flood SPEC` sends numbered packets and counts what arrives. A socket belongs to the
namespace in which it was made, so one loop can be server and client at once. That is what makes the verdicts
trustworthy: "timeout" is said only after everything that the kernel has delivered has also been answered.
"""

import array
import base64
import contextlib
import ctypes
import errno
import heapq
import json
import os
import selectors
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

_CLONE_NEWNET = 0x40000000
_IP_PKTINFO = 8
_IPV6_RECVPKTINFO = 49
_IPV6_PKTINFO = 50
_IPV6_CHECKSUM = 7
_IP_RECVERR = 11
_IPV6_RECVERR = 25
_SO_RCVBUFFORCE = 33
_SO_SNDBUFFORCE = 32
_SCTP = 132
_CONNECTED_PATIENCE = 3.0  # a connection that stands gets this long for its greeting
_ATTEMPTS = 3  # packets sent before silence counts
_MAGIC_WINDOW = 4242  # tells a flood's SYNs from all others

_libc = ctypes.CDLL(None, use_errno=True)


class Namespaces:
    """The node's network namespaces by name; the process walks between them."""

    def __init__(self) -> None:
        self._open = {"node": os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)}
        self._here = "node"

    def enter(self, name: str) -> None:
        """Make sockets of that namespace from now on."""
        if name == self._here:
            return
        if name not in self._open:
            self._open[name] = os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)
        if _libc.setns(self._open[name], _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns " + name)
        self._here = name

    def socket(self, name: str, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """A non-blocking socket in that namespace."""
        self.enter(name)
        made = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
        if family == socket.AF_INET6 and kind != socket.SOCK_RAW:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        return made


class Loop:
    """Readiness before time: a timer fires only when no socket has anything left to say."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def watch(self, sock: socket.socket | int, events: int, call: Callable[[], None]) -> None:
        """Call whenever the socket is ready; a second call replaces the first."""
        try:
            self._selector.modify(sock, events, call)
        except KeyError:
            self._selector.register(sock, events, call)

    def pause(self, sock: socket.socket) -> None:
        """Watch no more."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(sock)

    def forget(self, sock: socket.socket) -> None:
        """Watch no more, and close."""
        self.pause(sock)
        sock.close()

    def after(self, delay: float, call: Callable[[], None]) -> None:
        """Call once, not before `delay` seconds have passed."""
        self._count += 1
        heapq.heappush(self._timers, (time.monotonic() + delay, self._count, call))

    def run(self) -> NoReturn:
        """Turn until the process is killed or its standard input ends."""
        while True:
            due = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
            ready = self._selector.select(due)
            for _ in range(1000):  # a packet may cause others: empty the sockets before time counts
                if not ready:
                    break
                for key, _ in ready:
                    if self._selector.get_map().get(key.fd) == key:  # what came before may have closed it
                        key.data()
                ready = self._selector.select(0)
            now = time.monotonic()
            while self._timers and self._timers[0][0] <= now:
                heapq.heappop(self._timers)[2]()


def _family(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _ignore(_: object) -> None:
    """For calls whose result says nothing."""


def _spoken(peer: Any) -> str:
    return str(peer[0]).split("%")[0]


_CRC32C = [0] * 256
for _i in range(256):
    _c = _i
    for _ in range(8):
        _c = _c >> 1 ^ (0x82F63B78 if _c & 1 else 0)
    _CRC32C[_i] = _c


def _sctp_packet(sport: int, dport: int, tag: int, kind: int, body: bytes) -> bytes:
    """One SCTP packet with one chunk (RFC 9260), checksummed."""
    padding = b"\0" * (-len(body) % 4)
    chunk = struct.pack(">BBH", kind, 0, 4 + len(body)) + body + padding
    head = struct.pack(">HHI", sport, dport, tag)
    crc = 0xFFFFFFFF
    for byte in head + b"\0\0\0\0" + chunk:
        crc = crc >> 8 ^ _CRC32C[(crc ^ byte) & 0xFF]
    return head + struct.pack("<I", crc ^ 0xFFFFFFFF) + chunk


def _internet_sum(data: bytes) -> int:
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


class Servers:
    """Whoever listens: greets with "NAME PORT PEER", then echoes."""

    def __init__(self, namespaces: Namespaces, loop: Loop) -> None:
        self._namespaces = namespaces
        self._loop = loop
        self._listening: dict[tuple[str, str, int], list[socket.socket]] = {}
        self._sctp: dict[str, list[socket.socket]] = {}

    def listen(self, ns: str, protocol: str, port: int) -> None:
        """Listen on every address of both families; a port that is served already is left as it is."""
        key = (ns, protocol, port)
        if key in self._listening:
            return
        if protocol == "sctp":
            self._listening[key] = []
            self._open_sctp(ns)
            return
        kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
        made = []
        for family in (socket.AF_INET, socket.AF_INET6):
            sock = self._namespaces.socket(ns, family, kind)
            made.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("", port))
            if protocol == "tcp":
                sock.listen(1024)
                self._loop.watch(sock, selectors.EVENT_READ, self._accepter(sock, ns, port))
            else:
                if family == socket.AF_INET:
                    sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
                else:
                    sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO, 1)
                self._loop.watch(sock, selectors.EVENT_READ, self._answerer(sock, ns, port))
        self._listening[key] = made

    def close(self, ns: str, protocol: str, port: int) -> None:
        """Listen no more."""
        for sock in self._listening.pop((ns, protocol, port), []):
            self._loop.forget(sock)

    def _accepter(self, listener: socket.socket, ns: str, port: int) -> Callable[[], None]:
        def accept() -> None:
            try:
                sock, peer = listener.accept()
            except OSError:
                return
            sock.setblocking(False)
            with contextlib.suppress(OSError):
                sock.send(f"{ns} {port} {_spoken(peer)}\n".encode())

            def echo() -> None:
                try:
                    data = sock.recv(65536)
                    if data:
                        sock.send(data)
                except BlockingIOError:
                    return
                except OSError:
                    data = b""
                if not data:
                    self._loop.forget(sock)

            self._loop.watch(sock, selectors.EVENT_READ, echo)

        return accept

    def _answerer(self, sock: socket.socket, ns: str, port: int) -> Callable[[], None]:
        def answer() -> None:
            for _ in range(100):
                try:
                    data, extra, _, peer = sock.recvmsg(65536, 256)
                except BlockingIOError:
                    return
                except OSError:
                    continue
                _reply(sock, f"{ns} {port} {_spoken(peer)}\n".encode() + data, extra, peer)

        return answer

    def _open_sctp(self, ns: str) -> None:
        """Kernels without SCTP sockets still route, filter and track it: the association is played here."""
        if ns in self._sctp:
            return
        self._sctp[ns] = []
        for family in (socket.AF_INET, socket.AF_INET6):
            sock = self._namespaces.socket(ns, family, socket.SOCK_RAW, _SCTP)
            if family == socket.AF_INET:
                sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
            else:
                sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO, 1)
            self._loop.watch(sock, selectors.EVENT_READ, self._sctp_answerer(sock, ns))
            self._sctp[ns].append(sock)

    def _sctp_answerer(self, sock: socket.socket, ns: str) -> Callable[[], None]:
        def answer() -> None:
            for _ in range(100):
                try:
                    data, extra, _, peer = sock.recvmsg(65536, 256)
                except BlockingIOError:
                    return
                except OSError:
                    continue
                if sock.family == socket.AF_INET:
                    data = data[(data[0] & 15) * 4 :]
                if len(data) < 20 or data[12] != 1:  # INIT and nothing else
                    continue
                sport, dport = struct.unpack(">HH", data[:4])
                tag = struct.unpack(">I", data[16:20])[0]
                if (ns, "sctp", dport) in self._listening:
                    cookie = f"{ns} {dport} {_spoken(peer)}\n".encode()
                    body = struct.pack(">IIHHI", 7, 65536, 1, 1, 7) + struct.pack(">HH", 7, 4 + len(cookie))
                    packet = _sctp_packet(dport, sport, tag, 2, body + cookie)
                else:
                    packet = _sctp_packet(dport, sport, tag, 6, b"")
                _reply(sock, packet, extra, (peer[0], 0, *peer[2:]))

        return answer


def _reply(sock: socket.socket, data: bytes, extra: list[tuple[int, int, bytes]], peer: Any) -> None:
    """Answer from the address that was dialled, so that clients on connected sockets accept it."""
    control: list[tuple[int, int, bytes]] = []
    for level, kind, value in extra:
        if level == socket.IPPROTO_IP and kind == _IP_PKTINFO:
            control = [(level, kind, struct.pack("=I", 0) + value[4:8] + b"\0\0\0\0")]
        elif level == socket.IPPROTO_IPV6 and kind == _IPV6_PKTINFO:
            group = value[0] == 0xFF
            index = value[16:20] if group or value[:2] == b"\xfe\x80" else b"\0\0\0\0"
            control = [(level, kind, (b"\0" * 16 if group else value[:16]) + index)]
    try:
        sock.sendmsg([data], control, 0, peer)
    except OSError:  # an anycast address can't be a source: let the kernel choose
        with contextlib.suppress(OSError):
            sock.sendto(data, peer)


def _refusals(sock: socket.socket) -> list[bytes]:
    """The packets that ICMP errors quote on a raw socket, which hears of those of its neighbours as well."""
    quoted = []
    with contextlib.suppress(OSError):
        while True:
            quoted.append(sock.recvmsg(65536, 1024, socket.MSG_ERRQUEUE)[0])
    return quoted


class Call:
    """One attempt to reach somebody: ends in exactly one verdict."""

    def __init__(self, agent: "Agent", request: dict[str, Any]) -> None:
        self._agent = agent
        self._loop = agent.loop
        self._request = request
        self._ns: str = request["ns"]
        self._to: str = request["to"]
        self._port: int = request["port"]
        self._source: str = request.get("source") or ""
        self._source_port: int = request.get("source_port") or 0
        self._timeout: float = request["timeout"]
        self._family = _family(self._to)
        self._sockets: list[socket.socket] = []
        self._standing = False
        self._done = False
        self._started = time.monotonic()
        try:
            getattr(self, "_" + request["protocol"])()
        except OSError as error:
            self._failed(error.errno or 0)
        if not self._done:
            self._loop.after(self._timeout, self._silent)

    def _finish(self, verdict: str, greeting: bytes = b"", error: str = "", keep: Any = None) -> None:
        if self._done:
            return
        self._done = True
        for sock in self._sockets:
            if sock is not keep:
                self._loop.forget(sock)
        answer: dict[str, Any] = {"verdict": verdict, "greeting": greeting.decode(errors="replace")}
        answer |= {"error": error, "seconds": time.monotonic() - self._started}
        if keep is not None:
            answer["connection"] = self._agent.keep(keep, self._to, self._port)
        self._agent.answer(self._request["id"], answer)

    def _failed(self, number: int) -> None:
        name = errno.errorcode.get(number, str(number))
        if number in (errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOPROTOOPT, errno.EPROTO, errno.EPIPE):
            self._finish("refused", error=name)
        elif number == errno.EPERM:
            self._finish("forbidden", error=name)
        elif number == errno.ETIMEDOUT:
            self._finish("timeout", error=name)
        else:
            self._finish("unreachable", error=name)

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
                self._failed(error.errno or 0)

        send()
        for number in range(1, _ATTEMPTS):
            self._loop.after(self._timeout * number / _ATTEMPTS, again)

    def _bound(self, kind: int, protocol: int = 0) -> socket.socket:
        sock = self._agent.namespaces.socket(self._ns, self._family, kind, protocol)
        self._sockets.append(sock)
        if not self._request.get("keep"):  # hear every ICMP error; a lasting flow must bear some, as others do
            if self._family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)
            else:
                sock.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
        if self._source or self._source_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((self._source, 0 if kind == socket.SOCK_RAW else self._source_port))
        return sock

    # --- tcp

    def _tcp(self) -> None:
        if self._source_port or self._request.get("keep"):
            self._tcp_once()
        else:
            self._attempts(self._tcp_once)

    def _tcp_once(self) -> None:
        sock = self._bound(socket.SOCK_STREAM)
        if not self._request.get("keep"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        number = sock.connect_ex((self._to, self._port))
        if number not in (0, errno.EINPROGRESS):
            self._failed(number)
            return
        received = bytearray()

        def read() -> None:
            try:
                data = sock.recv(4096)
            except BlockingIOError:
                return
            except OSError as error:
                self._failed(error.errno or 0)
                return
            received.extend(data)
            if received.endswith(b"\n") or not data:
                self._finish("open", bytes(received), keep=sock if self._request.get("keep") else None)

        def connected() -> None:
            number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if number:
                self._failed(number)
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
        # A group answers from a member's own address, which a connected socket would not accept.
        group = bool(self._request.get("group"))
        target: Any = (self._to, self._port)
        if not group:
            sock.connect(target)
        payload = str(self._request.get("payload") or "").encode()

        def read() -> None:
            try:
                data, _ = sock.recvfrom(65536)
            except BlockingIOError:
                return
            except OSError as error:
                self._failed(error.errno or 0)
                return
            self._finish("open", data, keep=sock if self._request.get("keep") else None)

        self._loop.watch(sock, selectors.EVENT_READ, read)
        self._attempts(lambda: _ignore(sock.sendto(payload, target) if group else sock.send(payload)))

    def _multicast_link(self, sock: socket.socket) -> None:
        """Send to groups by the namespace's first link (eth0 everywhere but on the node)."""
        if not self._request.get("group"):
            return
        index = socket.if_nametoindex(self._request.get("interface") or "eth0")
        if self._family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
        else:
            sock.setsockopt(
                socket.IPPROTO_IP, socket.IP_MULTICAST_IF, struct.pack("=4s4si", b"\0" * 4, b"\0" * 4, index)
            )

    # --- sctp

    def _sctp(self) -> None:
        sock = self._bound(socket.SOCK_RAW, _SCTP)
        sock.connect((self._to, 0))
        port = self._source_port or self._agent.fresh_port()
        tag = port * 65537
        body = struct.pack(">IIHHI", tag, 65536, 1, 1, tag)
        packet = _sctp_packet(port, self._port, 0, 1, body)

        def read() -> None:
            for _ in range(100):
                try:
                    data = sock.recv(65536)
                except BlockingIOError:
                    return
                except OSError as error:
                    if any(quoted[:2] == packet[:2] for quoted in _refusals(sock)):
                        self._failed(error.errno or 0)
                    return
                if self._family == socket.AF_INET:
                    data = data[(data[0] & 15) * 4 :]
                if len(data) < 16 or struct.unpack(">HHI", data[:8]) != (self._port, port, tag):
                    continue
                if data[12] == 2:
                    length = struct.unpack(">H", data[14:16])[0]
                    self._finish("open", data[12 + 4 + 16 + 4 : 12 + length])
                elif data[12] == 6:
                    self._finish("refused", error="ABORT")
                if self._done:
                    return

        self._loop.watch(sock, selectors.EVENT_READ, read)
        self._attempts(lambda: _ignore(sock.send(packet)))

    # --- icmp echo

    def _icmp(self) -> None:
        six = self._family == socket.AF_INET6
        sock = self._bound(socket.SOCK_RAW, socket.IPPROTO_ICMPV6 if six else socket.IPPROTO_ICMP)
        sock.connect((self._to, 0))
        number = self._agent.fresh_port()
        packet = struct.pack(">BBHHH", 128 if six else 8, 0, 0, number, 1)
        if not six:
            packet = packet[:2] + struct.pack(">H", 0xFFFF ^ _internet_sum(packet)) + packet[4:]

        def read() -> None:
            for _ in range(100):
                try:
                    data = sock.recv(65536)
                except BlockingIOError:
                    return
                except OSError as error:
                    if any(quoted[4:6] == packet[4:6] for quoted in _refusals(sock)):
                        self._failed(error.errno or 0)
                    return
                if not six:
                    data = data[(data[0] & 15) * 4 :]
                if len(data) >= 8 and data[0] == (129 if six else 0) and data[4:6] == packet[4:6]:
                    self._finish("open")
                    return

        self._loop.watch(sock, selectors.EVENT_READ, read)
        self._attempts(lambda: _ignore(sock.send(packet)))


class Agent:
    """Requests in, answers out; several may be under way."""

    def __init__(self) -> None:
        self.namespaces = Namespaces()
        self.loop = Loop()
        self.servers = Servers(self.namespaces, self.loop)
        self._kept: dict[int, tuple[socket.socket, Any]] = {}
        self._number = 0
        self._buffer = b""
        os.set_blocking(0, False)
        self.loop.watch(0, selectors.EVENT_READ, self._read)

    def fresh_port(self) -> int:
        """A port for packets that are made by hand."""
        self._number += 1
        return 20000 + self._number % 10000

    def keep(self, sock: socket.socket, to: str, port: int) -> int:
        """Leave a connection open and name it."""
        self._number += 1
        self._kept[self._number] = (sock, (to, port))
        self.loop.pause(sock)
        return self._number

    def answer(self, number: int, content: dict[str, Any]) -> None:
        """Print one answer."""
        data = json.dumps({"id": number, **content}).encode() + b"\n"
        while data:
            data = data[os.write(1, data) :]

    def _read(self) -> None:
        data = os.read(0, 1 << 20)
        if not data:
            sys.exit(0)
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            request = json.loads(line)
            try:
                getattr(self, "do_" + request["do"])(request)
            except Exception as error:
                self.answer(request["id"], {"failed": f"{type(error).__name__}: {error}"})

    def do_listen(self, request: dict[str, Any]) -> None:
        """Listen on ports."""
        for protocol, port in request["ports"]:
            self.servers.listen(request["ns"], protocol, port)
        self.answer(request["id"], {})

    def do_close(self, request: dict[str, Any]) -> None:
        """Listen no more on ports."""
        for protocol, port in request["ports"]:
            self.servers.close(request["ns"], protocol, port)
        self.answer(request["id"], {})

    def do_call(self, request: dict[str, Any]) -> None:
        """Reach for somebody."""
        Call(self, request)

    def do_hangup(self, request: dict[str, Any]) -> None:
        """Close a kept connection."""
        sock, _ = self._kept.pop(request["connection"])
        self.loop.forget(sock)
        self.answer(request["id"], {})

    def do_echo(self, request: dict[str, Any]) -> None:
        """Send a line over a kept connection and wait for it to come back."""
        sock, _ = self._kept[request["connection"]]
        nonce = f"echo-{request['id']}\n".encode()
        received = bytearray()
        state = {"done": False}
        started = time.monotonic()

        def end(error: str) -> None:
            if not state["done"]:
                state["done"] = True
                self.loop.pause(sock)
                self.answer(request["id"], {"alive": not error, "error": error, "seconds": time.monotonic() - started})

        def read() -> None:
            try:
                data = sock.recv(65536)
            except BlockingIOError:
                return
            except OSError as error:
                end(errno.errorcode.get(error.errno or 0, str(error)))
                return
            received.extend(data)
            if nonce in received:
                end("")
            elif not data and sock.type == socket.SOCK_STREAM:
                end("closed")

        def send() -> None:
            if state["done"]:
                return
            try:
                sock.send(nonce)
            except OSError as error:
                end(errno.errorcode.get(error.errno or 0, str(error)))

        self.loop.watch(sock, selectors.EVENT_READ, read)
        send()
        if sock.type == socket.SOCK_DGRAM:
            for number in range(1, _ATTEMPTS):
                self.loop.after(request["timeout"] * number / _ATTEMPTS, send)
        self.loop.after(request["timeout"], lambda: end("timeout"))


class Flooder:
    """Numbered packets at an even pace, and the sinks that count them, in one loop.

    The receiving side is emptied after every packet sent, so a packet's time of arrival is true to some tens
    of microseconds, and the count is exact: nothing is ever dropped for want of a buffer.
    """

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
            self._base = _internet_sum(source + socket.inet_aton(self._to[0]) + struct.pack(">HH", 6, 20))
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
        total = self._base + _internet_sum(head)
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
                    if not self._six:
                        data = data[(data[0] & 15) * 4 :]
                    _, dport, number, _, _, flags, window = struct.unpack(">HHIIBBH", data[:16])
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
        poll = selectors.DefaultSelector()
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
                    name = errno.errorcode.get(error.errno or 0, str(error))
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
        data = json.dumps(report).encode() + b"\n"
        while data:
            data = data[os.write(1, data) :]


if __name__ == "__main__":
    if sys.argv[1] == "flood":
        Flooder(json.loads(sys.argv[2])).run()
    else:
        Agent().loop.run()
