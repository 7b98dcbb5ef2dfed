"""What entries say about who may come: allow and deny, zones, IPv6, and the connection that runs the command.

Law: sets are not looked into, for what is in them changes; a list that names one is not judged by this one.
"""

from collections.abc import Iterable, Iterator

from nodewalld.core.config import (
    Action,
    Config,
    Destination,
    Peer,
    PortEntry,
    Problem,
    ProtocolPorts,
    RuleEntry,
    SetRef,
    Where,
    ZoneEntry,
)
from nodewalld.core.lints.facts import NodeFacts
from nodewalld.core.lints.shadow import holds
from nodewalld.core.lints.texts import REFUSALS, overlap, shown, take_apart
from nodewalld.core.lockout import lockouts
from nodewalld.core.words import Family, Network

_FOR_ALL = frozenset({"-p", "--dport", "--dports", "--ctstate", "--state"})
"""Conditions that say what is refused, and not to whom."""


def denies_outside(config: Config, _facts: NodeFacts) -> Iterator[Problem]:
    """deny-outside-allow: a `deny` that takes nothing out of its `allow`."""
    for entry in config.ports:
        allow = _networks(entry.allow)
        for denied in entry.deny:
            if allow and not isinstance(denied, SetRef) and not any(_overlaps(each, denied) for each in allow):
                message = f"{denied} is taken out of allow, and is not in it"
                yield Problem(entry.where, f"port.{entry.name}.deny", message, "leave it out", "deny-outside-allow")


def _networks(peers: Iterable[Peer]) -> tuple[Network, ...] | None:
    """All of a list, or None when sets are in it."""
    whole = tuple(peers)
    networks = tuple(peer for peer in whole if not isinstance(peer, SetRef))
    return networks if len(networks) == len(whole) else None


def _overlaps(one: Network, other: Network) -> bool:
    return holds(one, other) or holds(other, one)


def allows_in_vain(config: Config, _facts: NodeFacts) -> Iterator[Problem]:
    """allow-in-vain: an `allow` whose addresses another entry for the same port refuses; both must allow."""
    for entry in config.ports:
        refuser = _refusing_port(entry, config) or _refusing_zone(entry, config)
        if refuser:
            allowed, port, owner = refuser
            message = f"allows {allowed} at {port}, and {owner} refuses it there: both must allow"
            cure = f"allow it in {owner} too" if owner.startswith("zone") else "one entry for the port"
            yield Problem(entry.where, f"port.{entry.name}.allow", message, cure, "allow-in-vain")


def _refusing_port(entry: PortEntry, config: Config) -> tuple[Network, str, str] | None:
    for other in config.ports:
        allow = _networks(other.allow)
        common = overlap(entry.ports, other.ports)
        protocols = [protocol for protocol in entry.protocols if protocol in other.protocols]
        if other is entry or not other.enforce or allow is None or not common or not protocols:
            continue
        if entry.destination != other.destination or entry.from_node != other.from_node:
            continue
        if any(each.protocol in protocols and overlap((each.ports,), (common,)) for each in config.failsafe.ports):
            continue  # neither refuses anybody there
        for peer in entry.allow:
            if isinstance(peer, SetRef) or (allow and not peer.prefixlen):
                continue  # "any" in one entry and a list in the other: the list is meant, also where it is empty
            if not any(_overlaps(peer, each) for each in allow):
                return peer, f"{shown(common)}/{protocols[0]}", f"port.{other.name}"
    return None


def _refusing_zone(entry: PortEntry, config: Config) -> tuple[Network, str, str] | None:
    if entry.destination is not Destination.LOCAL:
        return None
    services = [ProtocolPorts(protocol, span) for protocol in entry.protocols for span in entry.ports]
    for peer in entry.allow:
        judges = _judges(peer, config.zones)
        if isinstance(peer, SetRef) or peer.is_loopback:
            continue
        for service in services:
            if judges and all(_refuses(zone, service, config) for zone in judges):
                return peer, f"{shown(service.ports)}/{service.protocol}", f"zone.{judges[0].name}"
    return None


def _judges(peer: Peer, zones: Iterable[ZoneEntry]) -> tuple[ZoneEntry, ...]:
    """The zones that judge every packet from there; none where that is not certain.

    For "any" those are all zones, if one has interfaces: what comes in elsewhere belongs to no zone, but is not meant.
    """
    zones = tuple(zones)
    sources = [(source, zone) for zone in zones for source in zone.sources]
    networks = [(source, zone) for source, zone in sources if not isinstance(source, SetRef)]
    if isinstance(peer, SetRef) or len(networks) < len(sources):
        return ()
    around = [pair for pair in networks if holds(pair[0], peer)]
    if around:
        closest = max(around, key=lambda pair: pair[0].prefixlen)
        within = [zone for source, zone in networks if source != closest[0] and holds(peer, source)]
        return tuple(dict.fromkeys((closest[1], *within)))
    everywhere = peer.prefixlen == 0 and any(zone.interfaces for zone in zones)
    return zones if everywhere else ()


def _refuses(zone: ZoneEntry, service: ProtocolPorts, config: Config) -> bool:
    """Whether nothing of a service gets through a zone."""
    allowed = [each.ports for each in (*zone.ports, *config.failsafe.ports) if each.protocol == service.protocol]
    return (
        zone.enforce
        and zone.target is not Action.ACCEPT
        and service.protocol not in zone.protocols
        and not overlap((service.ports,), allowed)
    )


def leaves_ipv6_open(config: Config, facts: NodeFacts) -> Iterator[Problem]:
    """ipv4-only: what is refused in IPv4 and stays open in IPv6, on a node that others reach by IPv6."""
    if not facts.dual_stack:
        return
    if Family.IPV6 not in config.daemon.families:
        if config.ports or config.zones or config.forwards:
            message = "this node has IPv6 addresses, and nothing is guarded there"
            yield _ipv4_only(config.daemon.where, "daemon.families", message, 'families = ["ipv4", "ipv6"]')
        return
    for rule in config.rules:
        if _opens_ipv6(rule, config, facts):
            message = f"refuses in IPv4 only; this node has IPv6 addresses, where {rule.table} {rule.chain} stays open"
            cure = "a [[rule]] for IPv6 as well, or a [[port]]"
            yield _ipv4_only(rule.where, f"rule.{rule.name}.rule", message, cure)
    for forward in config.forwards:
        for key, selector in (("source", forward.source), ("destination", forward.destination)):
            refusing = forward.enforce and forward.action is not Action.ACCEPT and not selector.negated
            if refusing and _everywhere_in_ipv4_only(selector.peers):
                message = "means everybody in IPv4 and nobody in IPv6, which stays open"
                yield _ipv4_only(forward.where, f"forward.{forward.name}.{key}", message, '"any"')
    yield from _zones_open_in_ipv6(config)


def _zones_open_in_ipv6(config: Config) -> Iterator[Problem]:
    held = [source for zone in config.zones for source in zone.sources if not isinstance(source, SetRef)]
    if any(zone.interfaces for zone in config.zones) or any(each.version == 6 and not each.prefixlen for each in held):
        return
    for zone in config.zones:
        if zone.enforce and zone.target is not Action.ACCEPT and _everywhere_in_ipv4_only(zone.sources):
            message = "holds everybody in IPv4; in IPv6 a stranger belongs to no zone, and is left alone"
            yield _ipv4_only(zone.where, f"zone.{zone.name}.sources", message, 'add "::/0"')


def _everywhere_in_ipv4_only(peers: Iterable[Peer]) -> bool:
    networks = _networks(peers) or ()
    return any(not each.prefixlen for each in networks) and all(each.version == 4 for each in networks)


def _opens_ipv6(rule: RuleEntry, config: Config, facts: NodeFacts) -> bool:
    """Whether a rule refuses in IPv4 what nothing of ours refuses in IPv6.

    One that names whom it refuses is meant for those; one that names whom it doesn't is meant for the rest.
    """
    text = take_apart(rule.text)
    if not rule.enforce or rule.families != (Family.IPV4,) or text.target not in REFUSALS or text.protocol == "icmp":
        return False
    if rule.chain not in rule.table.builtin_chains and rule.chain not in facts.chains(Family.IPV6, rule.table):
        return False
    meant = all(each.option in _FOR_ALL or (each.option in ("-s", "-d") and each.negated) for each in text.conditions)
    if not meant:
        return False
    beside = [other for other in config.rules if (other.table, other.chain) == (rule.table, rule.chain)]
    if any(Family.IPV6 in other.families and take_apart(other.text).target in REFUSALS for other in beside):
        return False
    guards = (p for p in config.ports if p.enforce and text.protocol in p.protocols)
    here = (guard for guard in guards if isinstance(guard.destination, Destination))
    return not overlap(text.ports, (span for guard in here for span in guard.ports))


def _ipv4_only(where: Where, key: str, message: str, cure: str) -> Problem:
    return Problem(where, key, message, cure, "ipv4-only")


def locks_out(config: Config, facts: NodeFacts) -> Iterator[Problem]:
    """locks-you-out: an entry that would refuse the ssh connection that runs the command."""
    if facts.connection:
        yield from lockouts(config, facts.environment, facts.connection)
