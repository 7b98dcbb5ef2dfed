"""Hand-made chains: a rule that jumps to one becomes the rules that stand in it, where the meaning stays the same.

Law: a chain is resolved only if no packet can tell the difference: nothing in it returns early, nothing is evaluated
twice that counts how often it is (limit, recent ...), and nothing changes what the jump's own match looks at. The first
reason against it is told instead.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from nodewalld.core.iptables.render import needed_chain
from nodewalld.core.ruletext import join, split
from nodewalld.importing.dump import Line

RULES_MAX = 200
"""How many rules one jump may become."""

_BASE = ("-p", "-s", "-d", "-i", "-o")
_PURE = frozenset(
    "addrtype ah comment connmark conntrack dscp esp hl icmp icmp6 iprange length mac mark multiport owner physdev "
    "pkttype policy sctp set state tcp tcpmss tos ttl udp".split()
)
"""Matches that look at a packet and remember nothing: to ask them again gives the same answer."""

_UNCHANGING = frozenset("ACCEPT DROP REJECT LOG NFLOG AUDIT TRACE DNAT SNAT MASQUERADE REDIRECT NETMAP".split())
"""Targets that end the table, or leave the packet as it is for the next rule's match."""


class CannotCarry(Exception):
    """The rule can't be carried over; the text says why."""


@dataclass(frozen=True, slots=True)
class Inlined:
    """One rule that a jump becomes: its text, and the lines of the dump that it says together."""

    text: str
    lines: tuple[Line, ...]


def inline(line: Line, chains: Mapping[str, Sequence[Line]], hand_made: Mapping[str, str]) -> list[Inlined]:
    """The rules that a hand-made rule becomes: itself, or those of the chain that it leads to.

    `hand_made` holds the hand-made chains. Raises CannotCarry, and ValueError on quotes that don't close.
    """
    return _resolve(line, chains, hand_made, ())


def _resolve(
    line: Line, chains: Mapping[str, Sequence[Line]], hand_made: Mapping[str, str], above: tuple[str, ...]
) -> list[Inlined]:
    words = split(line.rule.text) if line.rule else []
    target = needed_chain(words)
    if target not in hand_made:
        return [Inlined(join(words), (line,))]
    if target in above:
        raise CannotCarry(f"chain {target} leads back to itself")
    if "-g" in words or "--goto" in words:
        raise CannotCarry(f"it goes to the hand-made chain {target} without coming back (-g)")
    inner = [
        part
        for each in _without_last_return(target, chains.get(target, ()))
        for part in _resolve(each, chains, hand_made, (*above, target))
    ]
    if len(inner) > RULES_MAX:
        raise CannotCarry(f"chain {target} would become more than {RULES_MAX} rules")
    match = words[: _target_at(words)]
    if match and len(inner) > 1:
        _refuse_impure(target, match, inner)
    return [Inlined(_joined(target, match, split(part.text)), (line, *part.lines)) for part in inner]


def _without_last_return(chain: str, lines: Sequence[Line]) -> Sequence[Line]:
    if lines and lines[-1].rule and lines[-1].rule.bare == ("-j", "RETURN"):
        lines = lines[:-1]
    for line in lines:
        if line.rule and line.rule.returns:
            words = f"{line.rule.text!r}" if line.rule.target == "RETURN" else "a goto"
            raise CannotCarry(f"the hand-made chain {chain} is left early by {words} (line {line.number})")
    return lines


def _refuse_impure(chain: str, match: Sequence[str], inner: Sequence[Inlined]) -> None:
    """The jump's match is asked once; written before each of several rules it is asked for each of them."""
    modules = [after for word, after in pairwise(match) if word == "-m"]
    counting = next((module for module in modules if module not in _PURE), "")
    if counting:
        raise CannotCarry(f"-m {counting} before the hand-made chain {chain} counts how often it is asked")
    for part in inner[:-1]:
        words = split(part.text)
        at = _target_at(words)
        target = words[at + 1] if at < len(words) else ""
        if target and target not in _UNCHANGING:
            raise CannotCarry(f"{target} in the hand-made chain {chain} may change what the jump to it looks at")


def _target_at(words: Sequence[str]) -> int:
    return next((i for i, word in enumerate(words) if word in {"-j", "--jump", "-g", "--goto"}), len(words))


def _joined(chain: str, match: Sequence[str], words: Sequence[str]) -> str:
    """Both matches in one rule; what may stand only once in a rule stands in one of them, or in both alike."""
    outer, outer_rest = _base(match)
    inner, inner_rest = _base(words)
    for option in outer.keys() & inner.keys():
        if outer[option] != inner[option]:
            raise CannotCarry(f"{option} stands both before and in the hand-made chain {chain}")
    options = {**outer, **inner}
    base = [word for option in ("-s", "-d", "-i", "-o", "-p") for word in options.get(option, ())]
    return join([*base, *outer_rest, *inner_rest])


def _base(words: Sequence[str]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """The options that may stand once, each with its "!" and argument; and the other words."""
    found: dict[str, tuple[str, ...]] = {}
    rest: list[str] = []
    index, end = 0, len(words)
    while index < end and words[index] not in {"-m", "-j", "-g"}:
        bang = words[index] == "!"
        at = index + bang
        if at + 1 < end and words[at] in _BASE:
            found[words[at]] = tuple(words[index : at + 2])
            index = at + 2
        else:
            rest.append(words[index])
            index += 1
    return found, [*rest, *words[index:]]
