"""Where a packet goes: the node's routing tables and the rules that choose among them, as `ip rule` orders them.

Law: longest prefix first, then the lowest metric, in the first table that knows the way (net/ipv4/fib_trie.c,
net/core/fib_rules.c). A rule with a selector that isn't understood, and which could apply, is `Unclear`.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property


class Kind(StrEnum):
    """What becomes of a packet on a route, in the words of ip-route(8)."""

    UNICAST = "unicast"
    LOCAL = "local"
    BROADCAST = "broadcast"
    ANYCAST = "anycast"
    MULTICAST = "multicast"
    BLACKHOLE = "blackhole"
    UNREACHABLE = "unreachable"
    PROHIBIT = "prohibit"
    THROW = "throw"


FOR_THE_NODE = frozenset({Kind.LOCAL, Kind.BROADCAST, Kind.ANYCAST, Kind.MULTICAST})
REFUSED = frozenset({Kind.BLACKHOLE, Kind.UNREACHABLE, Kind.PROHIBIT})


class Unclear(Exception):
    """Where the packet goes depends on something that isn't known; the text says on what."""


@dataclass(frozen=True, slots=True)
class Route:
    """One route: `network` and `length` its prefix; `source` the address that the kernel would send from, or 0."""

    network: int
    length: int
    device: str
    kind: Kind = Kind.UNICAST
    via: int = 0
    source: int = 0
    metric: int = 0
    table: str = "main"


@dataclass(frozen=True, slots=True)
class PolicyRule:
    """One line of `ip rule`: which table is asked for which packets; `unclear` names selectors not understood."""

    table: str
    priority: int = 32766
    source: tuple[int, int] | None = None
    destination: tuple[int, int] | None = None
    mark: tuple[int, int] | None = None
    inside: str = ""
    outside: str = ""
    negated: bool = False
    refuses: Kind | None = None
    unclear: str = ""


ORDINARY_RULES = (PolicyRule("local", 0), PolicyRule("main", 32766), PolicyRule("default", 32767))
"""The rules of a node that nobody has given others."""


@dataclass(frozen=True)
class Routes:
    """All routes of one family; `bits` is 32 or 128."""

    bits: int
    routes: Sequence[Route]
    rules: Sequence[PolicyRule] = ORDINARY_RULES

    @cached_property
    def _tables(self) -> Mapping[str, Sequence[tuple[int, Mapping[int, Sequence[Route]]]]]:
        """Per table: the prefix lengths from the longest, and the routes of each by network."""
        tables: dict[str, dict[int, dict[int, list[Route]]]] = defaultdict(dict)
        for route in self.routes:
            tables[route.table].setdefault(route.length, {}).setdefault(route.network, []).append(route)
        return {name: sorted(by_length.items(), reverse=True) for name, by_length in tables.items()}

    def lookup(
        self, address: int, *, source: int = 0, mark: int | None = 0, inside: str = "", outside: str = ""
    ) -> tuple[Route, ...]:
        """The routes to an address: several if the kernel shares out among them, none if there is no way.

        Raises Unclear when a rule that isn't understood stands before the answer.
        """
        for rule in sorted(self.rules, key=lambda each: each.priority):
            applies = _applies(rule, self.bits, address, source, mark, inside, outside)
            if applies is False:
                continue
            found = self._in_table(rule.table, address, outside)
            if rule.refuses:
                found = (Route(0, 0, "", rule.refuses),)
            if found and applies is None:
                raise Unclear(rule.unclear or "the packet's mark")
            if found:
                return found
        return ()

    def _in_table(self, table: str, address: int, outside: str) -> tuple[Route, ...]:
        for length, networks in self._tables.get(table, ()):
            found = networks.get(address >> (self.bits - length) << (self.bits - length), ())
            usable = [r for r in found if not outside or r.device in {outside, ""} or r.kind in FOR_THE_NODE]
            if usable:
                best = min(route.metric for route in usable)
                chosen = tuple(dict.fromkeys(route for route in usable if route.metric == best))
                return () if chosen[0].kind is Kind.THROW else _one_device_each(chosen)
        return ()

    def kind_of(self, address: int, device: str = "") -> Kind | None:
        """What an address is to this node (the kernel's inet_addr_type); None when it has no route at all.

        With a `device`, an address of another interface is none of the node's.
        """
        found = self._in_table("local", address, "")
        if device:
            found = tuple(route for route in found if route.device == device)
        if not found:
            found = self._in_table("main", address, "") or self._in_table("default", address, "")
        return found[0].kind if found else None


def _one_device_each(routes: Iterable[Route]) -> tuple[Route, ...]:
    """Next hops behind one interface make no difference to any rule."""
    return tuple({(route.device, route.kind): route for route in reversed(list(routes))}.values())[::-1]


def _applies(
    rule: PolicyRule, bits: int, address: int, source: int, mark: int | None, inside: str, outside: str
) -> bool | None:
    """Whether a rule is for this packet; None when that isn't known."""
    plain = True
    for prefix, value in ((rule.source, source), (rule.destination, address)):
        if prefix and value >> (bits - prefix[1]) != prefix[0] >> (bits - prefix[1]):
            plain = False
    if (rule.inside and rule.inside != inside) or (rule.outside and rule.outside != outside):
        plain = False
    unknown = bool(rule.unclear)
    if rule.mark:
        value, mask = rule.mark
        if mark is None:
            unknown = True
        elif mark & mask != value & mask:
            plain = False
    if plain and unknown:
        return None
    return plain != rule.negated
