"""What a stranger reaches of a node: each door knocked at, by one interface, and what governs the answer.

Law: the answer is `judge`'s, and nothing is called shut that it doesn't call stopped. "Nobody listens" is said only of
what is delivered to this node, and only when its sockets are known.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from nodewalld.core.words import Family
from nodewalld.walk.doors import Door, Listener, doors
from nodewalld.walk.judge import judge_each
from nodewalld.walk.packet import Packet, Ports, endpoint
from nodewalld.walk.verdict import End, Outcome, Path, Verdict
from nodewalld.walk.world import World, is_link_local, is_loopback

STRANGERS = {Family.IPV4: 0xCB007109, Family.IPV6: 0x20010DB8 << 96 | 9}
"""203.0.113.9 and 2001:db8::9: addresses for documentation (RFC 5737, RFC 3849), which nobody has."""


class Answer(StrEnum):
    """What a knock comes to."""

    REACHABLE = "reachable"
    DEPENDS = "depends"
    REFUSED = "refused"
    DROPPED = "dropped"
    CLOSED = "closed"
    """It gets through, and nobody listens."""


@dataclass(frozen=True, slots=True)
class Exposure:
    """One knock, at one address, by one interface.

    `own`: at an address of that interface itself, rather than one that a door names. `to` is where it is led. `entries`
    are those of the configuration that have ruled on it, `by` what has decided otherwise: a foreign rule, a policy, the
    routing, or what the answer depends on. `shield`: whether a way ends in the shield.
    """

    family: Family
    interface: str
    protocol: int
    ports: Ports
    address: int
    own: bool
    doors: tuple[Door, ...]
    answer: Answer
    to: tuple[str, ...]
    entries: tuple[str, ...]
    by: tuple[str, ...]
    shield: bool


def exposures(
    world: World, interface: str, listeners: Sequence[Listener] | None, *, stranger: int = 0
) -> Iterator[Exposure]:
    """Knock at every door by an interface; `stranger` is who knocks (0: one of STRANGERS).

    `listeners` are those of the world's family; None when they can't be known.
    """
    knocks: dict[tuple[int, int, Ports], list[Door]] = {}
    own = own_addresses(world, interface)
    for door in (*doors(world), *(listener.door for listener in listeners or ())):
        if door.device not in {"", interface}:
            continue
        for to in own if door.address is None else (door.address,):
            if not is_loopback(to, world.family) or interface in world.localnet:
                knocks.setdefault((door.protocol, to, door.ports), []).append(door)
    source = stranger or STRANGERS[world.family]
    packets = [
        Packet(world.family, protocol, source, to, destination_ports=ports, inside=interface)
        for protocol, to, ports in knocks
    ]
    for verdict, (key, found) in zip(judge_each(packets, world), knocks.items(), strict=True):
        protocol, to, ports = key
        yield Exposure(
            world.family,
            interface,
            protocol,
            ports,
            to,
            to in own and any(door.address is None for door in found),
            tuple(dict.fromkeys(found)),
            _answer(verdict, listeners),
            _led(verdict),
            _entries(verdict),
            tuple(dict.fromkeys(_by(path) for path in verdict.paths if path.passes is not True)),
            any(path.end is not None and path.end.in_shield for path in verdict.paths),
        )


def own_addresses(world: World, interface: str) -> tuple[int, ...]:
    """The addresses of an interface that can be called from beyond its link."""
    found = (route.network for route in world.addresses.get(interface, ()))
    four = world.family is Family.IPV4
    return tuple(dict.fromkeys(each for each in found if four or not is_link_local(each, world.family)))


def _answer(verdict: Verdict, listeners: Sequence[Listener] | None) -> Answer:
    if verdict.passes:
        return Answer.CLOSED if listeners is not None and _deaf(verdict, listeners) else Answer.REACHABLE
    if verdict.passes is None:
        return Answer.DEPENDS
    return Answer.REFUSED if verdict.outcomes == {Outcome.REJECTED} else Answer.DROPPED


def _deaf(verdict: Verdict, listeners: Iterable[Listener]) -> bool:
    """Whether every way ends at this node, where nobody listens."""
    ends = [path.state for path in verdict.paths]
    return verdict.outcomes == {Outcome.DELIVERED} and not any(
        listener.takes(state.protocol, state.destination, state.destination_ports)
        for listener in listeners
        for state in ends
    )


def _led(verdict: Verdict) -> tuple[str, ...]:
    ends = (path.state for path in verdict.paths if path.end and path.end.outcome is Outcome.FORWARDED)
    return tuple(dict.fromkeys(endpoint(state.destination, state.destination_ports, state.family) for state in ends))


def _entries(verdict: Verdict) -> tuple[str, ...]:
    """The entries whose rules have matched; of what is stopped, for each way the one that leads to the end."""
    found: list[str] = []
    for path in verdict.paths:
        tags = [hit.rule.tag for step in path.steps for hit in step.hits if _is_entry(hit.rule.tag)]
        if path.passes is not False:
            found += tags
        elif path.end and path.end.rule and path.end.rule.tag:
            found += tags[-1:]
    return tuple(dict.fromkeys(found))


def _is_entry(tag: str) -> bool:
    """Whether a rule of ours is of an entry, such as port/vault, rather than of the way to them."""
    return tag == "failsafe" or ("/" in tag and not tag.startswith("at/"))


def _by(path: Path) -> str:
    end = path.end
    if end is None or path.passes is None:
        return "; ".join((*path.doubts, *([_decided(end)] if end and end.outcome is Outcome.UNKNOWN else [])))
    return _decided(end)


def _decided(end: End) -> str:
    """What decided, in a few words; our own rules are told by their entries."""
    if end.rule is None:
        return f"{end.place} (its policy)" if end.place else end.text
    if end.rule.tag:
        return end.rule.tag
    return f"{end.table or end.place} {end.rule.chain} {end.rule.number}"
