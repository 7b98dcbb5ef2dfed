"""iptables-save's text as chains of rules. A chain's rules are taken apart when it is first walked.

Law: nothing of the text is refused: what isn't understood becomes a condition or a target that can't be decided, under
its own words. kube-proxy writes 60,000 rules for 5,000 Services, of which one packet meets a few: hence late and plain.
"""

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from nodewalld.core.ruletext import TAG_PREFIX, split
from nodewalld.core.words import Table
from nodewalld.walk.packet import Ports

_WORD = re.compile(r'(?:"(?:[^"\\]|\\.)*"|[^\s"])+')
_COUNTERS = re.compile(r"\[\d+:\d+\] ")
_ONE_WORD = frozenset({"--comment", "--log-prefix", "--nflog-prefix", "--string", "--hex-string"})

_PORT_MODULES = frozenset({"tcp", "udp", "sctp", "dccp", "udplite"})


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a match or target, with its words; `negated` by a "!" before it."""

    name: str
    words: tuple[str, ...] = ()
    negated: bool = False

    @property
    def text(self) -> str:
        """As iptables prints it, without the negation."""
        return " ".join((self.name, *self.words))


@dataclass(frozen=True, slots=True)
class Parsed:
    """A rule's words in their groups: conditions of iptables itself (module ""), of each module, and the target's."""

    conditions: tuple[tuple[str, tuple[Option, ...]], ...]
    target: str
    goto: bool
    options: tuple[Option, ...]


def words_of(text: str) -> list[str]:
    """What `core.ruletext.split` finds, for what iptables prints, at a tenth of its price."""
    return [split(word)[0] if '"' in word else word for word in _WORD.findall(text)]


def parse(text: str) -> Parsed:
    """Take a rule text apart (what follows `-A CHAIN`)."""
    groups: list[tuple[str, list[Option]]] = [("", [])]
    target, goto, options = "", False, groups[0][1]
    negated = False
    words = words_of(text)
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        if word == "!":
            negated = True
        elif word in {"-m", "--match"} and not target:
            options = []
            groups.append((words[index], options))
            index += 1
        elif word in {"-j", "-g", "--jump", "--goto"} and not target:
            target, goto, options = words[index], word in {"-g", "--goto"}, []
            index += 1
        else:
            end = index
            if word in _ONE_WORD:
                end += 1
            else:
                while end < len(words) and words[end] != "!" and not words[end].startswith("-"):
                    end += 1
            # Without a module of its own, an option of one word is iptables' own: -s, -d, -i, -o, -p, -f.
            place = groups[0][1] if len(word) == 2 and not target else options
            place.append(Option(word, tuple(words[index:end]), negated))
            negated = False
            index = end
    conditions = tuple((name, tuple(found)) for name, found in groups if found or name)
    return Parsed(conditions, target, goto, tuple(options) if target else ())


@dataclass(frozen=True)
class Rule:
    """One rule where it stands; `number` counts from 1, as iptables does."""

    chain: str
    number: int
    text: str

    @cached_property
    def parsed(self) -> Parsed:
        """Its words in their groups."""
        return parse(self.text)

    @property
    def target(self) -> str:
        """What it does, or where it leads; "" when it only counts."""
        return self.parsed.target

    @cached_property
    def tag(self) -> str:
        """Our word in it: the entry of the configuration that it is of; "" for a foreign rule."""
        for name, options in self.parsed.conditions:
            for option in options if name == "comment" else ():
                if option.words and option.words[0].startswith(TAG_PREFIX):
                    return option.words[0].removeprefix(TAG_PREFIX)
        return ""


def _only_port(parsed: Parsed) -> int | None:
    """The one destination port that a rule is for."""
    for module, options in parsed.conditions:
        for option in options if module in _PORT_MODULES else ():
            if option.name == "--dport" and not option.negated and option.words[0].isdigit():
                return int(option.words[0])
    return None


@dataclass(frozen=True)
class Chain:
    """A chain; `policy` is "" for one that the user made."""

    name: str
    policy: str
    texts: Sequence[str]

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        """Its rules in their order."""
        return tuple(Rule(self.name, number, text) for number, text in enumerate(self.texts, 1))

    def following(self, index: int, ports: Ports) -> int:
        """The first rule from an index on that a packet to these ports may match; the chain's length if there is none.

        Of kube-proxy's thousands, each for one port, only those of the packet's own need be looked at.
        """
        if ports[0] != ports[1]:
            return index
        general, single = self._by_port
        found = len(self.texts)
        for indices in (general, single.get(ports[0], ())):
            place = bisect_left(indices, index)
            if place < len(indices):
                found = min(found, indices[place])
        return found

    @cached_property
    def _by_port(self) -> tuple[Sequence[int], Mapping[int, Sequence[int]]]:
        """Which rules are for whatever port, and which for one only."""
        general: list[int] = []
        single: dict[int, list[int]] = {}
        for index, rule in enumerate(self.rules):
            port = _only_port(rule.parsed)
            (general if port is None else single.setdefault(port, [])).append(index)
        return general, single


@dataclass(frozen=True)
class Ruleset:
    """What one backend holds in one family."""

    tables: Mapping[Table, Mapping[str, Chain]] = field(default_factory=dict)

    def chain(self, table: Table, name: str) -> Chain | None:
        """A chain, if it is there."""
        return self.tables.get(table, {}).get(name)


def read(text: str) -> Ruleset:
    """What iptables-save printed, with counters or without."""
    tables: dict[Table, dict[str, tuple[str, list[str]]]] = {}
    chains: dict[str, tuple[str, list[str]]] = {}
    for line in text.splitlines():
        rule = _COUNTERS.sub("", line, count=1) if line.startswith("[") else line
        if rule.startswith("-A "):
            _, name, *rest = rule.split(" ", 2)
            chains.setdefault(name, ("", []))[1].append(rest[0] if rest else "")
        elif line.startswith(":"):
            name, policy = line[1:].split(" ")[:2]
            chains.setdefault(name, ("" if policy == "-" else policy, []))
        elif line.startswith("*") and line[1:] in set(Table):
            chains = tables.setdefault(Table(line[1:]), {})
    return Ruleset(
        {
            table: {name: Chain(name, policy, texts) for name, (policy, texts) in found.items()}
            for table, found in tables.items()
        }
    )
