"""Config -> decisions: who may reach what, and what becomes of the others. No word of iptables here.

A renderer (for iptables `nodewalld.core.iptables.render`) writes decisions down; two renderers of one decision must let
the same packets through.
"""

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, replace

from nodewalld.core.config import (
    DEFAULT_ROUTE,
    Action,
    AnchorKind,
    Config,
    Destination,
    ForwardEntry,
    Interfaces,
    JumpEntry,
    Peer,
    PortEntry,
    PortRange,
    Position,
    ProtocolPorts,
    RuleEntry,
    Selector,
    SetRef,
    Where,
    ZoneEntry,
)
from nodewalld.core.environment import Environment
from nodewalld.core.ruletext import split
from nodewalld.core.words import Family, Network

IPVS_SET = "NODEWALL-ipvs"
"""The set of the addresses on kube-ipvs0, which [[port]] leaves alone."""


@dataclass(frozen=True, slots=True)
class Source:
    """One address list element in one family: a network or a kernel set."""

    network: Network | None = None
    set_name: str = ""


@dataclass(frozen=True, slots=True)
class Sources:
    """Packets that come from (or go to) one of these, or, negated, from none. `any`: no condition."""

    items: tuple[Source, ...] = ()
    negated: bool = False
    any: bool = False


@dataclass(frozen=True, slots=True)
class Refusal:
    """What becomes of a refused packet. `enforce` False: it is counted (and logged), and goes on."""

    action: Action
    enforce: bool
    log_prefix: str
    redirect_to: int = 0


@dataclass(frozen=True, slots=True)
class Judgement:
    """A guarded service: whoever dials `services` at `dialled` and is denied, or not allowed, is refused."""

    entry: str
    name: str
    services: tuple[ProtocolPorts, ...]
    dialled: Destination | tuple[Network, ...]
    deny: tuple[Source, ...]
    allow: tuple[Source, ...]
    refusal: Refusal
    from_node: bool
    order: tuple[int, int]


@dataclass(frozen=True, slots=True)
class ZoneDecision:
    """A zone: whose packets to this node it judges, what it allows them, and what becomes of the rest.

    `verdict` with action ACCEPT refuses nothing.
    """

    entry: str
    name: str
    sources: tuple[Source, ...]
    interfaces: tuple[str, ...]
    ports: tuple[ProtocolPorts, ...]
    protocols: tuple[str, ...]
    verdict: Refusal


@dataclass(frozen=True, slots=True)
class Routed:
    """A decision about routed packets of one direction; their replies pass."""

    entry: str
    name: str
    inside: Interfaces
    outside: Interfaces
    source: Sources
    destination: Sources
    protocol: str
    ports: tuple[PortRange, ...]
    verdict: Refusal
    position: Position | None
    order: tuple[int, int]


@dataclass(frozen=True, slots=True)
class RawRule:
    """A `[[rule]]` in one family, as the words that iptables takes."""

    entry: str
    rule: RuleEntry
    words: tuple[str, ...]
    position: Position
    order: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Reach:
    """A `[[jump]]` in one family."""

    entry: str
    jump: JumpEntry
    position: Position
    order: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Decisions:
    """Everything that a configuration decides in one family on this node."""

    family: Family
    failsafe: tuple[ProtocolPorts, ...]
    failsafe_sources: Sources
    judgements: tuple[Judgement, ...]
    zones: tuple[ZoneDecision, ...]
    routed: tuple[Routed, ...]
    rules: tuple[RawRule, ...]
    jumps: tuple[Reach, ...]
    addresses: tuple[str, ...]
    has_service_addresses: bool
    sets: tuple[tuple[str, frozenset[Network]], ...]
    mark: int
    yield_to: tuple[str, ...]
    reasons: tuple[str, ...]


def prefix_length(source: Source) -> int:
    """How closely a zone's source fits: its prefix length; a set counts as a host, and goes before single addresses."""
    return 129 if source.network is None else source.network.prefixlen


def kernel_set_name(name: str, family: Family) -> str:
    """The kernel's name for a `[set.NAME]` in one family."""
    return name if family is Family.IPV4 else f"{name}-v6"


def decide(config: Config, family: Family, node: Environment) -> Decisions:
    """What a configuration decides in one family on this node."""
    return _Decider(config, family, node).decisions()


class _Decider:
    def __init__(self, config: Config, family: Family, node: Environment) -> None:
        self.config, self.family, self.node = config, family, node
        self.set_names = {entry.name for entry in config.sets}
        self.reasons: list[str] = []

    def decisions(self) -> Decisions:
        config, family = self.config, self.family
        services = self.node.service_addresses.get(family, ())
        sets = [(kernel_set_name(s.name, family), self._own(s.members())) for s in config.sets]
        if services:
            sets.append((kernel_set_name(IPVS_SET, family), frozenset(map(ipaddress.ip_network, services))))
        return Decisions(
            family,
            config.failsafe.ports,
            self._sources(config.failsafe.sources),
            tuple(self._judgement(entry) for entry in config.ports),
            tuple(zone for entry in config.zones if (zone := self._zone(entry)).sources or zone.interfaces),
            tuple(decision for entry in config.forwards for decision in self._routed(entry)),
            tuple(self._rule(entry) for entry in config.rules if family in entry.families),
            tuple(self._reach(entry) for entry in config.jumps if family in entry.families),
            self.node.addresses.get(family, ()),
            bool(services),
            tuple(sets),
            config.daemon.mark,
            config.daemon.yield_to,
            tuple(self.reasons),
        )

    def _own(self, networks: Iterable[Network]) -> frozenset[Network]:
        kind = ipaddress.IPv4Network if self.family is Family.IPV4 else ipaddress.IPv6Network
        return frozenset([network for network in networks if isinstance(network, kind)])

    def _items(self, peers: Iterable[Peer]) -> tuple[Source, ...]:
        items = []
        for peer in peers:
            if isinstance(peer, SetRef):
                items.append(Source(set_name=kernel_set_name(peer.name, self.family)))
            elif peer.version == self.family.version:
                items.append(Source(network=peer))
        return tuple(items)

    def _sources(self, selector: Selector) -> Sources:
        items = self._items(selector.peers)
        nothing_excluded = selector.negated and not items
        return Sources(items, selector.negated, any=not selector.peers or nothing_excluded)

    def _judgement(self, entry: PortEntry) -> Judgement:
        refusal = Refusal(entry.action, entry.enforce, _log_prefix(entry.name, log=entry.log), entry.redirect_to)
        dialled = entry.destination
        if not isinstance(dialled, Destination):
            dialled = tuple(n for n in dialled if n.version == self.family.version)
        services = tuple(ProtocolPorts(p, ports) for p in entry.protocols for ports in entry.ports)
        deny, allow = self._items(entry.deny), self._items(entry.allow)
        label, order = f"port/{entry.name}", _order(entry.where)
        return Judgement(label, entry.name, services, dialled, deny, allow, refusal, entry.from_node, order)

    def _zone(self, entry: ZoneEntry) -> ZoneDecision:
        verdict = Refusal(entry.target, entry.enforce, _log_prefix(entry.name, log=entry.log))
        sources = self._items(entry.sources)
        label = f"zone/{entry.name}"
        return ZoneDecision(label, entry.name, sources, entry.interfaces, entry.ports, entry.protocols, verdict)

    def _routed(self, entry: ForwardEntry) -> Iterable[Routed]:
        inside, outside = self._interfaces(entry, entry.inside), self._interfaces(entry, entry.outside)
        if inside is None or outside is None:
            return
        verdict = Refusal(entry.action, entry.enforce, _log_prefix(entry.name, log=entry.log))
        source, destination = self._sources(entry.source), self._sources(entry.destination)
        for wanted in (source, destination):
            if not wanted.any and not wanted.items:
                return  # it names addresses of the other family only
        position = self._position(entry.position) if entry.position else None
        label, order = f"forward/{entry.name}", _order(entry.where)
        protocol, ports = entry.protocol, entry.ports
        where = (inside, outside, source, destination)
        yield Routed(label, entry.name, *where, protocol, ports, verdict, position, order)

    def _interfaces(self, entry: ForwardEntry, wanted: Interfaces) -> Interfaces | None:
        """With @default-route written out. None: the decision can't be written at all now."""
        if DEFAULT_ROUTE not in wanted.names:
            return wanted
        found = self.node.default_routes.get(self.family, ())
        names = tuple(dict.fromkeys((*(n for n in wanted.names if n != DEFAULT_ROUTE), *found)))
        if found:
            return Interfaces(names, wanted.negated)
        self.reasons.append(f"forward/{entry.name}: there is no default route ({self.family})")
        if entry.action is Action.ACCEPT:
            return None
        return Interfaces(("lo",), negated=True)

    def _rule(self, entry: RuleEntry) -> RawRule:
        words = split(entry.text)
        if self.family is Family.IPV6:
            for index, word in enumerate(words[:-1]):
                if word == "--match-set" and words[index + 1] in self.set_names:
                    words[index + 1] = kernel_set_name(words[index + 1], self.family)
        position = self._position(entry.position)
        return RawRule(f"rule/{entry.name}", entry, tuple(words), position, _order(entry.where))

    def _reach(self, entry: JumpEntry) -> Reach:
        return Reach(f"jump/{entry.name}", entry, self._position(entry.position), _order(entry.where))

    def _position(self, position: Position) -> Position:
        """Without the anchors that can't exist in this family, since they hold addresses of the other."""
        return replace(
            position,
            after=tuple(a for a in position.after if a.kind is not AnchorKind.RULE or self._speaks(a.pattern)),
            before=tuple(a for a in position.before if a.kind is not AnchorKind.RULE or self._speaks(a.pattern)),
        )

    def _speaks(self, text: str) -> bool:
        versions = {v for word in split(text) if (v := _version(word))}
        return not versions or self.family.version in versions


def _version(word: str) -> int:
    """4 or 6 for an address or network with a dot or colon in it, else 0."""
    if "." not in word and ":" not in word:
        return 0
    try:
        return ipaddress.ip_network(word, strict=False).version
    except ValueError:
        return 0


def _log_prefix(name: str, *, log: bool) -> str:
    return f"nodewall:{name} " if log else ""


def _order(where: Where) -> tuple[int, int]:
    """Sorts entries as the files are read: nodewalld.toml, then conf.d in lexical order, line by line."""
    return where.rank, where.line
