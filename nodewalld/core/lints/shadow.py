"""never-matches: what another entry of ours takes whole, so that nothing is left for this one.

Law: said only where it is certain: an order that positions promise, the same conditions or fewer, and an end for every
packet. Foreign rules between the two are not asked: what they take is not ours to judge.
"""

from collections.abc import Iterable, Iterator
from ipaddress import IPv4Network, IPv6Network, collapse_addresses

from nodewalld.core.config import (
    DEFAULT_ROUTE,
    Action,
    Config,
    ForwardEntry,
    Interfaces,
    Peer,
    Place,
    PortRange,
    Position,
    Problem,
    RuleEntry,
    Selector,
    SetRef,
    Where,
    ZoneEntry,
)
from nodewalld.core.iptables.render import stands_itself
from nodewalld.core.lints.facts import NodeFacts
from nodewalld.core.lints.texts import Text, take_apart
from nodewalld.core.ruletext import split
from nodewalld.core.words import Network

CODE = "never-matches"

_ENDS = frozenset({"ACCEPT", "DROP", "REJECT", "DNAT", "SNAT", "REDIRECT", "MASQUERADE"})
_RANKS = {Place.FIRST: 0, Place.EARLY: 1, Place.LAST: 2}


def rules_in_vain(config: Config, _facts: NodeFacts) -> Iterator[Problem]:
    """A [[rule]] behind another one of the same chain that ends the same packets, or more."""
    texts = [(rule, take_apart(rule.text)) for rule in config.rules if not stands_itself(split(rule.text))]
    ending = [(rule, text) for rule, text in texts if rule.enforce and text.target in _ENDS and text.steady]
    for rule, text in texts:
        for other, taking in ending:
            if rule.families and other is not rule and _takes_rule(other, taking, rule, text):
                yield _problem(rule.where, f"rule.{rule.name}.rule", f"rule.{other.name}", other.where)
                break


def _takes_rule(one: RuleEntry, taking: Text, other: RuleEntry, text: Text) -> bool:
    return (
        (one.table, one.chain) == (other.table, other.chain)
        and set(other.families) <= set(one.families)
        and taking.conditions <= text.conditions
        and _above(one.position, one.where, other.position, other.where)
    )


def _above(one: Position, first: Where, other: Position, second: Where) -> bool:
    """Whether positions, else the order of the files, put one above the other for certain."""
    if one == other:
        return (first.rank, first.line) < (second.rank, second.line)
    return one.place in _RANKS and other.place in _RANKS and _RANKS[one.place] < _RANKS[other.place]


def forwards_in_vain(config: Config, _facts: NodeFacts) -> Iterator[Problem]:
    """A [[forward]] whose packets another one takes first; what refuses in mangle comes before all that accepts."""
    for entry in config.forwards:
        for other in config.forwards:
            if other is not entry and other.enforce and _takes_first(other, entry) and _covers(other, entry):
                key, what = f"forward.{entry.name}", "decides no new connection"
                yield _problem(entry.where, key, f"forward.{other.name}", other.where, what)
                break


def _in_mangle(entry: ForwardEntry) -> bool:
    return entry.position is None and entry.action is not Action.ACCEPT


def _takes_first(one: ForwardEntry, other: ForwardEntry) -> bool:
    if _in_mangle(one) and _in_mangle(other):
        # A reject is only marked here, so that what follows still sees the packet.
        return one.action is Action.DROP and _above(Position(), one.where, Position(), other.where)
    if _in_mangle(one) or _in_mangle(other):
        return _in_mangle(one)
    return _above(one.position or Position(), one.where, other.position or Position(), other.where)


def _covers(one: ForwardEntry, other: ForwardEntry) -> bool:
    """Whether every packet that an entry means is one that `one` means too."""
    return (
        _interfaces_cover(one.inside, other.inside)
        and _interfaces_cover(one.outside, other.outside)
        and _addresses_cover(one.source, other.source)
        and _addresses_cover(one.destination, other.destination)
        and one.protocol in ("", other.protocol)
        and (not one.ports or (bool(other.ports) and all(any(_within(p, q) for q in one.ports) for p in other.ports)))
    )


def _within(inner: PortRange, outer: PortRange) -> bool:
    return outer.first <= inner.first and inner.last <= outer.last


def _interfaces_cover(one: Interfaces, other: Interfaces) -> bool:
    if not one.names or one == other:
        return True
    if one.negated or other.negated or not other.names:
        return False
    return all(any(_wildcard_takes(name, each) for name in one.names) for each in other.names)


def _wildcard_takes(wildcard: str, name: str) -> bool:
    if name == wildcard:
        return True
    return wildcard.endswith("+") and name != DEFAULT_ROUTE and name.startswith(wildcard[:-1])


def _addresses_cover(one: Selector, other: Selector) -> bool:
    if not one.peers or one == other:
        return True
    if one.negated or other.negated or not other.peers:
        return False
    return all(each in one.peers or _held(each, one.peers) for each in other.peers)


def _held(peer: Peer, peers: Iterable[Peer]) -> bool:
    """Whether a network lies in one of these."""
    return not isinstance(peer, SetRef) and any(not isinstance(each, SetRef) and holds(each, peer) for each in peers)


def holds(outer: Network, inner: Network) -> bool:
    """Whether one network is the other or a part of it."""
    if isinstance(outer, IPv4Network):
        return isinstance(inner, IPv4Network) and inner.subnet_of(outer)
    return isinstance(inner, IPv6Network) and inner.subnet_of(outer)


def zones_in_vain(config: Config, _facts: NodeFacts) -> Iterator[Problem]:
    """A zone whose sources lie wholly in longer prefixes of others, and its interfaces in earlier wildcards."""
    for index, zone in enumerate(config.zones):
        others = [other for other in config.zones if other is not zone]
        takers = [_taker(source, others) for source in zone.sources]
        takers += [_interface_taker(name, config.zones[:index]) for name in zone.interfaces]
        first = takers[0] if takers else None
        if first and all(takers):
            yield _problem(zone.where, f"zone.{zone.name}", f"zone.{first.name}", first.where)


def _taker(source: Peer, zones: Iterable[ZoneEntry]) -> ZoneEntry | None:
    """A zone with longer prefixes that, together with those of others, leave nothing of a source."""
    if isinstance(source, SetRef):
        return None
    within = [(each, zone) for zone in zones for each in zone.sources if _closer(each, source)]
    if isinstance(source, IPv4Network):
        left: list[Network] = list(collapse_addresses(each for each, _ in within if isinstance(each, IPv4Network)))
    else:
        left = list(collapse_addresses(each for each, _ in within if isinstance(each, IPv6Network)))
    return within[0][1] if left == [source] else None


def _closer(inner: Peer, outer: Network) -> bool:
    return not isinstance(inner, SetRef) and inner != outer and holds(outer, inner)


def _interface_taker(name: str, earlier: Iterable[ZoneEntry]) -> ZoneEntry | None:
    takes = (zone for zone in earlier if any(_wildcard_takes(each, name) for each in zone.interfaces))
    return next(takes, None)


def _problem(where: Where, key: str, taker: str, place: Where, what: str = "never matches") -> Problem:
    message = f"{what}: {taker} ({place.file}:{place.line}) takes all that it could, and is asked first"
    return Problem(where, key, message, "leave one of them out, or narrow or move the other", CODE)
