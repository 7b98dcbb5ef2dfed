"""What a configuration says to one connection, judged as its first packet would be.

Law: judged by what the client dialled, with the content of the sets; the same answer as the kernel gives to the
decisions of [[port]], zones and the failsafe. `[[rule]]` texts are not judged here.
"""

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from nodewalld.core.config import Action, Destination, ProtocolPorts
from nodewalld.core.decide import Decisions, Judgement, Source, Sources, ZoneDecision, prefix_length
from nodewalld.core.words import Family, Network

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_BY_LINK = {Family.IPV4: ipaddress.ip_network("169.254.0.0/16"), Family.IPV6: ipaddress.ip_network("fe80::/10")}


@dataclass(frozen=True, slots=True)
class Dialled:
    """What a client dialled, the port that answers it now, and whether somebody's DNAT leads it elsewhere."""

    protocol: str
    source: Address
    destination: Address
    port: int
    answering_port: int = 0
    rewritten: bool = False


def wants_flows(decisions: Decisions) -> bool:
    """Whether there is any redirect to judge flows for."""
    return any(j.refusal.action is Action.REDIRECT and j.refusal.enforce for j in decisions.judgements)


def slipped(decisions: Decisions, flow: Dialled) -> bool:
    """Whether a flow is to be ended that a redirect should have caught: nat sees only a flow's first packet.

    A stranger's flow to a listener of this node itself is not: mangle INPUT drops its packets for as long as conntrack
    knows who began it. Forgotten, it could be revived by the server's next word, with the client's packets as replies.
    """
    own = _is_own(decisions, flow.source)
    return (flow.rewritten or own) and any(
        j.refusal.action is Action.REDIRECT and flow.answering_port != j.refusal.redirect_to
        for j in refusing(decisions, flow)
    )


def _is_own(decisions: Decisions, source: Address) -> bool:
    return source.is_loopback or str(source) in decisions.addresses


def refusing(decisions: Decisions, flow: Dialled) -> tuple[Judgement, ...]:
    """The entries that refuse a flow."""
    sets = dict(decisions.sets)
    if _serves(decisions.failsafe, flow) and _among(decisions.failsafe_sources, flow.source, sets):
        return ()
    own = _is_own(decisions, flow.source)
    return tuple(
        judgement
        for judgement in decisions.judgements
        if judgement.refusal.enforce
        and (judgement.from_node or not own)
        and _serves(judgement.services, flow)
        and _dialled(decisions, judgement, flow.destination)
        and _denied(judgement, flow.source, sets)
    )


def zones_refusing(decisions: Decisions, flow: Dialled) -> tuple[ZoneDecision, ...]:
    """The zone of a flow's source, if it refuses the flow; without one, every interface's zone that would."""
    sets = dict(decisions.sets)
    local = str(flow.destination) in decisions.addresses or flow.destination in _BY_LINK[decisions.family]
    if not local or (_serves(decisions.failsafe, flow) and _among(decisions.failsafe_sources, flow.source, sets)):
        return ()
    members = [(source, zone) for zone in decisions.zones for source in zone.sources]
    held = [(source, zone) for source, zone in members if _holds((source,), flow.source, sets)]
    if held:
        candidates: tuple[ZoneDecision, ...] = (max(held, key=lambda pair: prefix_length(pair[0]))[1],)
    else:
        candidates = tuple(zone for zone in decisions.zones if zone.interfaces)
    return tuple(zone for zone in candidates if _refuses(zone, flow))


def _refuses(zone: ZoneDecision, flow: Dialled) -> bool:
    return zone.verdict.enforce and zone.verdict.action is not Action.ACCEPT and not _serves(zone.ports, flow)


def _serves(services: Iterable[ProtocolPorts], flow: Dialled) -> bool:
    return any(s.protocol == flow.protocol and s.ports.first <= flow.port <= s.ports.last for s in services)


def _dialled(decisions: Decisions, judgement: Judgement, address: Address) -> bool:
    if judgement.dialled is Destination.ANY:
        return True
    if judgement.dialled is Destination.LOCAL:
        by_link = address in _BY_LINK[decisions.family]
        return str(address) in decisions.addresses or address.is_loopback or by_link
    return any(address in network for network in judgement.dialled)


def _denied(judgement: Judgement, source: Address, sets: Mapping[str, frozenset[Network]]) -> bool:
    return _holds(judgement.deny, source, sets) or not _holds(judgement.allow, source, sets)


def _among(sources: Sources, address: Address, sets: Mapping[str, frozenset[Network]]) -> bool:
    return sources.any or _holds(sources.items, address, sets)


def _holds(items: Iterable[Source], address: Address, sets: Mapping[str, frozenset[Network]]) -> bool:
    return any(
        _in_set(address, sets.get(item.set_name, frozenset())) if item.network is None else address in item.network
        for item in items
    )


def _in_set(address: Address, networks: frozenset[Network]) -> bool:
    """Asked once for each length of a prefix, not for each of 65,536 entries."""
    return any(ipaddress.ip_network((address, length), strict=False) in networks for length in _lengths(networks))


@lru_cache(maxsize=8)
def _lengths(networks: frozenset[Network]) -> tuple[int, ...]:
    return tuple({network.prefixlen for network in networks})
