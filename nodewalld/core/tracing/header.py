"""What a packet's first bytes say of it, and how the same packet is known again further on.

Law: whatever bytes come, there is an answer; what is cut off or strange is left out, not guessed.

Sources: RFC 791, 8200, 9293, 768, 792, 4443.
"""

import struct
from dataclasses import dataclass
from ipaddress import ip_address

from nodewalld.core.words import Family

ICMP, TCP, UDP, ICMPV6, SCTP = 1, 6, 17, 58, 132
_NAMES = {
    ICMP: "icmp",
    TCP: "tcp",
    UDP: "udp",
    ICMPV6: "icmpv6",
    SCTP: "sctp",
    0: "hopopt",  # what is behind it isn't told
    44: "ipv6-frag",
}
_WITH_PORTS = frozenset({TCP, UDP, SCTP})
_EXTENSIONS = frozenset({0, 43, 60})  # hop-by-hop options, routing, destination options: all of the same shape
_FRAGMENT = 44
_TCP_FLAGS = ((0x02, "SYN"), (0x10, "ACK"), (0x01, "FIN"), (0x04, "RST"), (0x08, "PSH"), (0x20, "URG"))
_ECHO = {(ICMP, 8): "echo request", (ICMP, 0): "echo reply", (ICMPV6, 128): "echo request", (ICMPV6, 129): "echo reply"}
_KEY_BYTES = 12  # of a datagram's content, as far as the kernel shows it


@dataclass(frozen=True, slots=True)
class Header:
    """A packet as it is at one place of its path.

    `key` is what no NAT changes, so that the packet is known again; ports are None where there are none. `detail` is
    the flags of TCP, or ICMP's type.
    """

    family: Family
    protocol: str
    source: str
    destination: str
    sport: int | None
    dport: int | None
    detail: str
    key: tuple[object, ...]

    @property
    def ends(self) -> tuple[str, int | None, str, int | None]:
        """From where to where."""
        return self.source, self.sport, self.destination, self.dport

    @property
    def line(self) -> str:
        """For people: tcp 203.0.113.9:40312 -> 10.0.0.1:31002 SYN."""
        source, destination = _end(self.source, self.sport), _end(self.destination, self.dport)
        return f"{self.protocol} {source} -> {destination} {self.detail}".rstrip()


def _end(address: str, port: int | None) -> str:
    if port is None:
        return address
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def parse(packet: bytes, transport: bytes | None = None) -> Header | None:
    """The header of a packet that begins with that of IP; None for what is no IP.

    `transport` is the transport header where it is known apart from the network's.
    """
    version = packet[0] >> 4 if packet else 0
    if version == 4 and len(packet) >= 20:
        length, identity, fragment, protocol = struct.unpack_from(">HHHxB", packet, 2)
        start = (packet[0] & 15) * 4
        first = not fragment & 0x1FFF
        rest = (packet[start:] if transport is None else transport) if first else b""
        return _made(Family.IPV4, packet[12:16], packet[16:20], protocol, rest, (identity, length, fragment & 0x1FFF))
    if version == 6 and len(packet) >= 40:
        flow, length, protocol = struct.unpack_from(">IHB", packet, 0)
        start = 40
        if transport is None:
            protocol, start = _behind_extensions(packet, protocol)
        rest = packet[start:] if transport is None else transport
        return _made(Family.IPV6, packet[8:24], packet[24:40], protocol, rest, (flow & 0xFFFFF, length))
    return None


def _behind_extensions(packet: bytes, protocol: int) -> tuple[int, int]:
    """The transport protocol, and where its header begins."""
    start = 40
    while (protocol in _EXTENSIONS or protocol == _FRAGMENT) and start + 8 <= len(packet):
        following, length = packet[start], packet[start + 1]
        start += 8 if protocol == _FRAGMENT else 8 + length * 8
        protocol = following
    return protocol, start


def _made(
    family: Family, source: bytes, destination: bytes, protocol: int, rest: bytes, key: tuple[object, ...]
) -> Header:
    sport = dport = None
    detail = ""
    if protocol in _WITH_PORTS and len(rest) >= 4:
        sport, dport = struct.unpack_from(">HH", rest)
    if protocol == TCP and len(rest) >= 14:
        detail = " ".join(name for bit, name in _TCP_FLAGS if rest[13] & bit)
        key = (*key, rest[4:14])  # sequence, acknowledgement, flags
    elif protocol == UDP and len(rest) >= 8:
        key = (*key, rest[8 : 8 + _KEY_BYTES])
    elif protocol in (ICMP, ICMPV6) and len(rest) >= 8:
        detail = _ECHO.get((protocol, rest[0]), f"type {rest[0]} code {rest[1]}")
        key = (*key, rest[:2], rest[6:8])  # not the echo's identity, which NAT changes like a port
    name = _NAMES.get(protocol, f"protocol {protocol}")
    ends = str(ip_address(source)), str(ip_address(destination))
    return Header(family, name, *ends, sport, dport, detail, (family, protocol, *key))
