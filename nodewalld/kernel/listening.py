"""Netlink sockets that listen: what packets make the kernel say, as it comes.

Law: a listener is known by its port, which nobody had before and nobody has afterwards. So whoever finds the port in
another's note can ask the kernel whether the listener still lives.
"""

import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from nodewalld.kernel.closing import Closing
from nodewalld.kernel.netlink import HEADER, NETLINK_NETFILTER, NetlinkError

MANY = 4 << 20
"""Bytes of receive buffer for who must miss nothing."""

READ_LIMIT = 1024
"""Datagrams of one reading; after more than that the caller is woken again."""

_SO_RCVBUFFORCE = 33

T = TypeVar("T")


class Listener(Closing):
    """A socket of netfilter's that hears these groups without waiting; `only` puts a filter in before it does."""

    def __init__(
        self, groups: int = 0, room: int = MANY, only: Callable[[socket.socket], object] = lambda _: None
    ) -> None:
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self._socket = socket.socket(socket.AF_NETLINK, kind, NETLINK_NETFILTER)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, room)
        except PermissionError:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        # The filter goes in before the subscription: no unwanted datagram is ever queued.
        only(self._socket)
        # Ports that the kernel gives are process ids, which come again.
        self._socket.bind((int.from_bytes(os.urandom(4)) | 1 << 31, groups))

    @property
    def port(self) -> int:
        """The netlink port by which others can see that somebody listens."""
        return int(self._socket.getsockname()[0])

    def fileno(self) -> int:
        """The descriptor to wait on for reading."""
        return self._socket.fileno()

    def _datagrams(self) -> Iterator[bytes | None]:
        """What waits in the socket; None for what was lost. Of an endless flood only the beginning."""
        for _ in range(READ_LIMIT):
            try:
                yield self._socket.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise NetlinkError(error.errno or errno.EIO, "listen to netfilter") from error
                yield None

    def _parsed(self, parse: Callable[[bytes], Iterator[T]]) -> Iterator[T]:
        """What is told in the datagrams that wait. NetlinkError ENOBUFS: some is lost."""
        for datagram in self._datagrams():
            if datagram is None:
                raise NetlinkError(errno.ENOBUFS, "listen to netfilter")
            yield from parse(datagram)

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()


def messages(datagram: bytes) -> Iterator[tuple[int, int, int]]:
    """The messages of a datagram: their type, where they begin, and their end."""
    offset = 0
    while offset + HEADER.size <= len(datagram):
        length, kind, *_ = HEADER.unpack_from(datagram, offset)
        yield kind, offset, offset + length
        offset += max((length + 3) & ~3, HEADER.size)


def interface(index: int) -> str:
    """The name of an interface; its number when it has gone."""
    try:
        return socket.if_indextoname(index) if index else ""
    except OSError:
        return f"interface {index}"


def is_open(port: int) -> bool:
    """Whether a netlink socket of netfilter has this port in this network namespace."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/thread-self/net/netlink").read_text().splitlines()[1:]:
            _, protocol, held, *_ = line.split()
            if int(protocol) == NETLINK_NETFILTER and int(held) & 0xFFFFFFFF == port:
                return True
    return False
