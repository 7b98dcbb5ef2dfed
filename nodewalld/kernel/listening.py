"""Netlink sockets that listen: what packets make the kernel say, as it comes.

Law: a listener is known by its port, which nobody had before and nobody has afterwards. So whoever finds the port in
another's note can ask the kernel whether the listener still lives.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from nodewalld.kernel.netlink import HEADER, NETLINK_NETFILTER

_RECEIVE_BUFFER = 4 << 20
_SO_RCVBUFFORCE = 33


def listening(groups: int = 0) -> socket.socket:
    """A socket of netfilter's that doesn't wait, with room for much, and with a port that nobody had before."""
    fresh = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, NETLINK_NETFILTER
    )
    try:
        fresh.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
    except PermissionError:
        fresh.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
    # Ports that the kernel gives are process ids, which come again.
    fresh.bind((int.from_bytes(os.urandom(4)) | 1 << 31, groups))
    return fresh


def datagrams(source: socket.socket) -> Iterator[bytes]:
    """What can be read without waiting."""
    with contextlib.suppress(BlockingIOError):
        while True:
            yield source.recv(1 << 16)


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
