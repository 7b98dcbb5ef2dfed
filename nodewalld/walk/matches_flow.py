"""What conntrack says of a packet, as `-m conntrack` and `-m state` ask (net/netfilter/xt_conntrack.c, conntrack_mt).

Law: a packet without a flow (untracked, invalid, or before conntrack has seen it) has a state and nothing else: every
other question is answered no, whatever its negation, unless the state was asked for and holds.
"""

from collections.abc import Sequence

from nodewalld.core.words import Family
from nodewalld.walk.packet import Ports, State, Tracked
from nodewalld.walk.reading import Judge, network, port_range, protocol_number, within
from nodewalld.walk.rules import Option
from nodewalld.walk.world import World

_WITHOUT_FLOW = frozenset({None, Tracked.UNTRACKED, Tracked.INVALID})


def conntrack(options: Sequence[Option], family: Family) -> Judge:
    """All options of one `-m conntrack` or `-m state`."""
    asked = {option.name: option for option in options}
    states = asked.pop("--ctstate", None) or asked.pop("--state", None)
    rest = tuple(asked.values())

    def judge(state: State, _world: World) -> bool | None:
        if states and _in_state(state, states) is states.negated:
            return False
        if state.tracked in _WITHOUT_FLOW:
            return states is not None
        answers = [_answer(state, option, family) for option in rest]
        return False if False in answers else None if None in answers else True

    return judge


def _in_state(state: State, option: Option) -> bool:
    names = set(option.words[0].split(","))
    if state.tracked in _WITHOUT_FLOW:
        return (state.tracked or Tracked.INVALID) in names
    return state.tracked in names or (state.dnat and "DNAT" in names) or (state.snat and "SNAT" in names)


def _answer(state: State, option: Option, family: Family) -> bool | None:
    answer = _plain(state, option, family)
    return answer if answer is None or not option.negated else not answer


def _plain(state: State, option: Option, family: Family) -> bool | None:
    source, destination, source_ports, destination_ports = state.origin
    word = option.words[0] if option.words else ""
    match option.name:
        case "--ctproto":
            return _is_protocol(state, word)
        case "--ctorigsrc":
            return _in_network(source, word, family)
        case "--ctorigdst":
            return _in_network(destination, word, family)
        case "--ctorigsrcport":
            return _in_ports(source_ports, word)
        case "--ctorigdstport":
            return _in_ports(destination_ports, word)
        case "--ctdir":
            # What is described is what a client sends: the replies are other packets, of other ports.
            return word == "ORIGINAL"
        case "--ctreplsrc":
            return _in_network(state.destination, word, family) if state.bound_destination else None
        case "--ctstatus":
            return _in_status(state, set(word.split(",")))
    return None


def _is_protocol(state: State, word: str) -> bool | None:
    try:
        return protocol_number(word) == state.protocol
    except KeyError:
        return None


def _in_network(address: int, word: str, family: Family) -> bool | None:
    try:
        value, mask = network(word, family)
    except ValueError:
        return None
    return address & mask == value


def _in_ports(ports: Ports, word: str) -> bool | None:
    return within(ports, *port_range(word))


def _in_status(state: State, names: set[str]) -> bool | None:
    """Of a new flow that nobody rewrote nothing is said but NONE; an older one has seen replies, or not."""
    if state.tracked is not Tracked.NEW:
        return None
    return "NONE" in names and not state.dnat and not state.snat
