"""Rule texts taken apart as far as a lint must know: the target, and conditions that all have to hold.

Law: what is not known here stays a condition that nothing else is equal to, so that nobody takes it for less than it
says. A rule whose conditions are among those of another takes whatever that one takes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import ip_network
from itertools import zip_longest

from nodewalld.core.config import PortRange
from nodewalld.core.ruletext import split
from nodewalld.core.words import Network

REFUSALS = frozenset({"DROP", "REJECT"})
"""The targets that end a packet."""

_LONG = {
    "--protocol": "-p",
    "--proto": "-p",
    "--source": "-s",
    "--src": "-s",
    "--destination": "-d",
    "--dst": "-d",
    "--in-interface": "-i",
    "--out-interface": "-o",
    "--match": "-m",
    "--jump": "-j",
    "--goto": "-g",
    "--destination-port": "--dport",
    "--source-port": "--sport",
    "--destination-ports": "--dports",
    "--source-ports": "--sports",
}
_SILENT_MATCHES = frozenset("tcp udp sctp multiport comment conntrack state set addrtype mark".split())
"""Matches that say nothing by themselves, but only by their options."""

_TARGET_OPTIONS = frozenset("--reject-with --to-destination --to-source --to-ports --random --persistent".split())
_NUMBERED = {"1": "icmp", "6": "tcp", "17": "udp", "132": "sctp"}
_STEADY = frozenset(
    "-p -s -d -i -o --dport --sport --dports --sports --ports --src-range --dst-range --ctstate --state --match-set "
    "--mark --src-type --dst-type --icmp-type --icmpv6-type --ctorigdst --ctorigdstport --uid-owner".split()
)
"""Options whose answer depends on the packet alone: not on time, chance or what came before."""


@dataclass(frozen=True, slots=True)
class Condition:
    """One option of a rule text with its arguments, in its short form."""

    option: str
    arguments: tuple[str, ...]
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Text:
    """A rule text: where it sends the packets for which all conditions hold."""

    target: str
    conditions: frozenset[Condition]

    def given(self, option: str) -> tuple[Condition, ...]:
        """The conditions of one option."""
        return tuple(each for each in self.conditions if each.option == option)

    def only(self, *options: str) -> bool:
        """Whether there are no conditions but of these options, none of them negated."""
        return all(each.option in options and not each.negated for each in self.conditions)

    @property
    def steady(self) -> bool:
        """Whether the same packet is always judged the same."""
        return all(each.option in _STEADY for each in self.conditions)

    @property
    def protocol(self) -> str:
        """The protocol that it wants, by name; "" for any, or for all but one."""
        found = [each.arguments[0] for each in self.given("-p") if not each.negated and each.arguments]
        return found[0] if found else ""

    @property
    def ports(self) -> tuple[PortRange, ...]:
        """The destination ports that it wants; none where it names none, excludes some, or calls them by names."""
        wanted = (*self.given("--dport"), *self.given("--dports"))
        if len(wanted) != 1 or wanted[0].negated or len(wanted[0].arguments) != 1:
            return ()
        spans = [_span(word) for word in wanted[0].arguments[0].split(",")]
        return tuple(span for span in spans if span) if all(spans) else ()

    def addresses(self, option: str) -> Iterator[tuple[Network, bool]]:
        """The networks of -s or -d, each with whether it is negated."""
        for each in self.given(option):
            for word in (word for argument in each.arguments for word in argument.split(",")):
                try:
                    yield ip_network(word, strict=False), each.negated
                except ValueError:
                    continue


def _span(word: str) -> PortRange | None:
    first, _, last = word.partition(":")
    if not first.isdecimal() or not (last or first).isdecimal():
        return None
    return PortRange(int(first), int(last or first))


@lru_cache(maxsize=4096)
def take_apart(text: str) -> Text:
    """A rule as iptables takes or prints it after `-A CHAIN`."""
    target, conditions = "", []
    for option, arguments, negated in _groups(split(text)):
        if option in ("-j", "-g"):
            target = arguments[0] if arguments else ""
        elif option == "-m" and arguments and arguments[0] in _SILENT_MATCHES:
            continue
        elif option not in _TARGET_OPTIONS and option != "--comment" and (negated or not _anything(option, arguments)):
            words = tuple(map(_protocol, arguments)) if option == "-p" else arguments
            conditions.append(Condition(option, words, negated))
    return Text(target, frozenset(conditions))


def _protocol(word: str) -> str:
    return _NUMBERED.get(word, word.lower())


def _anything(option: str, arguments: Sequence[str]) -> bool:
    """Whether a condition always holds."""
    if option == "-p":
        return list(arguments) in (["all"], ["0"])
    return option in ("-s", "-d") and list(arguments) in (["0.0.0.0/0"], ["::/0"])


def _groups(words: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...], bool]]:
    """Each option with its arguments, and whether "!" stands before it, or, as of old, before its argument."""
    option, arguments, negated, negate, free = "", list[str](), False, False, False
    for word, after in zip_longest(words, words[1:], fillvalue=""):
        if word == "!" and not free:
            if after.startswith("-"):
                negate = True
            else:
                negated = not negated
        elif word.startswith("-") and len(word) > 1 and not free:
            if option:
                yield option, tuple(arguments), negated
            name, equals, argument = word.partition("=")
            option, arguments = _LONG.get(name, name), [argument] if equals else []
            negated, negate = negate, False
        else:
            arguments.append(word)
        free = word == "--comment"
    if option:
        yield option, tuple(arguments), negated


def overlap(one: Iterable[PortRange], other: Iterable[PortRange]) -> PortRange | None:
    """The first ports that both have."""
    others = tuple(other)
    for a in one:
        for b in others:
            if a.first <= b.last and b.first <= a.last:
                return PortRange(max(a.first, b.first), min(a.last, b.last))
    return None


def shown(span: PortRange) -> str:
    """Ports as people write them."""
    return str(span.first) if span.first == span.last else f"{span.first}-{span.last}"
