"""UDP behind IPv6 extension headers, sent for real: what of it arrives. Run as a script within a node.

`headers.py SOURCE TARGET...`, a target being NAMESPACE,ADDRESS,PORT: for each target and each way to write the headers
a datagram from the client; prints as JSON which arrived. What bears an authentication header is given to nobody
without keys: there, that the packet came as far as the node's own raw sockets is what counts.
"""

import ctypes
import json
import os
import selectors
import socket
import struct
import sys

_libc = ctypes.CDLL(None, use_errno=True)
_NEWNET = 0x40000000
_HOP_BY_HOP, _UDP, _ROUTING, _FRAGMENT, _AUTHENTICATION, _DESTINATION = 0, 17, 43, 44, 51, 60
_PADDING = bytes((1, 4, 0, 0, 0, 0))  # PadN
_PATIENCE = 0.25

Part = tuple[int, bytes]
"""An extension header: its number, and all of it behind the number of the next."""

_OPTIONS = bytes((0,)) + _PADDING
_ROUTE = bytes((0, 253, 0, 0, 0, 0, 0))  # of an experimental type, with nothing left to visit
_SIGNED = bytes((1, 0, 0)) + struct.pack(">II", 1, 1)  # of no digest
WAYS: dict[str, list[Part]] = {
    "plain": [],
    "hop-by-hop": [(_HOP_BY_HOP, _OPTIONS)],
    "destination": [(_DESTINATION, _OPTIONS)],
    "routing": [(_ROUTING, _ROUTE)],
    "all": [(_HOP_BY_HOP, _OPTIONS), (_DESTINATION, _OPTIONS), (_ROUTING, _ROUTE), (_DESTINATION, _OPTIONS)],
    "authentication": [(_AUTHENTICATION, _SIGNED)],
    "hop-by-hop, authentication": [(_HOP_BY_HOP, _OPTIONS), (_AUTHENTICATION, _SIGNED)],
}
CUTS = {"atomic": 1 << 16, "at its ports": 8, "before its ports": 8}
"""Where fragments are cut, in bytes; the last with options before UDP."""


def entered(name: str, family: int, kind: int, protocol: int = 0) -> socket.socket:
    """A socket in that namespace of the node."""
    here = os.open("/proc/self/ns/net", os.O_RDONLY)
    there = here if name == "node" else os.open(f"/run/netns/{name}", os.O_RDONLY)
    _enter(there)
    try:
        return socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
    finally:
        _enter(here)


def _enter(handle: int) -> None:
    if _libc.setns(handle, _NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def chained(parts: list[Part], last: int, content: bytes) -> Part:
    """Headers before their content: the number of the first, and all of it."""
    for number, rest in reversed(parts):
        content, last = bytes((last,)) + rest + content, number
    return last, content


def datagram(source: str, to: str, ports: tuple[int, int], data: bytes) -> bytes:
    """UDP with its checksum."""
    addresses = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, to)
    head = struct.pack(">HHHH", *ports, 8 + len(data), 0)
    pseudo = addresses + struct.pack(">II", 8 + len(data), _UDP) + head + data + bytes(len(data) % 2)
    total = sum(struct.unpack(f">{len(pseudo) // 2}H", pseudo))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return head[:6] + struct.pack(">H", 0xFFFF ^ total or 0xFFFF) + data


def packets(source: str, to: str, ports: tuple[int, int], data: bytes, way: str) -> list[bytes]:
    """The IPv6 packets of one datagram."""
    told = datagram(source, to, ports, data)
    if way in WAYS:
        contents = [chained(WAYS[way], _UDP, told)]
    else:
        number, whole = chained([(_DESTINATION, _OPTIONS)] if way == "before its ports" else [], _UDP, told)
        cut, contents = CUTS[way], []
        for start in range(0, len(whole), cut):
            piece = whole[start : start + cut]
            more = int(start + cut < len(whole))
            head = (_FRAGMENT, bytes(1) + struct.pack(">HI", start | more, ports[1] << 16 | ports[0]))
            contents.append(chained([head], number, piece))
    addresses = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, to)
    return [struct.pack(">IHBB", 6 << 28, len(rest), first, 64) + addresses + rest for first, rest in contents]


def main(source: str, targets: list[str]) -> dict[str, bool]:
    """Send all, and see what arrives."""
    sender = entered("client", socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW)
    selector = selectors.DefaultSelector()
    arrived: dict[str, bool] = {}
    listening: set[str] = set()
    for number, target in enumerate(targets):
        name, to, port = target.split(",")
        if name not in listening:
            listening.add(name)
            selector.register(entered(name, socket.AF_INET6, socket.SOCK_RAW, _AUTHENTICATION), selectors.EVENT_READ)
        receiver = entered(name, socket.AF_INET6, socket.SOCK_DGRAM)
        receiver.bind((to, int(port)))
        selector.register(receiver, selectors.EVENT_READ)
        for turn, way in enumerate((*WAYS, *CUTS)):
            key = f"{port} {way}"
            arrived[key] = False
            for packet in packets(source, to, (30000 + 100 * number + turn, int(port)), key.encode(), way):
                sender.sendto(packet, (to, 0))
    while ready := selector.select(_PATIENCE):
        for ready_one, _ in ready:
            data = ready_one.fileobj.recv(2048)  # type: ignore[union-attr]
            arrived |= {key: True for key in arrived if data.endswith(key.encode())}
    return arrived


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2:])))
