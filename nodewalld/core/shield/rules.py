"""The shield as values: chains, rules, sets and maps of one nf_tables table, and how nft(8) writes them.

Law: nothing here knows netlink, and no rule accepts: a drop is final for every later hook, an accept would be none.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Self

from nodewalld.core.config import PortRange
from nodewalld.core.words import Family, Network

TABLE = "nodewalld"
"""The name of the table, in the family inet."""

Spans = tuple[tuple[int, int], ...]
"""Runs of addresses as numbers, first and last of each, in order and apart."""

LOG_RATE, LOG_BURST = 5, 10  # packets a second, and at once; as the LOG rules of iptables have it
_SIZE_MIN = 64  # addresses that every set without ranges has room for


class Hook(StrEnum):
    """Where in the kernel a base chain is asked."""

    PREROUTING = "prerouting"
    INPUT = "input"
    FORWARD = "forward"
    OUTPUT = "output"


class Stage(StrEnum):
    """When at its hook a base chain is asked."""

    FIRST = ""  # just before mangle, so before DNAT
    LAST = "-last"  # after filter and security: what should have been answered there

    @property
    def priority(self) -> int:
        """As the kernel counts: mangle is -150, security 50."""
        return -151 if self is Stage.FIRST else 51


class Port(StrEnum):
    """Which port of a packet is meant."""

    DIALLED = "th dport"
    ORIGIN = "ct original proto-dst"


class Side(StrEnum):
    """Which address of a packet is meant."""

    SOURCE = "saddr"
    DESTINATION = "daddr"
    ORIGIN = "original daddr"


class Flow(StrEnum):
    """What conntrack says of a packet; untracked ones are none of these."""

    REPLY = "ct direction reply"
    RELATED = "ct state related"
    DNAT = "ct status dnat"


_IP = {Family.IPV4: "ip", Family.IPV6: "ip6"}
_PROTOCOLS = {6: "tcp", 17: "udp", 132: "sctp", 1: "icmp", 58: "ipv6-icmp"}


def _span(ports: PortRange) -> str:
    return f"{ports.first}" if ports.first == ports.last else f"{ports.first}-{ports.last}"


def _address(family: Family, side: Side) -> str:
    return f"ct original {_IP[family]} daddr" if side is Side.ORIGIN else f"{_IP[family]} {side}"


@dataclass(frozen=True, slots=True)
class OfFamily:
    """A packet of this family."""

    family: Family

    def __str__(self) -> str:
        return f"meta nfproto {self.family}"


@dataclass(frozen=True, slots=True)
class Protocol:
    """The transport protocol, by its number."""

    number: int

    def __str__(self) -> str:
        return f"meta l4proto {_PROTOCOLS.get(self.number, self.number)}"


@dataclass(frozen=True, slots=True)
class Ports:
    """A port within a range."""

    which: Port
    ports: PortRange

    def __str__(self) -> str:
        return f"{self.which} {_span(self.ports)}"


@dataclass(frozen=True, slots=True)
class Within:
    """An address within a network."""

    side: Side
    network: Network

    def __str__(self) -> str:
        family = Family.IPV4 if self.network.version == 4 else Family.IPV6
        return f"{_address(family, self.side)} {self.network}"


@dataclass(frozen=True, slots=True)
class Among:
    """An address in one of the table's sets."""

    side: Side
    family: Family
    name: str

    def __str__(self) -> str:
        return f"{_address(self.family, self.side)} @{self.name}"


@dataclass(frozen=True, slots=True)
class Answered:
    """A destination that this node answers: local, and with `groups` broadcast, anycast and multicast."""

    groups: bool = True

    def __str__(self) -> str:
        return f"fib daddr type local{'-multicast' if self.groups else ''}"


@dataclass(frozen=True, slots=True)
class Link:
    """The interface that a packet came by or leaves by; a name may end in "+", as in iptables."""

    name: str
    outgoing: bool = False

    def __str__(self) -> str:
        name = f"{self.name[:-1]}*" if self.name.endswith("+") else self.name
        return f'{"oifname" if self.outgoing else "iifname"} "{name}"'


@dataclass(frozen=True, slots=True)
class Loopback:
    """A packet that came by the loopback interface."""

    def __str__(self) -> str:
        return "iif lo"


@dataclass(frozen=True, slots=True)
class Marked:
    """This bit of the packet's mark is set."""

    bit: int

    def __str__(self) -> str:
        return f"meta mark & {self.bit:#x} == {self.bit:#x}"


@dataclass(frozen=True, slots=True)
class IcmpType:
    """The type of an ICMP or ICMPv6 packet, as its first byte says."""

    number: int

    def __str__(self) -> str:
        return f"@th,0,8 {self.number}"


Match = OfFamily | Protocol | Ports | Within | Among | Answered | Link | Loopback | Marked | IcmpType | Flow


class Word(StrEnum):
    """A verdict."""

    DROP = "drop"
    RETURN = "return"
    JUMP = "jump"
    GOTO = "goto"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a packet; `chain` for jump and goto."""

    word: Word
    chain: str = ""

    def __str__(self) -> str:
        return f"{self.word} {self.chain}".rstrip()


@dataclass(frozen=True, slots=True)
class Dispatch:
    """The verdict that a map has for a port; none when the port isn't in it."""

    which: Port
    name: str

    def __str__(self) -> str:
        return f"{self.which} vmap @{self.name}"


@dataclass(frozen=True, slots=True)
class Log:
    """Tell the kernel's log, rate-limited, and go on."""

    prefix: str

    def __str__(self) -> str:
        return f'limit rate {LOG_RATE}/second burst {LOG_BURST} packets log prefix "{self.prefix}"'


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule; what drops is counted. `entry` is of the configuration, "" for what belongs to no single one."""

    entry: str
    matches: tuple[Match, ...]
    then: Verdict | Dispatch | Log

    @property
    def counted(self) -> bool:
        """Whether it has a counter."""
        return isinstance(self.then, Verdict) and self.then.word is Word.DROP

    def __str__(self) -> str:
        words = [*map(str, self.matches), *(["counter"] if self.counted else []), str(self.then)]
        return " ".join(words)


class Base(NamedTuple):
    """What makes a chain a base chain."""

    hook: Hook
    stage: Stage

    def __str__(self) -> str:
        return f"type filter hook {self.hook} priority {self.stage.priority}; policy accept;"


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain with all its rules; packets come to it by its `base`, or by others' jumps."""

    name: str
    rules: tuple[Rule, ...]
    base: Base | None = None


@dataclass(frozen=True, slots=True)
class AddressSet:
    """A set of networks. Without `ranges` it holds single addresses, which the kernel finds by their hash."""

    name: str
    family: Family
    networks: frozenset[Network]
    ranges: bool

    @classmethod
    def of(cls, name: str, family: Family, networks: frozenset[Network]) -> Self:
        """The set of these networks, in the kind that finds them best."""
        ranges = not networks or any(network.prefixlen != network.max_prefixlen for network in networks)
        return cls(name, family, networks, ranges)

    @property
    def size(self) -> int:
        """How many addresses to make room for; 0 for ranges.

        The kernel finds an address faster in a table of fixed size. There is room for as many again, so a set becomes
        another one only when it has grown, or shrunk, by far.
        """
        return 0 if self.ranges else max(1 << (2 * len(self.networks) - 1).bit_length(), _SIZE_MIN)

    def spans(self) -> Spans:
        """What it holds; of ranges, what overlaps or touches is one."""
        if not self.ranges:
            return tuple((number, number) for number in sorted(int(net.network_address) for net in self.networks))
        ordered = sorted((int(net.network_address), int(net.broadcast_address)) for net in self.networks)
        merged: list[tuple[int, int]] = []
        for first, last in ordered:
            if merged and first <= merged[-1][1] + 1:
                merged[-1] = merged[-1][0], max(last, merged[-1][1])
            else:
                merged.append((first, last))
        return tuple(merged)


@dataclass(frozen=True, slots=True)
class PortMap:
    """A verdict for each of some ranges of ports, in their order and apart from each other."""

    name: str
    verdicts: tuple[tuple[PortRange, Verdict], ...]

    @property
    def ranges(self) -> bool:
        """Whether any is more than one port; without, the kernel finds a port by its hash."""
        return any(span.first != span.last for span, _ in self.verdicts)

    def __str__(self) -> str:
        spans = (
            (f"{s.first}-{s.last}" if s.first != s.last else f"{s.first}", verdict) for s, verdict in self.verdicts
        )
        return ", ".join(f"{span} : {verdict}" for span, verdict in spans)


@dataclass(frozen=True, slots=True)
class Shield:
    """The whole table, and why what of the configuration stands in iptables alone: entry and reason."""

    chains: tuple[Chain, ...] = ()
    sets: tuple[AddressSet, ...] = ()
    maps: tuple[PortMap, ...] = ()
    iptables_only: tuple[tuple[str, str], ...] = ()

    @property
    def rules(self) -> int:
        """How many rules this is."""
        return sum(len(chain.rules) for chain in self.chains)

    def lines(self) -> Iterator[str]:
        """The table as nft(8) takes it, without the elements of its sets."""
        yield f"table inet {TABLE} {{"
        for entry in self.sets:
            kind = "ipv4_addr" if entry.family is Family.IPV4 else "ipv6_addr"
            found = "flags interval" if entry.ranges else f"size {entry.size}"
            yield f"  set {entry.name} {{ type {kind}; {found}; }}"
        for each in self.maps:
            flags = " flags interval;" if each.ranges else ""
            yield f"  map {each.name} {{ type inet_service : verdict;{flags} elements = {{ {each} }}; }}"
        for chain in self.chains:
            yield f"  chain {chain.name} {{"
            if chain.base:
                yield f"    {chain.base}"
            for rule in chain.rules:
                yield f"    {rule}" + (f' comment "{rule.entry}"' if rule.entry else "")
            yield "  }"
        yield "}"
