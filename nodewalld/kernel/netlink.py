"""Netlink, as little of it as nodewalld needs: attributes, messages, and one kept-open socket that asks.

Law: nothing here knows what a message means. A socket is opened once and kept: closing one that wrote to
nf_tables stalls some 10 ms in the kernel. A dump that the kernel marks as interrupted is asked again, a
bounded number of times, and then reported; a mixture of two states is never handed out.

Sources: include/uapi/linux/netlink.h, include/uapi/linux/netfilter/nfnetlink.h. Numbers of netlink itself are
in the host's byte order; those of netfilter's attributes are big-endian.
"""

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence

from nodewalld.core.words import Family
from nodewalld.kernel.closing import Closing

NETLINK_NETFILTER = 12
SOL_NETLINK = 270

NLM_F_REQUEST = 0x001
NLM_F_ACK = 0x004
NLM_F_DUMP_INTR = 0x010
NLM_F_EXCL = 0x200  # of a request that makes or removes something
NLM_F_DUMP = 0x300
NLM_F_CREATE = 0x400
NLM_F_APPEND = 0x800

NLMSG_ERROR = 2
NLMSG_DONE = 3
_LAST = frozenset({NLMSG_DONE, NLMSG_ERROR})

NLA_F_NESTED = 0x8000
NLA_TYPE_MASK = 0x3FFF

HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port id
ATTRIBUTE = struct.Struct("=HH")  # length, type
NFGENMSG = struct.Struct(">BBH")  # family, version, resource id
U16 = struct.Struct(">H")
U32 = struct.Struct(">I")
U64 = struct.Struct(">Q")
_ERRNO = struct.Struct("=i")
_SHORTEST_END = HEADER.size + _ERRNO.size

NFPROTO = {Family.IPV4: 2, Family.IPV6: 10}

BODY = HEADER.size + NFGENMSG.size
"""Where the attributes of a netfilter message begin."""

_TRUNC, _DONTWAIT = int(socket.MSG_TRUNC), int(socket.MSG_DONTWAIT)  # flags are slow to combine
_SO_SNDBUFFORCE = 32
_SO_RCVTIMEO = struct.Struct("@ll")
_ANSWER_LIMIT = 10  # seconds; the kernel answers at once, or something is very wrong
_ATTEMPTS = 20  # with a foreign transaction every few milliseconds one in two dumps is interrupted


class NetlinkError(OSError):
    """The kernel refused a request or could not answer it: the system's fault, with the kernel's errno."""

    def __init__(self, number: int, what: str) -> None:
        super().__init__(number, f"{what}: {os.strerror(number)}")
        self.what = what


def attribute(kind: int, payload: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    length = 4 + len(payload)
    return ATTRIBUTE.pack(length, kind) + payload + bytes(-length % 4)


def text(kind: int, value: str) -> bytes:
    """An attribute that holds a NUL-terminated string."""
    return attribute(kind, value.encode() + b"\0")


def nested(kind: int, *attributes: bytes) -> bytes:
    """An attribute that holds attributes."""
    return attribute(kind | NLA_F_NESTED, b"".join(attributes))


def message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    """One message with its header; `body` is padded already, being made of attributes."""
    return HEADER.pack(HEADER.size + len(body), kind, flags, sequence, 0) + body


def netfilter_body(protocol: int, *attributes: bytes) -> bytes:
    """The body of a message to a netfilter subsystem."""
    return NFGENMSG.pack(protocol, 0, 0) + b"".join(attributes)


def attributes(data: bytes | bytearray | memoryview, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Walk the attributes between two offsets: (type without flags, start of the payload, its end)."""
    unpack = ATTRIBUTE.unpack_from
    while start + 4 <= end:
        length, kind = unpack(data, start)
        if length < 4:
            return
        yield kind & NLA_TYPE_MASK, start + 4, start + length
        start += (length + 3) & ~3


def spans(data: bytes | bytearray | memoryview, start: int, end: int) -> dict[int, tuple[int, int]]:
    """The attributes between two offsets by type, for messages that hold each at most once."""
    return {kind: (first, last) for kind, first, last in attributes(data, start, end)}


def string(data: bytes | bytearray, start: int, end: int) -> str:
    """The NUL-terminated string of an attribute; foreign names may hold any byte."""
    return bytes(data[start:end]).rstrip(b"\0").decode(errors="surrogateescape")


class NetlinkSocket(Closing):
    """A socket that asks one question at a time and reads the whole answer; the kernel knows it by its `port`.

    Not to be shared between threads: answers are told apart by their sequence number alone.
    """

    def __init__(self, protocol: int = NETLINK_NETFILTER, *, largest: int = 0) -> None:
        """`largest`: bytes of the largest batch that is ever sent; 0 leaves it to the kernel's default."""
        self._protocol, self._largest = protocol, largest
        self._sequence = 0
        self._buffer = bytearray(1 << 17)
        self._socket = self._open()

    def _open(self) -> socket.socket:
        fresh = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, self._protocol)
        # A limit kept by the kernel: Python's own would cost a poll() per datagram.
        fresh.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _SO_RCVTIMEO.pack(_ANSWER_LIMIT, 0))
        if self._largest:
            with contextlib.suppress(OSError):
                fresh.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, self._largest)
        fresh.bind((0, 0))
        self.port = int(fresh.getsockname()[0])
        return fresh

    def close(self) -> None:
        """Close the socket; it can't be used afterwards."""
        self._socket.close()

    def ask(self, kind: int, flags: int, body: bytes, what: str, needle: bytes = b"") -> list[tuple[int, bytes]]:
        """Send one request and return the answering messages as (type, whole message).

        With NLM_F_DUMP everything up to the end of the dump, without it one answer (with NLM_F_ACK none).
        `what` names the question in an error; only messages that hold the `needle` are wanted. Raises NetlinkError.
        """
        for _ in range(_ATTEMPTS):
            answer = self._ask_once(kind, flags | NLM_F_REQUEST, body, what, needle)
            if answer is not None:
                return answer
        raise NetlinkError(errno.EINTR, f"{what} (the ruleset changed during each of {_ATTEMPTS} reads)")

    def send(self, messages: bytes) -> None:
        """Send something that is not answered (errors are passed over); it is done when this returns."""
        self._socket.send(messages)

    def transact(self, requests: Sequence[tuple[int, int, bytes]], what: str) -> None:
        """Send a batch of messages (type, flags, body) that the kernel takes as a whole or not at all.

        Its last but one message, the last of those within the frame, is the one to be acknowledged. Raises
        NetlinkError with the errno of the first that was refused.
        """
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        flags = [NLM_F_REQUEST] * len(requests)
        flags[-2] |= NLM_F_ACK
        parts = (message(k, f | more, self._sequence, body) for (k, f, body), more in zip(requests, flags, strict=True))
        try:
            self._socket.send(b"".join(parts))
            statuses = self._statuses()
        except OSError as error:
            raise self._renewed(error, what) from error
        if refused := next((status for status in statuses if status), 0 if statuses else errno.EIO):
            raise NetlinkError(refused, what)

    def _statuses(self) -> list[int]:
        """What the kernel has said of the messages of a batch; all of it is there when the batch has been sent."""
        found: list[int] = []
        with contextlib.suppress(BlockingIOError):
            while True:
                found += [_status(data) for kind, _, data in self._datagram(_DONTWAIT) if kind in _LAST]
        return found

    def _renewed(self, error: OSError, what: str) -> NetlinkError:
        """Whatever may still be on its way: only a new socket is clean."""
        self._socket.close()
        self._socket = self._open()
        return NetlinkError(errno.ETIMEDOUT if error.errno == errno.EAGAIN else (error.errno or errno.EIO), what)

    def _ask_once(self, kind: int, flags: int, body: bytes, what: str, needle: bytes) -> list[tuple[int, bytes]] | None:
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        try:
            self._socket.send(message(kind, flags, self._sequence, body))
            return self._answer(flags, what, needle)
        except NetlinkError:
            raise
        except OSError as error:
            raise self._renewed(error, what) from error

    def _answer(self, flags: int, what: str, needle: bytes) -> list[tuple[int, bytes]] | None:
        found: list[tuple[int, bytes]] = []
        whole = True
        single = not flags & NLM_F_ACK and flags & NLM_F_DUMP != NLM_F_DUMP
        while True:  # ends with the answer, or with the socket's own time limit
            for kind, marks, data in self._datagram(needle=needle):
                whole = whole and not marks & NLM_F_DUMP_INTR
                if kind in _LAST:
                    return self._ended(_status(data), found if whole else None, what)
                if needle in data:
                    found.append((kind, data))
            if found and single:
                return found

    def stream(self, kind: int, body: bytes, what: str) -> Iterator[bytes]:
        """Dump something too large to be held, whose entries come and go anyway; one dump at a time.

        Whoever stops early must close the socket. Raises NetlinkError.
        """
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        try:
            self._socket.send(message(kind, NLM_F_REQUEST | NLM_F_DUMP, self._sequence, body))
            while True:
                for answer, _, data in self._datagram():
                    if answer in _LAST:
                        self._ended(_status(data), None, what)
                        return
                    yield data
        except NetlinkError:
            raise
        except OSError as error:
            raise NetlinkError(error.errno or errno.EIO, what) from error

    def _datagram(self, flags: int = 0, needle: bytes = b"") -> Iterator[tuple[int, int, bytes]]:
        """The messages of one datagram that answer the present question: (type, flags, whole message).

        Of a datagram in which the needle isn't, and behind which more will come, only the first.
        """
        buffer, sequence = self._buffer, self._sequence
        size = self._socket.recv_into(buffer, 0, _TRUNC | flags)
        if size > len(buffer):
            raise OSError(errno.EMSGSIZE, "netlink datagram larger than the buffer")
        offset = 0
        if needle and buffer.find(needle, 0, size) < 0 and not self._ends(size):
            size = HEADER.unpack_from(buffer, 0)[0]
        while offset + HEADER.size <= size:
            length, kind, marks, number, _ = HEADER.unpack_from(buffer, offset)
            if number == sequence:
                yield kind, marks, bytes(buffer[offset : offset + length])
            offset += max((length + 3) & ~3, HEADER.size)

    def _ends(self, size: int) -> bool:
        """Whether the datagram in the buffer is, or has at its end, the last message of a dump."""
        if size < _SHORTEST_END or HEADER.unpack_from(self._buffer, 0)[1] in _LAST:
            return True
        return bool(HEADER.unpack_from(self._buffer, size - _SHORTEST_END)[:2] == (_SHORTEST_END, NLMSG_DONE))

    @staticmethod
    def _ended(status: int, found: list[tuple[int, bytes]] | None, what: str) -> list[tuple[int, bytes]] | None:
        if status == errno.EINTR:
            return None
        if status > 0:
            raise NetlinkError(status, what)
        return found


def _status(data: bytes) -> int:
    return -int(_ERRNO.unpack_from(data, HEADER.size)[0]) if len(data) >= HEADER.size + 4 else 0
