"""Sockets of any network namespace of the node, from one thread that walks between them."""

import ctypes
import os
import socket

_CLONE_NEWNET = 0x40000000

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
