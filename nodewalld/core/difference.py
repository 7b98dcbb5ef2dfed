"""What a plan changes, for people: each chain that it touches, rule by rule, with the numbers before and after.

Law: it is played through on what was observed, step by step, so it shows what the steps do and not what they are meant
to do. A rule that stays has both numbers, one that goes or comes has one; one that is moved goes and comes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any, NamedTuple

from nodewalld.core.desired import PLACED, DesiredTable
from nodewalld.core.observed import Observed
from nodewalld.core.plan import TablePlan
from nodewalld.core.ruletext import Rule, split
from nodewalld.core.steps import Command, Delete, Insert, Step, chain_of
from nodewalld.core.words import Family, Table


@dataclass(frozen=True, slots=True)
class RuleChange:
    """One rule of a chain: its number (from 1) before and after, None where it isn't there then.

    `rule` is as the tool prints what stands, and as we write what comes. `entries` names what of the configuration it
    comes from; a foreign rule has none.
    """

    before: int | None
    after: int | None
    rule: str
    entries: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """One element of `rules`."""
        return {"before": self.before, "after": self.after, "rule": self.rule, "entries": list(self.entries)}


@dataclass(frozen=True, slots=True)
class ChainChange:
    """One chain: whether it exists before and after, and its rules in order."""

    family: Family
    table: Table
    chain: str
    exists: tuple[bool, bool]
    rules: tuple[RuleChange, ...]

    def to_json(self) -> dict[str, Any]:
        """One element of `chains` in `plan --json`."""
        before, after = self.exists
        return {
            "family": self.family.value,
            "table": self.table.value,
            "chain": self.chain,
            "exists": {"before": before, "after": after},
            "rules": [rule.to_json() for rule in self.rules],
        }


class _Rule(NamedTuple):
    """A rule while the steps are played through; `at` says which of the observed ones it is."""

    at: int | None
    text: str


@dataclass
class _Chain:
    observed: tuple[Rule, ...] | None
    rules: list[_Rule] = field(default_factory=list)
    exists: bool = True
    rewritten: bool = False


def differences(planned: TablePlan, desired: DesiredTable, observed: Observed) -> tuple[ChainChange, ...]:
    """What a plan made of these two changes, chain by chain, in the order of its reasons."""
    chains: dict[str, _Chain] = {change.chain: _start(observed, change.chain) for change in planned.changes}
    for step in planned.steps:
        _play(step, chains, observed)
    entries = Entries(desired)
    return tuple(
        ChainChange(
            planned.family,
            planned.table,
            name,
            (chain.observed is not None or name in planned.table.builtin_chains, chain.exists),
            tuple(_numbered(_aligned(chain), name, entries)),
        )
        for name, chain in chains.items()
    )


def _start(observed: Observed, name: str) -> _Chain:
    found = observed.chains.get(name)
    return _Chain(found, [_Rule(index, rule.text) for index, rule in enumerate(found or ())])


def _play(step: Step, chains: dict[str, _Chain], observed: Observed) -> None:
    name = chain_of(step.text) if isinstance(step, Command) else step.chain
    chain = chains.setdefault(name, _start(observed, name))
    match step:
        case Delete():
            chain.rules = [rule for rule in chain.rules if rule.at != step.index]
        case Insert():
            above = (i for i, rule in enumerate(chain.rules) if step.above is not None and rule.at == step.above)
            chain.rules.insert(next(above, len(chain.rules)), _Rule(None, step.text))
        case Command(text):
            word, *rest = text.split(" ", 2)
            if word == "-A":
                chain.rules.append(_Rule(None, rest[1] if len(rest) > 1 else ""))
            else:  # ":CHAIN - [0:0]" and -N make it, empty; -F empties it, -X deletes it
                chain.rules, chain.exists, chain.rewritten = [], word != "-X", True


def _aligned(chain: _Chain) -> list[tuple[str | None, str | None]]:
    """Pairs of a rule's text before and after; None where it isn't there."""
    before = [rule.text for rule in chain.observed or ()]
    if not chain.rewritten:
        return list(_kept(before, chain.rules))
    after = [rule.text for rule in chain.rules]
    alike = list(_matched(before, after, [_loose(t) for t in before], [_loose(t) for t in after]))
    if any(None in pair for pair in alike):
        return alike
    return list(_matched(before, after, before, after))  # it is written anew for what only looks alike


def _kept(before: Sequence[str], after: Sequence[_Rule]) -> Iterator[tuple[str | None, str | None]]:
    """Foreign rules keep their order, so what has no place is new, and what is skipped has gone."""
    told = 0
    for rule in after:
        if rule.at is None:
            yield None, rule.text
            continue
        yield from ((text, None) for text in before[told : rule.at])
        yield before[rule.at], rule.text
        told = rule.at + 1
    yield from ((text, None) for text in before[told:])


def _matched(
    before: Sequence[str], after: Sequence[str], left: Sequence[object], right: Sequence[object]
) -> Iterator[tuple[str | None, str | None]]:
    for word, a, b, c, d in SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        if word == "equal":
            yield from zip(before[a:b], after[c:d], strict=True)
        else:
            yield from ((text, None) for text in before[a:b])
            yield from ((None, text) for text in after[c:d])


def _loose(text: str) -> tuple[str, ...]:
    """A rule's words, as they would be in spite of how iptables prints them: a lone address without its mask."""
    return tuple(word.removesuffix("/32").removesuffix("/128") for word in split(text))


class Entries:
    """Which entries of the configuration a rule comes from, in the chains of one table."""

    def __init__(self, desired: DesiredTable) -> None:
        self._tagged: Mapping[tuple[str, str], tuple[str, ...]] = {
            (place.chain, place.tag): place.entries for place in desired.placements if place.tag
        }
        self._bare = {
            (place.chain, tuple(split(place.text))): place.entries for place in desired.placements if not place.tag
        }

    def of(self, chain: str, rule: Rule) -> tuple[str, ...]:
        """Their names, "port/vault"; none for a foreign rule."""
        if not rule.tag:
            return self._bare.get((chain, rule.words), ())
        # A jump that is left over bears the mark of a position, which says nothing to anybody.
        return self._tagged.get((chain, rule.tag), () if rule.tag.startswith(PLACED) else (rule.tag,))


def _numbered(pairs: Sequence[tuple[str | None, str | None]], chain: str, entries: Entries) -> Iterator[RuleChange]:
    before = after = 0
    for old, new in pairs:
        before += old is not None
        after += new is not None
        text = old if old is not None else new or ""
        numbers = (before if old is not None else None, after if new is not None else None)
        yield RuleChange(*numbers, text, entries.of(chain, Rule(text)))
