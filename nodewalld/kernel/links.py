"""The node's interfaces, addresses and default routes, and to hear when they may have changed.

Law: an event is a hint to look; a snapshot is a value to compare with the one before. Whatever disappears between two
questions is left out, it will be an event. Only the main table's unicast routes name a default interface.

A node of 125 pods has 250 interfaces and as many routes, asks with each pod that comes or goes, and does nothing else
meanwhile. So what is not asked for (all else of an interface, all routes but the default ones) is not parsed: pyroute2,
which parses everything, takes 0.2 s for it.

Sources: rtnetlink(7), include/uapi/linux/rtnetlink.h. This is the one module that imports pyroute2, and only when a
snapshot is first asked for.
"""

import errno
import importlib.util
import socket
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nodewalld.core.environment import Environment
from nodewalld.core.words import Family
from nodewalld.kernel.closing import Closing
from nodewalld.kernel.netlink import HEADER, NLM_F_DUMP, NetlinkError, NetlinkSocket, spans

_GROUPS = (1, 5, 7, 9, 11)  # RTNLGRP_LINK, _IPV4_IFADDR, _IPV4_ROUTE, _IPV6_IFADDR, _IPV6_ROUTE
_GETROUTE = 26
_ROUTE = struct.Struct("=8BI")  # struct rtmsg
_RTA_OIF, _RTA_MULTIPATH, _RTA_TABLE = 4, 9, 15
_HOP = struct.Struct("=HBBi")  # struct rtnexthop, with its length, and the interface
_NUMBER = struct.Struct("=I")
_RT_TABLE_MAIN = 254
_RTN_UNICAST = 1
_FAMILIES: dict[int, Family] = {socket.AF_INET: Family.IPV4, socket.AF_INET6: Family.IPV6}
_DRAIN_LIMIT = 4096  # datagrams; the rest is a new wake-up
_RECEIVE_BUFFER = 1 << 20

SERVICE_INTERFACE = "kube-ipvs0"
"""kube-proxy in ipvs mode puts every Service's address on it."""


@dataclass(frozen=True, slots=True)
class LinkState:
    """What the node's interfaces look like; every tuple is sorted and holds a value once."""

    interfaces: tuple[str, ...]
    default_routes: Mapping[Family, tuple[str, ...]]
    addresses: Mapping[Family, tuple[str, ...]]
    service_addresses: Mapping[Family, tuple[str, ...]]

    @property
    def environment(self) -> Environment:
        """What the compiler must know of it."""
        return Environment(self.addresses, self.service_addresses, self.default_routes)


class LinkEvents(Closing):
    """Hears of every change to interfaces, addresses and routes, without reading what it was."""

    def __init__(self) -> None:
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self._socket = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        self._socket.bind((0, sum(1 << (group - 1) for group in _GROUPS)))
        self._scrap = bytearray(16)

    def fileno(self) -> int:
        """The descriptor to wait on for reading."""
        return self._socket.fileno()

    def drain(self) -> bool:
        """Forget what has been heard; whether there was anything (a lost event counts)."""
        heard = False
        for _ in range(_DRAIN_LIMIT):
            try:
                self._socket.recv_into(self._scrap)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise NetlinkError(error.errno or errno.EIO, "read link events") from error
            heard = True
        return heard

    def close(self) -> None:
        """End the subscription."""
        self._socket.close()


class Links(Closing):
    """Takes snapshots through two sockets, opened at the first and kept."""

    def __init__(self) -> None:
        self._route: Any = None
        self._routes: NetlinkSocket | None = None

    def snapshot(self) -> LinkState:
        """Interfaces, default routes and addresses as they are now. Raises NetlinkError."""
        try:
            if self._route is None or self._routes is None:
                self.close()
                self._route, self._routes = _open_iproute(), NetlinkSocket(socket.NETLINK_ROUTE)
            names = dict(socket.if_nameindex())
            addresses = [(each["index"], each["family"], _address(each)) for each in self._route.get_addr()]
            routes = list(_defaults(self._routes))
        except NetlinkError:
            raise
        except Exception as error:
            self.close()  # whatever state the socket was left in, the next snapshot starts afresh
            number = getattr(error, "code", None) or getattr(error, "errno", None) or errno.EIO
            raise NetlinkError(int(number), "read links, addresses and routes") from error
        ordinary = [each for each in addresses if names.get(each[0]) not in {None, "lo", SERVICE_INTERFACE}]
        service = [each for each in addresses if names.get(each[0]) == SERVICE_INTERFACE]
        return LinkState(
            interfaces=tuple(sorted(names.values())),
            default_routes=_by_family((family, names.get(index)) for family, index in routes),
            addresses=_by_family((family, address) for _, family, address in ordinary),
            service_addresses=_by_family((family, address) for _, family, address in service),
        )

    def environment(self) -> Environment:
        """What the compiler must know of the node as it is now. Raises NetlinkError."""
        return self.snapshot().environment

    def close(self) -> None:
        """Close the sockets."""
        for each in (self._route, self._routes):
            if each is not None:
                each.close()
        self._route = self._routes = None


def _open_iproute() -> Any:
    """pyroute2's IPRoute, without the seventy other names that `import pyroute2` itself brings in (5 MiB, 100 ms)."""
    spec = importlib.util.find_spec("pyroute2")
    if spec is not None:
        sys.modules.setdefault("pyroute2", importlib.util.module_from_spec(spec))
    from pyroute2.iproute.linux import IPRoute  # noqa: PLC0415 -- costs memory and time

    return IPRoute()


def _address(message: Any) -> str | None:
    # On a point-to-point interface IFA_ADDRESS is the peer's; IPv6 has IFA_LOCAL only there.
    local = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
    return str(local) if local else None


def _defaults(routes: NetlinkSocket) -> Iterator[tuple[int, int]]:
    """Family and interface index of each way out that a default route of the main table names."""
    for family in _FAMILIES:
        body = _ROUTE.pack(family, *bytes(7), 0)
        for _, answer in routes.ask(_GETROUTE, NLM_F_DUMP, body, "read the routes"):
            _, length, _, _, table, _, _, kind, _ = _ROUTE.unpack_from(answer, HEADER.size)
            if length or kind != _RTN_UNICAST:
                continue
            found = spans(answer, HEADER.size + _ROUTE.size, len(answer))
            if _RTA_TABLE in found:
                (table,) = _NUMBER.unpack_from(answer, found[_RTA_TABLE][0])
            if table != _RT_TABLE_MAIN:
                continue
            if _RTA_OIF in found:
                yield family, _NUMBER.unpack_from(answer, found[_RTA_OIF][0])[0]
            start, end = found.get(_RTA_MULTIPATH, (0, 0))
            while start + _HOP.size <= end:
                size, _, _, index = _HOP.unpack_from(answer, start)
                yield family, index
                start += max((size + 3) & ~3, _HOP.size)


def _by_family(pairs: Iterable[tuple[int, str | None]]) -> dict[Family, tuple[str, ...]]:
    found: dict[Family, set[str]] = {family: set() for family in Family}
    for number, word in pairs:
        if word is not None and number in _FAMILIES:
            found[_FAMILIES[number]].add(word)
    return {family: tuple(sorted(words)) for family, words in found.items()}
