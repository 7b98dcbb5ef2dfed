"""Conditions of rules, each judged against a packet: yes, no, or None where what is known doesn't tell.

Law: what the kernel's module does, by its source under net/netfilter and net/ipv4, ipv6/netfilter. A module, or an
option of one, that isn't listed is never guessed at: it can't be decided. `Condition.lasting` says that the answer is
the same each time for one packet, so that it need only be supposed once (a set's is, a limit's isn't).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from nodewalld.core.words import Family
from nodewalld.walk.matches_flow import conntrack
from nodewalld.walk.matches_node import addrtype, owner, packet_type, reverse_path, sets
from nodewalld.walk.packet import State, Tracked
from nodewalld.walk.reading import Judge, address_range, masked, network, port_range, protocol_number, within
from nodewalld.walk.rules import Option, Parsed
from nodewalld.walk.world import World

_FLAGS = {"FIN": 1, "SYN": 2, "RST": 4, "PSH": 8, "ACK": 16, "URG": 32, "ALL": 63, "NONE": 0}
_NEVER_SAME = frozenset({"statistic", "limit", "recent", "hashlimit", "quota", "connlimit", "connbytes", "rateest"})


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition: `judge` answers without the negation."""

    text: str
    judge: Judge
    negated: bool = False
    lasting: bool = True

    def __call__(self, state: State, world: World) -> bool | None:
        """Whether it holds for the packet; None when that can't be decided."""
        answer = self.judge(state, world)
        return answer if answer is None or not self.negated else not answer

    @property
    def spelled(self) -> str:
        """As iptables prints it."""
        if not self.negated:
            return self.text
        if self.text.startswith("-m "):
            _, name, words = self.text.split(" ", 2)
            return f"-m {name} ! {words}"
        return f"! {self.text}"


def conditions(parsed: Parsed, family: Family) -> tuple[Condition, ...]:
    """What must hold for a rule to match."""
    return tuple(_all(parsed, family))


def _all(parsed: Parsed, family: Family) -> Iterator[Condition]:
    for module, options in parsed.conditions:
        if module in _WHOLE:
            yield _whole(module, options, family)
            continue
        if module in _ALWAYS:
            continue
        if module and (not options or module not in _OPTIONS):
            yield from _unknown(module, options)
            continue
        for option in options:
            make = _OPTIONS[module].get(option.name)
            text = f"-m {module} {option.text}" if module not in {"", "tcp", "udp", "sctp"} else option.text
            try:
                judge = make(option.words, family) if make else None
            except (ValueError, IndexError, KeyError):
                judge = None
            yield Condition(text, judge or undecided, option.negated, module not in _NEVER_SAME)


def _whole(module: str, options: Sequence[Option], family: Family) -> Condition:
    """A module that weighs its options together, negations and all; only a set's is left out: it is one question."""
    negated = module == "set" and len(options) == 1 and options[0].negated
    if negated:
        options = [replace(options[0], negated=False)]
    text = " ".join(("-m", module, *(("! " if o.negated else "") + o.text for o in options)))
    try:
        judge = _WHOLE[module](options, family)
    except (ValueError, IndexError):
        judge = undecided
    return Condition(text, judge, negated)


def _unknown(module: str, options: Sequence[Option]) -> Iterator[Condition]:
    if module in {"tcp", "udp", "sctp", "icmp", "icmp6", "dccp"}:  # without options: -p says it already
        return
    text = " ".join(("-m", module, *(("! " if o.negated else "") + o.text for o in options)))
    yield Condition(text, undecided, lasting=module not in _NEVER_SAME)


def undecided(_state: State, _world: World) -> None:
    """What nothing is known of."""


def _constant(answer: bool) -> Judge:
    return lambda _state, _world: answer


def _source(words: Sequence[str], family: Family) -> Judge:
    value, mask = network(words[0], family)
    return lambda state, _world: state.source & mask == value


def _destination(words: Sequence[str], family: Family) -> Judge:
    value, mask = network(words[0], family)
    return lambda state, _world: state.destination & mask == value


def _interface(words: Sequence[str], _family: Family, *, outside: bool) -> Judge:
    name = words[0]
    wild = name.endswith("+")
    stem = name[:-1]

    def judge(state: State, _world: World) -> bool:
        here = state.outside if outside else state.inside
        return here.startswith(stem) if wild else here == name

    return judge


def _protocol(words: Sequence[str], _family: Family) -> Judge:
    number = protocol_number(words[0])
    return lambda state, _world: not number or state.protocol == number


def _port(words: Sequence[str], _family: Family, *, side: str) -> Judge:
    first, last = port_range(words[0])
    if side == "source":
        return lambda state, _world: within(state.source_ports, first, last)
    return lambda state, _world: within(state.destination_ports, first, last)


def _ports(words: Sequence[str], _family: Family, *, sides: Sequence[str]) -> Judge:
    ranges = [port_range(text) for text in words[0].split(",")]

    def judge(state: State, _world: World) -> bool | None:
        answers = [
            within(state.source_ports if side == "source" else state.destination_ports, *each)
            for each in ranges
            for side in sides
        ]
        return True if True in answers else None if None in answers else False

    return judge


def _tcp_flags(words: Sequence[str], _family: Family) -> Judge:
    mask, wanted = (sum(_FLAGS[name] for name in word.split(",")) for word in words)
    return lambda state, _world: None if state.flags is None else state.flags & mask == wanted


def _icmp_type(words: Sequence[str], _family: Family) -> Judge:
    if words[0] == "any":
        return _constant(True)
    kind, slash, code = words[0].partition("/")
    wanted = int(kind), int(code) if slash else None

    def judge(state: State, _world: World) -> bool | None:
        if state.icmp is None:
            return None
        return state.icmp[0] == wanted[0] and wanted[1] in {None, state.icmp[1]}

    return judge


def _chunks(words: Sequence[str], _family: Family) -> Judge:
    """A described SCTP packet is an INIT or, later in its flow, anything."""
    if words[:1] == ("any",) and "INIT" in words[1].split(","):
        return lambda state, _world: True if state.tracked is not Tracked.ESTABLISHED else None
    return undecided


def _mark(words: Sequence[str], _family: Family) -> Judge:
    value, mask = masked(words[0])
    return lambda state, _world: None if state.mark is None else state.mark & mask == value


def _connmark(options: Sequence[Option], _family: Family) -> Judge:
    """Without a flow there is no match, negated or not (net/netfilter/xt_connmark.c, connmark_mt)."""
    value, mask = masked(options[0].words[0])
    negated = options[0].negated

    def judge(state: State, _world: World) -> bool | None:
        if state.tracked in {None, Tracked.UNTRACKED, Tracked.INVALID}:
            return False
        return None if state.connmark is None else (state.connmark & mask == value) is not negated

    return judge


def _hops(words: Sequence[str], _family: Family, *, compare: Callable[[int, int], bool]) -> Judge:
    value = int(words[0])
    return lambda state, _world: None if state.hops is None else compare(state.hops, value)


def _iprange(words: Sequence[str], family: Family, *, source: bool) -> Judge:
    first, last = address_range(words[0], family)
    return lambda state, _world: first <= (state.source if source else state.destination) <= last


def _probability(words: Sequence[str], _family: Family) -> Judge:
    return _constant(True) if float(words[0]) >= 1 else undecided


def _bridged(_words: Sequence[str], _family: Family) -> Judge:
    """A packet that is routed from one interface to another isn't bridged."""
    return lambda state, _world: None if state.inside and state.inside == state.outside else False


_Make = Callable[[Sequence[str], Family], Judge]
_SPORT, _DPORT = (partial(_port, side=side) for side in ("source", "destination"))
_L4: Mapping[str, _Make] = {
    "--sport": _SPORT,
    "--dport": _DPORT,
    "--source-port": _SPORT,
    "--destination-port": _DPORT,
}
_TCP: Mapping[str, _Make] = {
    **_L4,
    "--tcp-flags": _tcp_flags,
    "--syn": lambda _words, family: _tcp_flags(("FIN,SYN,RST,ACK", "SYN"), family),
}
_OPTIONS: Mapping[str, Mapping[str, _Make]] = {
    "": {
        "-s": _source,
        "-d": _destination,
        "-i": partial(_interface, outside=False),
        "-o": partial(_interface, outside=True),
        "-p": _protocol,
        "-f": lambda _words, _family: _constant(False),  # a described packet is whole
        **_TCP,  # by hand, and by iptables before 1.4, written without -m
    },
    "tcp": _TCP,
    "udp": _L4,
    "sctp": {**_L4, "--chunk-types": _chunks},
    "multiport": {
        "--sports": partial(_ports, sides=("source",)),
        "--dports": partial(_ports, sides=("destination",)),
        "--ports": partial(_ports, sides=("source", "destination")),
    },
    "icmp": {"--icmp-type": _icmp_type},
    "icmp6": {"--icmpv6-type": _icmp_type},
    "mark": {"--mark": _mark},
    "hl": {
        "--hl-eq": partial(_hops, compare=int.__eq__),
        "--hl-lt": partial(_hops, compare=int.__lt__),
        "--hl-gt": partial(_hops, compare=int.__gt__),
    },
    "ttl": {
        "--ttl-eq": partial(_hops, compare=int.__eq__),
        "--ttl-lt": partial(_hops, compare=int.__lt__),
        "--ttl-gt": partial(_hops, compare=int.__gt__),
    },
    "iprange": {
        "--src-range": partial(_iprange, source=True),
        "--dst-range": partial(_iprange, source=False),
    },
    "statistic": {"--mode": lambda _words, _family: _constant(True), "--probability": _probability},
    "physdev": {"--physdev-is-bridged": _bridged},
}
_WHOLE: Mapping[str, Callable[[Sequence[Option], Family], Judge]] = {
    "conntrack": conntrack,
    "state": conntrack,
    "addrtype": addrtype,
    "set": sets,
    "owner": owner,
    "rpfilter": reverse_path,
    "pkttype": packet_type,
    "connmark": _connmark,
    # A described packet has no such header, and these modules then say no, negated or not.
    **dict.fromkeys(("rt", "frag", "ah", "esp", "mh", "dst", "hbh"), lambda _options, _family: _constant(False)),
}
_ALWAYS = frozenset({"comment", "nfacct"})


def unmet(state: State, world: World, found: Iterable[Condition]) -> tuple[Condition, ...] | None:
    """What stands between a packet and a match: None if it doesn't match, else the conditions that can't be decided."""
    open_: list[Condition] = []
    for condition in found:
        answer = condition(state, world)
        if answer is False:
            return None
        if answer is None:
            open_.append(condition)
    return tuple(open_)
