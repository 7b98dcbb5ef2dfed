"""What has to be known of a node to say what it does with a packet: rules, sets, routes, addresses, switches.

Law: values, handed in by whoever gathered them. What could not be read is missing here, and is told apart from what is
empty: a set that isn't in `sets` can't be decided, an empty one holds nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from nodewalld.core.words import Backend, Family
from nodewalld.walk.ipsets import IpSet
from nodewalld.walk.packet import State
from nodewalld.walk.routes import Kind, Route, Routes
from nodewalld.walk.rules import Chain, Ruleset

SHIELD = "the shield"
"""How the place of a base chain in our own table begins."""


@dataclass(frozen=True, slots=True)
class Unread:
    """A base chain, or another program on the way, that isn't understood: it may drop or change what passes.

    `place` is how people find it: "nft table inet firewalld, chain filter_INPUT". With an `interface` it only sees what
    passes that one.
    """

    place: str
    hook: str
    priority: int
    interface: str = ""


@dataclass(frozen=True)
class BaseChain:
    """One base chain that isn't iptables', with the chains of its table; `nat` for those that may bind a flow."""

    place: str
    hook: str
    priority: int
    base: str
    chains: Mapping[str, Chain]
    nat: bool = False


@dataclass(frozen=True)
class World:
    """One node in one family.

    `rules`: per backend what iptables-save printed; a backend without rules may be left out. `forwarding`: whether
    packets that come by an interface are routed ("" for those not listed). `reverse_path`: rp_filter by interface, 0 to
    2, likewise. `localnet`: interfaces with route_localnet. `groups`: multicast groups by interface, None if not known.
    """

    family: Family
    rules: Mapping[Backend, Ruleset]
    routes: Routes
    sets: Mapping[str, IpSet] = field(default_factory=dict)
    forwarding: Mapping[str, bool] = field(default_factory=lambda: {"": True})
    reverse_path: Mapping[str, int] = field(default_factory=dict)
    localnet: frozenset[str] = frozenset()
    groups: Mapping[str, frozenset[int]] | None = None
    others: Sequence[Unread | BaseChain] = ()

    def kind_of(self, address: int, device: str = "") -> Kind | None:
        """What an address is to this node: see Routes.kind_of; multicast goes by its address."""
        if is_multicast(address, self.family):
            return Kind.MULTICAST
        return self.routes.kind_of(address, device)

    def is_shared(self, address: int) -> bool:
        """Whether an address is many hosts': a frame to it is, too."""
        return self.kind_of(address) in {Kind.BROADCAST, Kind.MULTICAST}

    @cached_property
    def addresses(self) -> Mapping[str, Sequence[Route]]:
        """The local addresses of each interface, as routes in the kernel's order."""
        found: dict[str, list[Route]] = {}
        for route in self.routes.routes:
            if route.table == "local" and route.kind is Kind.LOCAL and route.length == self.routes.bits:
                found.setdefault(route.device, []).append(route)
        return found

    def address_of(self, device: str, *, by_link: bool = False) -> int:
        """The address that an interface is first known by, or `by_link` its first link-local one; 0 without.

        Of IPv6 a global address comes before link-local ones.
        """
        routes = self.addresses.get(device, ())
        sources = [route.source or route.network for route in routes]
        if self.family is Family.IPV6:
            wanted = [each for each in sources if is_link_local(each, self.family) is by_link]
            sources = wanted if by_link else wanted or sources
        return sources[0] if sources else 0

    def reverse_path_holds(self, state: State, *, mark: int | None = 0, loose: bool = False) -> bool:
        """Whether the way back to the source leads through the interface it came by. Raises Unclear."""
        found = self.routes.lookup(state.source, source=state.destination, mark=mark)
        unicast = [route for route in found if route.kind is Kind.UNICAST]
        return bool(unicast) and (loose or any(route.device == state.inside for route in unicast))


def is_multicast(address: int, family: Family) -> bool:
    """224.0.0.0/4 and ff00::/8."""
    return address >> 28 == 0xE if family is Family.IPV4 else address >> 120 == 0xFF


def is_link_local(address: int, family: Family) -> bool:
    """169.254.0.0/16 and fe80::/10."""
    return address >> 16 == 0xA9FE if family is Family.IPV4 else address >> 118 == 0x3FA


def is_loopback(address: int, family: Family) -> bool:
    """127.0.0.0/8 and ::1."""
    return address >> 24 == 127 if family is Family.IPV4 else address == 1
