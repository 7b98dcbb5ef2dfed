"""Whoever listens greets with "NAME PORT PEER", then echoes; an answer comes from the address that was dialled."""

import contextlib
import selectors
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

from lab.agent.headers import SCTP, behind_ip, sctp_packet
from lab.agent.loop import Loop
from lab.agent.namespaces import Namespaces

_IP_PKTINFO = 8
_IPV6_RECVPKTINFO = 49
_IPV6_PKTINFO = 50

Control = list[tuple[int, int, bytes]]


class Servers:
    """The listeners of all namespaces."""

    def __init__(self, namespaces: Namespaces, loop: Loop) -> None:
        self._namespaces = namespaces
        self._loop = loop
        self._listening: dict[tuple[str, str, int], list[socket.socket]] = {}
        self._sctp: set[str] = set()

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
                _tell_destination(sock)
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
                sock.send(_greeting(ns, port, peer))

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

    @staticmethod
    def _answerer(sock: socket.socket, ns: str, port: int) -> Callable[[], None]:
        def answer() -> None:
            for data, extra, peer in _received(sock):
                _reply(sock, _greeting(ns, port, peer) + data, extra, peer)

        return answer

    def _open_sctp(self, ns: str) -> None:
        """Kernels without SCTP sockets still route, filter and track it: the association is played here."""
        if ns in self._sctp:
            return
        self._sctp.add(ns)
        for family in (socket.AF_INET, socket.AF_INET6):
            sock = self._namespaces.socket(ns, family, socket.SOCK_RAW, SCTP)
            _tell_destination(sock)
            self._loop.watch(sock, selectors.EVENT_READ, self._sctp_answerer(sock, ns))

    def _sctp_answerer(self, sock: socket.socket, ns: str) -> Callable[[], None]:
        def answer() -> None:
            for packet, extra, peer in _received(sock):
                data = behind_ip(packet, six=sock.family == socket.AF_INET6)
                if len(data) < 20 or data[12] != 1:  # INIT and nothing else
                    continue
                sport, dport = struct.unpack(">HH", data[:4])
                tag = struct.unpack(">I", data[16:20])[0]
                if (ns, "sctp", dport) in self._listening:
                    cookie = _greeting(ns, dport, peer)
                    body = struct.pack(">IIHHI", 7, 65536, 1, 1, 7) + struct.pack(">HH", 7, 4 + len(cookie))
                    answered = sctp_packet(dport, sport, tag, 2, body + cookie)
                else:
                    answered = sctp_packet(dport, sport, tag, 6, b"")
                _reply(sock, answered, extra, (peer[0], 0, *peer[2:]))

        return answer


def _greeting(ns: str, port: int, peer: Any) -> bytes:
    return f"{ns} {port} {str(peer[0]).split('%')[0]}\n".encode()


def _tell_destination(sock: socket.socket) -> None:
    """Have each packet come with the address that it was sent to."""
    if sock.family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO, 1)


def _received(sock: socket.socket) -> Iterator[tuple[bytes, Control, Any]]:
    """What has arrived, and how, and from whom; at most a hundred packets, so that the others get their turn."""
    for _ in range(100):
        try:
            data, extra, _, peer = sock.recvmsg(65536, 256)
        except BlockingIOError:
            return
        except OSError:
            continue
        yield data, extra, peer


def _reply(sock: socket.socket, data: bytes, extra: Control, peer: Any) -> None:
    """Answer from the address that was dialled, so that clients on connected sockets accept it."""
    control: Control = []
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
