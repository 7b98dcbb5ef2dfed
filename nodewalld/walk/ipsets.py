"""ipsets as `ipset save` prints them, and whether a packet is in one.

Law: a set type, an option or an element that isn't understood makes the answer unknown, never wrong. The most specific
prefix decides, and says no where it is marked `nomatch` (net/netfilter/ipset/ip_set_hash_gen.h, mtype_test_cidrs); a
set of the other family, or with more dimensions than the rule names sides, holds nothing (ip_set_core.c, ip_set_test).
"""

import ipaddress
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from nodewalld.core.words import Family
from nodewalld.walk.packet import ICMP, ICMPV6, PROTOCOLS, State

_NUMBERS = PROTOCOLS | {"udplite": 136, "dccp": 33}
_ELEMENT = re.compile(r"add (\S+) (\S+)(.*)")


@dataclass(frozen=True)
class IpSet:
    """One set: its type ("hash:ip,port"), the header's other words, and its elements as they were printed."""

    name: str
    type: str
    header: Mapping[str, str] = field(default_factory=dict)
    elements: Sequence[tuple[str, bool]] = ()
    """Each with whether it is an exception (nomatch)."""

    @property
    def dimensions(self) -> tuple[str, ...]:
        """What an element is made of: ip, net, port, iface, mac, mark, set."""
        return tuple(self.type.partition(":")[2].split(","))

    @cached_property
    def family(self) -> Family | None:
        """The family whose addresses it holds; None for those without."""
        if self.type.startswith(("bitmap:ip", "list:")):
            return None if self.type.startswith("list:") else Family.IPV4
        if self.type in {"bitmap:port", "hash:mac"}:
            return None
        return Family.IPV6 if self.header.get("family") == "inet6" else Family.IPV4

    @cached_property
    def _index(self) -> dict[tuple[object, ...], dict[tuple[object, ...], bool]]:
        """By the elements' shapes (prefix lengths): the values, and which are exceptions."""
        index: dict[tuple[object, ...], dict[tuple[object, ...], bool]] = {}
        for text, exception in self.elements:
            shape, value = self._parse(text)
            index.setdefault(shape, {})[value] = exception
        # As the kernel asks: the longest prefix first.
        return dict(sorted(index.items(), key=lambda item: [-part if isinstance(part, int) else 0 for part in item[0]]))

    def _parse(self, text: str) -> tuple[tuple[object, ...], tuple[object, ...]]:
        shape: list[object] = []
        value: list[object] = []
        for dimension, part in zip(self.dimensions, text.split(","), strict=True):
            if dimension in {"ip", "net"}:
                network = ipaddress.ip_network(part, strict=False)
                shape.append(network.prefixlen)
                value.append(int(network.network_address))
            elif dimension == "port":
                protocol, _, port = part.rpartition(":")
                shape.append("port")
                value.append((_NUMBERS[protocol] if protocol else 0, port))
            elif dimension == "iface":
                shape.append("iface")
                value.append(part)
            elif dimension == "mark":
                shape.append("mark")
                value.append(int(part, 16))
            else:
                raise ValueError(dimension)
        return tuple(shape), tuple(value)

    def holds(self, state: State, sides: Sequence[str], find: Callable[[str], "IpSet | None"]) -> bool | None:
        """Whether the packet is in it, "src" or "dst" for each dimension; `find` is for sets of sets."""
        if self.type == "list:set":
            answers = [inner.holds(state, sides, find) if inner else None for inner in map(find, self._names())]
            return True if True in answers else None if None in answers else False
        if self.family not in {None, state.family} or len(sides) < len(self.dimensions):
            return False
        try:
            index = self._index
        except (ValueError, KeyError):
            return None
        bits = 32 if state.family is Family.IPV4 else 128
        unknown = False
        for shape, values in index.items():
            key = self._key(state, sides, shape, bits)
            if key is None:
                unknown = True
            elif key in values:
                return not values[key] if not unknown else None
        return None if unknown else False

    def _names(self) -> list[str]:
        return [text for text, _ in self.elements]

    def _key(
        self, state: State, sides: Sequence[str], shape: tuple[object, ...], bits: int
    ) -> tuple[object, ...] | None:
        """What an element of this shape would be for the packet; None when that isn't known."""
        key: list[object] = []
        for dimension, side, length in zip(self.dimensions, sides, shape, strict=False):
            source = side == "src"
            if isinstance(length, int):
                if "netmask" in self.header or "bitmask" in self.header:
                    return None if not self.header.get("netmask", "").isdigit() else self._masked(state, source, bits)
                address = state.source if source else state.destination
                key.append(address >> (bits - length) << (bits - length))
            elif dimension == "port":
                port = self._port(state, source)
                if port is None:
                    return None
                key.append(port)
            elif dimension == "iface":
                key.append(state.inside if source else state.outside)
            elif state.mark is None or "markmask" in self.header:
                return None
            else:
                key.append(state.mark)
        return tuple(key)

    def _masked(self, state: State, source: bool, bits: int) -> tuple[object, ...] | None:
        if len(self.dimensions) != 1:
            return None
        length = int(self.header["netmask"])
        address = state.source if source else state.destination
        return (address >> (bits - length) << (bits - length),)

    def _port(self, state: State, source: bool) -> tuple[int, str] | None:
        protocol = 0 if self.type == "bitmap:port" else state.protocol
        if state.icmp is not None and state.protocol in {ICMP, ICMPV6}:
            return None  # printed by name, as "echo-request"
        first, last = state.source_ports if source else state.destination_ports
        return (protocol, str(first)) if first == last else None


def read_sets(text: str) -> dict[str, IpSet]:
    """The sets that `ipset save` printed."""
    found: dict[str, tuple[str, dict[str, str], list[tuple[str, bool]]]] = {}
    for line in text.splitlines():
        if line.startswith("create "):
            _, name, kind, *words = line.split()
            header = {word: words[index + 1] if index + 1 < len(words) else "" for index, word in enumerate(words)}
            found[name] = (kind, header, [])
        elif (match := _ELEMENT.match(line)) and match[1] in found:
            found[match[1]][2].append((match[2], " nomatch" in match[3]))
    return {name: IpSet(name, kind, header, elements) for name, (kind, header, elements) in found.items()}
