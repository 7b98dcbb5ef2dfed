"""What a rule does to a packet that it matches.

Law: only what later rules or the routing can notice is carried out: marks, addresses, ports, conntrack's eye. A target
that isn't known may do anything; it is told as such, never passed over.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum

from nodewalld.core.words import Family
from nodewalld.walk.packet import Ports, State, Tracked
from nodewalld.walk.reading import address, masked
from nodewalld.walk.rules import Option, Rule
from nodewalld.walk.world import World, is_link_local

_MOST_ADDRESSES = 16  # of a range to choose from; more are told as one that isn't known


class Fate(StrEnum):
    """What became of a packet in a chain."""

    ACCEPT = "accept"
    DROP = "drop"
    REJECT = "reject"
    UNKNOWN = "unknown"


ENDS = {"ACCEPT": Fate.ACCEPT, "DROP": Fate.DROP, "REJECT": Fate.REJECT}
HANDED_OVER = frozenset({"QUEUE", "NFQUEUE", "TPROXY", "SYNPROXY"})
"""A program decides what becomes of it."""

NOTHING_SEEN = frozenset(
    "LOG NFLOG ULOG TRACE TCPMSS CHECKSUM CLASSIFY TEE DSCP TOS ECN TTL HL SECMARK CONNSECMARK AUDIT IDLETIMER LED "
    "RATEEST TCPOPTSTRIP SET NFACCT".split()
)
"""Targets after which every later rule judges as before. (SET may change a set that a later rule asks; TOS and the like
what nothing here knows anyway.)"""

REWRITES = frozenset({"DNAT", "SNAT", "MASQUERADE", "REDIRECT", "NETMAP"})
MARKS = frozenset({"MARK", "CONNMARK", "CT", "NOTRACK"})


def marked(state: State, rule: Rule) -> State | None:
    """The packet after one of `MARKS`; None when the rule's words are not understood."""
    options = {option.name: option.words for option in rule.parsed.options}
    try:
        if rule.target == "NOTRACK" or "--notrack" in options:
            return replace(state, tracked=Tracked.UNTRACKED)
        if rule.target == "CT":
            return state if options.keys() <= {"--helper", "--timeout", "--ctevents", "--expevents"} else None
        return _mark(state, options) if rule.target == "MARK" else _connmark(state, options)
    except (ValueError, IndexError):
        return None


_Options = Mapping[str, tuple[str, ...]]
_ALL = 0xFFFFFFFF


def _mark(state: State, options: _Options) -> State | None:
    for name, words in options.items():
        change = _change(name, words[0])
        if change is None:
            return None
        value, mask = change
        if mask == _ALL:
            state = replace(state, mark=value)
        elif state.mark is not None:
            state = replace(state, mark=state.mark & ~mask & _ALL ^ value)
    return state


def _change(name: str, word: str) -> tuple[int, int] | None:
    """Value and mask: bits of the mask are cleared, then those of the value turned over (xt_mark.c)."""
    value, mask = masked(word)
    match name:
        case "--set-xmark":
            return value, mask
        case "--set-mark":
            return value, mask | value
        case "--and-mark":
            return 0, ~value & _ALL
        case "--or-mark":
            return value, value
        case "--xor-mark":
            return value, 0
    return None


def _connmark(state: State, options: _Options) -> State | None:
    if state.tracked in {None, Tracked.UNTRACKED, Tracked.INVALID}:
        return state
    both = options.get("--mask")
    of_packet = masked((options.get("--nfmask") or both or ("0xffffffff",))[0])[0]
    of_flow = masked((options.get("--ctmask") or both or ("0xffffffff",))[0])[0]
    if "--save-mark" in options:
        if state.mark is None or state.connmark is None:
            return replace(state, connmark=None)
        return replace(state, connmark=state.connmark & ~of_flow & _ALL ^ state.mark & of_packet)
    if "--restore-mark" in options:
        if state.mark is None or state.connmark is None:
            return replace(state, mark=None)
        return replace(state, mark=state.mark & ~of_packet & _ALL ^ state.connmark & of_flow)
    for name, words in options.items():
        change = _change(name, words[0])
        if change is None:
            return None
        if change[1] == _ALL:
            state = replace(state, connmark=change[0])
        elif state.connmark is not None:
            state = replace(state, connmark=state.connmark & ~change[1] & _ALL ^ change[0])
    return state


def rewritten(state: State, rule: Rule, world: World, *, destination: bool) -> tuple[State, ...] | None:
    """The packet after one of `REWRITES`: several if the kernel chooses; None when the words are not understood.

    `destination`: whether the hook binds destinations (PREROUTING, OUTPUT) or sources.
    """
    options = {option.name: option for option in rule.parsed.options}
    try:
        match rule.target:
            case "DNAT":
                found = tuple(_targets(options["--to-destination"].words[0], state.family))
                return tuple(bound(state, each, destination=True) for each in found) or None
            case "SNAT":
                found = tuple(_targets(options["--to-source"].words[0], state.family))
                return tuple(bound(state, each, destination=False) for each in found) or None
            case "MASQUERADE":
                own = world.address_of(state.outside) or state.source
                return (bound(state, (own, _ports(options)), destination=False),)
            case "REDIRECT":
                return (bound(state, (_redirected(state, world), _ports(options)), destination=True),)
            case "NETMAP":
                return (bound(state, (_mapped(state, options["--to"], destination), None), destination=destination),)
    except (ValueError, KeyError, IndexError):
        return None
    return None


_Target = tuple[int, Ports | None]


def _ports(options: Mapping[str, Option]) -> Ports | None:
    return _port_range(options["--to-ports"].words[0]) if "--to-ports" in options else None


def _port_range(text: str) -> Ports:
    first, _, last = text.partition("-")
    return int(first), int(last.partition("/")[0] or first)


def _targets(text: str, family: Family) -> Iterator[_Target]:
    """ADDRESS[-ADDRESS][:PORT[-PORT]], IPv6 addresses with ports in brackets."""
    if text.startswith("["):
        addresses, _, ports = text[1:].partition("]")
        ports = ports.removeprefix(":")
    elif family is Family.IPV4:
        addresses, _, ports = text.partition(":")
    else:
        addresses, ports = text, ""
    if not addresses:
        yield 0, _port_range(ports)
        return
    first, _, last = addresses.partition("-")
    low, high = address(first, family), address(last or first, family)
    if high - low < _MOST_ADDRESSES:
        for each in range(low, high + 1):
            yield each, _port_range(ports) if ports else None


def _redirected(state: State, world: World) -> int:
    """This node: loopback for its own packets, else what the interface is known by (nf_nat_redirect.c)."""
    if state.from_node:
        return 0x7F000001 if state.family is Family.IPV4 else 1
    # What was dialled with the scope of a link, fe80::/10 or ff02::/16, gets an address of that scope.
    by_link = is_link_local(state.destination, state.family) or state.destination >> 112 & 0xFF0F == 0xFF02
    found = world.address_of(state.inside, by_link=by_link and state.family is Family.IPV6)
    if not found:
        raise ValueError("no address")
    return found


def _mapped(state: State, option: Option, destination: bool) -> int:
    text, _, length = option.words[0].partition("/")
    bits = 32 if state.family is Family.IPV4 else 128
    kept = (1 << (bits - int(length or bits))) - 1
    now = state.destination if destination else state.source
    return address(text, state.family) & ~kept | now & kept


def bound(state: State, target: _Target, *, destination: bool) -> State:
    """The packet with its destination, or source, rewritten; the flow is bound for good, also to what it was."""
    where, ports = target
    if destination:
        new = replace(
            state,
            destination=where or state.destination,
            destination_ports=ports or state.destination_ports,
            bound_destination=True,
        )
        # The kernel only says DNAT of a flow when something has changed (nf_nat_setup_info).
        return replace(new, dnat=state.dnat or new.flow != state.flow)
    new = replace(state, source=where or state.source, source_ports=ports or state.source_ports, bound_source=True)
    return replace(new, snat=state.snat or new.flow != state.flow)


def describe(options: Sequence[Option]) -> str:
    """A target's words, as iptables prints them."""
    return " ".join(option.text for option in options)
