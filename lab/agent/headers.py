"""Packets as bytes: what has no socket of its own is made, summed and read by hand."""

import struct

SCTP = 132


def _crc32c_table() -> list[int]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return table


_CRC32C = _crc32c_table()


def sctp_packet(sport: int, dport: int, tag: int, kind: int, body: bytes) -> bytes:
    """One SCTP packet with one chunk (RFC 9260), checksummed."""
    padding = b"\0" * (-len(body) % 4)
    chunk = struct.pack(">BBH", kind, 0, 4 + len(body)) + body + padding
    head = struct.pack(">HHI", sport, dport, tag)
    crc = 0xFFFFFFFF
    for byte in head + b"\0\0\0\0" + chunk:
        crc = crc >> 8 ^ _CRC32C[(crc ^ byte) & 0xFF]
    return head + struct.pack("<I", crc ^ 0xFFFFFFFF) + chunk


def internet_sum(data: bytes) -> int:
    """The sum that the checksums of IP, TCP, UDP and ICMP are the complement of (RFC 1071); of an even length."""
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def behind_ip(data: bytes, *, six: bool) -> bytes:
    """What follows the IP header in that which a raw socket is given: only IPv4's shows its header."""
    return data if six else data[(data[0] & 15) * 4 :]
