"""Packets walked by `judge` and really sent, within one node: run there as a program, one ruleset at a time.

Laws: what happens is seen by others than those who foretell it: packet sockets in the namespaces around the node, raw
sockets in the node itself, which are given what has passed INPUT. Every packet bears its number behind its header, so
that it is known again whatever was rewritten. One processor carries all, and frames of a protocol of their own go the
same way behind the last packet: when they have arrived, everything has.
"""

import contextlib
import ipaddress
import json
import os
import select
import socket
import struct
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lab.agent.headers import internet_sum, sctp_packet
from lab.agent.namespaces import Namespaces
from nodewalld.core.words import Family
from nodewalld.kernel.node import gather
from nodewalld.walk import ICMP, ICMPV6, SCTP, TCP, UDP, Outcome, Packet, Verdict, judge

MAGIC = b"walked!!"
_FENCE = 0x88B6  # an EtherType for local experiments
_ETHERTYPES = {Family.IPV4: 0x0800, Family.IPV6: 0x86DD}
_HEARERS = ("client", "pod1", "pod2", "beyond", "web")
_REDIRECTS = (5, 137)
_REPLIES = {ICMP: (0, 14), ICMPV6: (129, 140)}
_PATIENCE = 10.0


@dataclass(frozen=True)
class Sent:
    """One packet: `ns` is whence, "node" for the node's own; `device` the node's interface it comes by."""

    number: int
    ns: str
    device: str
    packet: Packet

    def bytes(self) -> bytes:
        """The whole IP packet."""
        p = self.packet
        six = p.family is Family.IPV6
        source, destination = (
            ipaddress.ip_address(n.to_bytes(16 if six else 4)).packed for n in (p.source, p.destination)
        )
        content = _content(p, self.number, source, destination)
        if six:
            return struct.pack(">IHBB", 6 << 28, len(content), p.protocol, 64) + source + destination + content
        head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(content), self.number & 0xFFFF, 0, 64, p.protocol, 0)
        check = struct.pack(">H", 0xFFFF ^ internet_sum(head + source + destination))
        return head[:10] + check + source + destination + content


def _content(p: Packet, number: int, source: bytes, destination: bytes) -> bytes:
    mark = MAGIC + struct.pack(">I", number)
    sport, dport = p.source_ports[0], p.destination_ports[0]
    if p.protocol == SCTP:
        # An INIT, and the mark as a parameter that nobody knows.
        init = struct.pack(">IIHHI", 1 + number, 65536, 1, 1, 1) + struct.pack(">HH", 0xC001, 4 + len(mark)) + mark
        return sctp_packet(sport, dport, 0, 1, init)
    pseudo = source + destination + struct.pack(">HH", 0, p.protocol)
    if p.protocol == TCP:
        plain = struct.pack(">HHIIBBHHH", sport, dport, number, 0, 5 << 4, 2, 4242, 0, 0) + mark
        at = 16
    elif p.protocol == UDP:
        plain, at = struct.pack(">HHHH", sport, dport, 8 + len(mark), 0) + mark, 6
    else:
        kind, code = p.icmp or (8, 0)
        plain, at = struct.pack(">BBHHH", kind, code, 0, number & 0xFFFF, 1) + mark, 2
        pseudo = b"" if p.protocol == ICMP else pseudo
    if pseudo:
        pseudo += struct.pack(">H", len(plain))
    odd = b"\0" * (len(plain) % 2)
    check = 0xFFFF ^ internet_sum(pseudo + plain + odd)
    return plain[:at] + struct.pack(">H", check or 0xFFFF) + plain[at + 2 :]


@dataclass(frozen=True)
class Arrival:
    """Where a packet was seen, and what it had become."""

    ns: str
    destination: str
    port: int


class Ears:
    """Whoever sees packets arrive, and errors come back."""

    def __init__(self, namespaces: Namespaces, family: Family) -> None:
        self.family = family
        self.arrived: dict[int, list[Arrival]] = defaultdict(list)
        self.errors: dict[int, str] = {}
        self.fences: set[tuple[str, bytes]] = set()
        self._socks: dict[socket.socket, str] = {}
        self.packets: dict[str, socket.socket] = {}
        for ns in _HEARERS:
            sock = namespaces.socket(ns, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            sock.bind(("eth0", 3))
            self._hear(sock, ns)
            self.packets[ns] = sock
        for protocol in (TCP, UDP, SCTP, ICMP if family is Family.IPV4 else ICMPV6):
            kind = socket.AF_INET if family is Family.IPV4 else socket.AF_INET6
            sock = namespaces.socket("node", kind, socket.SOCK_RAW, protocol)
            if family is Family.IPV6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            self._hear(sock, f"node/{protocol}")

    def _hear(self, sock: socket.socket, name: str) -> None:
        sock.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)  # SO_RCVBUFFORCE
        self._socks[sock] = name

    def read(self, seconds: float) -> bool:
        ready = select.select(list(self._socks), [], [], seconds)[0]
        for sock in ready:
            with contextlib.suppress(BlockingIOError):
                while True:
                    data, ancillary, _, peer = sock.recvmsg(4096, 256)
                    self._heard(self._socks[sock], data, ancillary, peer)
        return bool(ready)

    def _heard(self, name: str, data: bytes, ancillary: Any, peer: Any) -> None:
        if name.startswith("node/"):
            protocol = int(name.removeprefix("node/"))
            if self.family is Family.IPV4:
                self._packet("node", data)
            else:
                to = next((d[:16] for _, kind, d in ancillary if kind == socket.IPV6_PKTINFO), b"\0" * 16)
                self._content("node", protocol, data, str(ipaddress.ip_address(to)))
        elif peer[2] in {socket.PACKET_HOST, socket.PACKET_BROADCAST, socket.PACKET_MULTICAST}:
            kind = struct.unpack(">H", data[12:14])[0]
            if kind == _FENCE:
                self.fences.add((name, data[14:22]))
            elif kind == _ETHERTYPES[self.family]:
                self._packet(name, data[14:])

    def _packet(self, ns: str, data: bytes) -> None:
        if self.family is Family.IPV4:
            size, protocol, to = (data[0] & 15) * 4, data[9], data[16:20]
        else:
            size, protocol, to = 40, data[6], data[24:40]
        self._content(ns, protocol, data[size:], str(ipaddress.ip_address(to)))

    def _content(self, ns: str, protocol: int, content: bytes, to: str) -> None:
        port = 0 if protocol in {ICMP, ICMPV6} else int.from_bytes(content[2:4])
        if protocol == TCP and content[13] & 4:
            # A reset says which number it is about: one more than the SYN's own and what it carried.
            number = (int.from_bytes(content[8:12]) - 1 - len(MAGIC) - 4) & 0xFFFFFFFF
            self.errors[number] = f"a reset to {to} in {ns}"
            return
        at = content.find(MAGIC)
        if at < 0:
            return
        number = int.from_bytes(content[at + 8 : at + 12])
        if content[0] in _REPLIES.get(protocol, ()):
            return
        if protocol in {ICMP, ICMPV6} and at != 8:  # quoted: an error, or only the hint of a better way
            if content[0] not in _REDIRECTS:
                self.errors[number] = f"ICMP {content[0]}/{content[1]} to {to} in {ns}"
            return
        self.arrived[number].append(Arrival(ns, to, port))


def send_all(packets: Iterable[Sent], family: Family) -> Ears:
    """Send them in their order and wait until whatever they cause has arrived."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    namespaces = Namespaces()
    ears = Ears(namespaces, family)
    kind = socket.AF_INET if family is Family.IPV4 else socket.AF_INET6
    own = namespaces.socket("node", kind, socket.SOCK_RAW, socket.IPPROTO_RAW)
    if family is Family.IPV6:
        own.setsockopt(socket.IPPROTO_IPV6, 36, 1)  # IPV6_HDRINCL
    for sent in packets:
        data = sent.bytes()
        if sent.ns == "node":
            to = str(ipaddress.ip_address(sent.packet.destination.to_bytes(4 if family is Family.IPV4 else 16)))
            with contextlib.suppress(PermissionError, OSError):  # its own OUTPUT, or no route
                own.sendto(data, (to, 0))
        else:
            mac = _hardware(sent)
            frame = mac + b"\2\0\0\0\0\1" + struct.pack(">H", _ETHERTYPES[family]) + data
            ears.packets[sent.ns].send(frame)
        ears.read(0)
    _fence(ears, namespaces)
    return ears


def _hardware(sent: Sent) -> bytes:
    """The node's, or the group's (RFC 1112, RFC 2464), or everybody's."""
    to = ipaddress.ip_address(sent.packet.destination.to_bytes(4 if sent.packet.family is Family.IPV4 else 16))
    if to.is_multicast:
        return (
            b"\x01\0\x5e" + bytes([to.packed[1] & 127]) + to.packed[2:] if to.version == 4 else b"33" + to.packed[-4:]
        )
    return b"\xff" * 6 if str(to).endswith(".255") else bytes.fromhex(_mac(sent.device))


_macs: dict[str, str] = {}


def _mac(device: str) -> str:
    if device not in _macs:
        _macs[device] = open(f"/sys/class/net/{device}/address").read().strip().replace(":", "")  # noqa: PTH123, SIM115
    return _macs[device]


def _fence(ears: Ears, namespaces: Namespaces) -> None:
    """Frames from the node to everybody, three times over: what was queued before each has been carried."""
    senders = {ns: namespaces.socket("node", socket.AF_PACKET, socket.SOCK_RAW, 0) for ns in _HEARERS}
    devices = json.loads(os.environ["WALKED_LINKS"])
    end = time.monotonic() + _PATIENCE
    for turn in range(3):
        mark = MAGIC[:7] + bytes([turn])
        for ns, sock in senders.items():
            frame = b"\xff" * 6 + b"\2\0\0\0\0\2" + struct.pack(">H", _FENCE) + mark
            sock.sendto(frame, (devices[ns], _FENCE))
        while not {(ns, mark) for ns in _HEARERS} <= ears.fences:
            if time.monotonic() > end:
                raise TimeoutError("the fence did not arrive")
            ears.read(0.1)
    while ears.read(0):
        pass


def compare(sent: Sent, verdict: Verdict, ears: Ears) -> str:
    """ "" if what happened is what was foretold, else what differs; packets that are undecided are not asked."""
    seen = ears.arrived.get(sent.number, [])
    if verdict.passes is None:
        return ""
    if bool(seen) is not verdict.passes:
        return f"foretold {sorted(verdict.outcomes)}, but {'arrived: ' + str(seen) if seen else 'nothing arrived'}"
    if not seen:
        silent = verdict.outcomes == {Outcome.DROPPED}
        answer = ears.errors.get(sent.number, "")
        return f"foretold a drop, but there was {answer}" if silent and answer and sent.ns != "node" else ""
    ends = set()
    for path in verdict.paths:
        state = path.state
        size = 16 if state.family is Family.IPV6 else 4
        to = str(ipaddress.ip_address(state.destination.to_bytes(size)))
        here = path.end is not None and path.end.outcome is Outcome.DELIVERED
        ends.add((here, to, state.destination_ports if sent.packet.has_ports else (0, 0)))
    last = seen[-1]
    for here, to, ports in ends:
        if here is (last.ns == "node") and to == last.destination and ports[0] <= last.port <= ports[1]:
            return ""
    return f"foretold {sorted(ends)}, arrived {seen}"


def _packet(spec: Mapping[str, Any], family: Family) -> Packet:
    port = spec.get("port", 0)
    return Packet(
        family,
        spec["protocol"],
        int(ipaddress.ip_address(spec["source"])),
        int(ipaddress.ip_address(spec["to"])),
        source_ports=(spec.get("sport", 0),) * 2,
        destination_ports=(port, port),
        icmp=tuple(spec["icmp"]) if spec.get("icmp") else None,
        inside=spec["device"] if spec["ns"] != "node" else "",
        from_node=spec["ns"] == "node",
    )


def main() -> None:
    """Read packets as JSON, walk them and send them, and print what came of it."""
    spec = json.load(sys.stdin)
    told = {"packets": 0, "decided": 0, "wrong": [], "passed": 0, "seconds": 0.0}
    for name, wanted in spec.items():
        family = Family(name)
        world = gather(family)
        packets = [Sent(one["number"], one["ns"], one["device"], _packet(one, family)) for one in wanted]
        start = time.process_time()
        verdicts = [judge(sent.packet, world) for sent in packets]
        told["seconds"] += time.process_time() - start
        ears = send_all(packets, family)
        for sent, verdict, one in zip(packets, verdicts, wanted, strict=True):
            told["packets"] += 1
            told["decided"] += verdict.passes is not None
            told["passed"] += bool(verdict.passes)
            difference = compare(sent, verdict, ears)
            if difference:
                told["wrong"].append({"packet": one, "difference": difference, "path": _told(verdict)})
    json.dump(told, sys.stdout)


def _told(verdict: Verdict) -> list[str]:
    lines = []
    for path in verdict.paths:
        for step in path.steps:
            lines += [f"{step.hook} {step.backend} {step.table} {step.text}"]
            lines += [f"   {hit.rule.chain} {hit.rule.number} {hit.rule.text}" for hit in step.hits]
        lines.append(f"= {path.end}")
    return lines


if __name__ == "__main__":
    main()
