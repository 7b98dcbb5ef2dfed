"""Conditions that ask the node: what an address is to it, what is in its sets, whose socket it is, the way back.

Sources: net/netfilter/xt_addrtype.c, xt_set.c, xt_owner.c, xt_pkttype.c; net/ipv4/netfilter/ipt_rpfilter.c,
net/ipv6/netfilter/ip6t_rpfilter.c.
"""

from collections.abc import Sequence

from nodewalld.core.words import Family
from nodewalld.walk.packet import State
from nodewalld.walk.reading import Judge
from nodewalld.walk.routes import Kind, Unclear
from nodewalld.walk.rules import Option
from nodewalld.walk.world import World, is_multicast

_WORDS = {kind.value.upper(): kind for kind in Kind}
_KNOWN_OF_IPV6 = frozenset({Kind.LOCAL, Kind.ANYCAST, Kind.UNREACHABLE, Kind.PROHIBIT, Kind.BLACKHOLE})


def addrtype(options: Sequence[Option], family: Family) -> Judge:
    """`--src-type` and `--dst-type`, if wanted as seen by the interface of the packet alone."""
    names = {option.name for option in options}
    known = {"--src-type", "--dst-type", "--limit-iface-in", "--limit-iface-out"}
    types = [option for option in options if option.name.endswith("-type")]
    if names - known or not types:
        return lambda _state, _world: None

    def judge(state: State, world: World) -> bool | None:
        device = ""
        if "--limit-iface-in" in names:
            device = state.inside
        elif "--limit-iface-out" in names:
            device = state.outside
        for option in types:
            address = state.source if option.name == "--src-type" else state.destination
            wanted = set(option.words[0].split(","))
            if _is_of(address, wanted, world, family, device) is option.negated:
                return False
        return True

    return judge


def _is_of(address: int, wanted: set[str], world: World, family: Family, device: str) -> bool:
    if family is Family.IPV4:
        if address == 0 and "UNSPEC" in wanted:
            return True
        # inet_dev_addr_type: what no route knows is UNICAST.
        return (world.kind_of(address, device) or Kind.UNICAST).value.upper() in wanted
    multicast = is_multicast(address, family)
    # In IPv6 these must hold beside the others, not instead of them (match_type6).
    if "MULTICAST" in wanted and not multicast:
        return False
    if "UNICAST" in wanted and (multicast or address == 0):
        return False
    if "UNSPEC" in wanted and address != 0:
        return False
    asked = {_WORDS[name] for name in wanted if _WORDS.get(name) in _KNOWN_OF_IPV6}
    return not asked or (not multicast and world.kind_of(address, device) in asked)


def sets(options: Sequence[Option], _family: Family) -> Judge:
    """`--match-set NAME src,dst`. What else can be asked of a set's counters isn't known here."""
    if [option.name for option in options] != ["--match-set"] or len(options[0].words) != 2:
        return lambda _state, _world: None
    name, sides = options[0].words
    negated = options[0].negated

    def judge(state: State, world: World) -> bool | None:
        found = world.sets.get(name)
        answer = found.holds(state, sides.split(","), world.sets.get) if found else None
        return answer if answer is None else answer != negated

    return judge


def owner(options: Sequence[Option], _family: Family) -> Judge:
    """Whose socket a packet comes from: of a packet that is routed, nobody's."""

    def judge(state: State, _world: World) -> bool | None:
        return None if state.from_node else all(option.negated for option in options)

    return judge


def reverse_path(options: Sequence[Option], family: Family) -> Judge:
    """`-m rpfilter`: whether an answer would leave by the interface that the packet came by."""
    names = {option.name for option in options}

    def judge(state: State, world: World) -> bool | None:
        if names - {"--loose", "--validmark", "--accept-local", "--invert"}:
            return None
        inverted = "--invert" in names
        if state.inside == "lo":
            return not inverted
        if is_multicast(state.destination, family) and family is Family.IPV4 and state.source == 0:
            return not inverted
        if is_multicast(state.source, family) or (family is Family.IPV6 and state.source == 0):
            return not inverted
        if "--accept-local" not in names and world.kind_of(state.source) is Kind.LOCAL:
            return inverted
        try:
            mark = state.mark if "--validmark" in names else 0
            return world.reverse_path_holds(state, mark=mark, loose="--loose" in names) is not inverted
        except Unclear:
            return None

    return judge


def packet_type(options: Sequence[Option], family: Family) -> Judge:
    """`--pkt-type`: how the frame was addressed, taken from what was dialled."""

    def judge(state: State, world: World) -> bool | None:
        if len(options) != 1 or not options[0].words:
            return None
        dialled = state.origin[1]
        kind = "unicast"
        if is_multicast(dialled, family):
            kind = "multicast"
        elif world.kind_of(dialled) is Kind.BROADCAST:
            kind = "broadcast"
        return (options[0].words[0] == kind) is not options[0].negated

    return judge
