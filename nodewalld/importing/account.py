"""An account of every line: carried over as a `[[rule]]`, left to the neighbour that owns it, or not possible and why.

Law: each line of a dump that asks for something is in exactly one of the three lists; none is passed over. What is
carried over is an entry that nodewalld's own readers have taken.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, pairwise

from nodewalld.configuration import entries
from nodewalld.configuration.reading import Reading
from nodewalld.configuration.tree import grow
from nodewalld.core.config import AnchorKind, Place, Position
from nodewalld.core.iptables.render import needed_chain
from nodewalld.core.ruletext import Rule, split
from nodewalld.core.words import Family, Table
from nodewalld.importing.dump import Dump, Line
from nodewalld.importing.inline import CannotCarry, Inlined, inline
from nodewalld.importing.owners import USERS_CHAINS, Owners
from nodewalld.importing.places import place
from nodewalld.importing.sets import KernelSet, Named, name_sets, used

_NAME_MAX = 19


@dataclass(frozen=True, slots=True)
class Entry:
    """A `[[rule]]`, and the lines that it comes from; `note` "" when it stands just where it stood."""

    table: Table
    chain: str
    text: str
    position: Position
    families: tuple[Family, ...]
    lines: tuple[Line, ...]
    note: str = ""
    name: str = ""

    @property
    def key(self) -> tuple[Table, str, str, Position]:
        """What an entry of the other family must share to be written with it."""
        return self.table, self.chain, self.text, self.position

    def toml(self) -> dict[str, object]:
        """The keys of the entry as TOML has them."""
        keys: dict[str, object] = {
            "name": self.name,
            "table": self.table.value,
            "chain": self.chain,
            "rule": self.text,
            "families": [family.value for family in self.families],
        }
        if self.position.place is Place.BETWEEN:
            sides = (("after", self.position.after), ("before", self.position.before))
            keys["position"] = {
                side: [a.pattern if a.kind is AnchorKind.TARGET else {a.kind.value: a.pattern} for a in anchors]
                for side, anchors in sides
                if anchors
            }
        elif self.position.place is not Place.EARLY:
            keys["position"] = self.position.place.value
        return keys


@dataclass(frozen=True, slots=True)
class Account:
    """What became of every line. `remarks` are about sets."""

    entries: tuple[Entry, ...]
    carried: tuple[Line, ...]
    foreign: tuple[tuple[Line, str], ...]
    impossible: tuple[tuple[Line, str], ...]
    sets: Mapping[str, Sequence[str]] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def account(dumps: Sequence[Dump], kernel_sets: Mapping[str, KernelSet] | None = None) -> Account:
    """Account for the dumps of one or both families; `kernel_sets` None: their sets can't be looked into."""
    sorters = [_Sorter(dump) for dump in dumps]
    found = [sorter.entries() for sorter in sorters]
    wanted = {s.dump.family: used(entry.text for entry in each) for s, each in zip(sorters, found, strict=True)}
    named = name_sets(wanted, kernel_sets)
    renamed = [[_renamed(entry, named) for entry in each] for each in found]
    merged = _merged(*renamed) if len(renamed) > 1 else list(renamed[0]) if renamed else []
    return Account(
        tuple(_named(merged)),
        tuple(line for sorter in sorters for line in sorter.carried),
        tuple(pair for sorter in sorters for pair in sorter.foreign),
        tuple(pair for sorter in sorters for pair in sorter.impossible),
        named.definitions,
        named.remarks,
    )


class _Sorter:
    """Sorts the lines of one dump."""

    def __init__(self, dump: Dump) -> None:
        self.dump = dump
        self.owners = Owners(dump)
        self.carried: list[Line] = []
        self.foreign: list[tuple[Line, str]] = []
        self.impossible: list[tuple[Line, str]] = []

    def entries(self) -> list[Entry]:
        """What is carried over, in the dump's order; the other lists are filled meanwhile."""
        found = [entry for table in self.dump.chains for entry in self._in_table(table)]
        for line in self.dump.others:
            self.impossible.append((line, self._why_other(line)))
        return found

    def _in_table(self, table: Table) -> Iterator[Entry]:
        chains = self.dump.chains[table]
        hand_made = {name: name for name in chains if self._is_hand_made(table, name)}
        said: dict[Line, str] = {}
        for name, lines in chains.items():
            if name in hand_made:
                continue
            if self.owners.of_chain(name) and name not in USERS_CHAINS:
                self.foreign += [(line, self.owners.of_chain(name)) for line in lines]
            else:
                yield from self._in_chain(table, lines, chains, hand_made, said)
        for name in hand_made:
            for line in chains[name]:
                why = said.get(line, f"nothing that is carried over leads to the hand-made chain {name}")
                if why:
                    self.impossible.append((line, why))
                else:
                    self.carried.append(line)

    def _is_hand_made(self, table: Table, name: str) -> bool:
        return name not in table.builtin_chains and not self.owners.of_chain(name)

    def _in_chain(
        self,
        table: Table,
        lines: Sequence[Line],
        chains: Mapping[str, Sequence[Line]],
        hand_made: Mapping[str, str],
        said: dict[Line, str],
    ) -> Iterator[Entry]:
        """The entries of one chain that people and neighbours write into.

        `said` is told of each line of a hand-made chain: "" when entries say it, else why they don't.
        """
        own: list[tuple[int, list[Entry]]] = []
        foreign: list[Rule] = []
        for line in lines:
            try:
                owner = self.owners.of_rule(line)
                parts = [] if owner else self._parts(table, line, chains, hand_made)
            except (CannotCarry, ValueError) as error:
                self.impossible.append((line, str(error)))
                for inner in _led_to(line, chains, hand_made):
                    said.setdefault(inner, f"line {line.number}, which leads to it, can't be carried over")
                foreign += [line.rule] if line.rule and _is_readable(line.rule) else []  # it stays as it is, by hand
                continue
            if owner and line.rule:
                foreign += [line.rule] if owner != "nodewalld" else []  # ours are never foreign to one another
                self.foreign.append((line, owner))
                continue
            own.append((len(foreign), parts))
            self.carried.append(line)
            said.update(dict.fromkeys(_led_to(line, chains, hand_made), ""))
        for slot, parts in own:
            found = place(slot, foreign)
            yield from (replace(part, position=found.position, note=found.note) for part in parts)

    def _parts(
        self, table: Table, line: Line, chains: Mapping[str, Sequence[Line]], hand_made: Mapping[str, str]
    ) -> list[Entry]:
        """The entries that one hand-made line becomes, their positions left open. Raises CannotCarry, ValueError."""
        parts = [self._entry(table, line, part) for part in inline(line, chains, hand_made)]
        if not parts:
            raise CannotCarry("it leads to a hand-made chain that does nothing")
        return parts

    def _entry(self, table: Table, line: Line, part: Inlined) -> Entry:
        """One entry, taken by nodewalld's own reader. Raises CannotCarry with what the reader says."""
        family = (self.dump.family,)
        entry = Entry(table, line.chain, part.text, Position(), family, part.lines, name="x")
        if not part.text.isprintable() and any("\ud800" <= char <= "\udfff" for char in part.text):
            raise CannotCarry("it holds bytes that are not UTF-8")
        reading = Reading((), lambda _: "", complete=True)
        entries.rule(grow(entry.toml(), {}, line.file), reading)
        if reading.problems:
            raise CannotCarry("; ".join(problem.message for problem in reading.problems))
        return entry

    def _why_other(self, line: Line) -> str:
        if not line.text.startswith(":"):
            return "only -A can be carried over"
        policy = line.text.rpartition(" ")[2]
        whose = {owner for each, owner in self.foreign if (each.table, each.chain) == (line.table, line.chain)}
        setters = ", ".join(sorted(whose & {"Docker", "ufw", "firewalld", "libvirt"}))
        if setters:
            return f"the policy {policy} can't be carried over; it may be {setters}'s own"
        cure = "a [zone.NAME]" if line.chain == "INPUT" else "a [[forward]] or [[rule]] at position last"
        return f"the policy {policy} can't be carried over; {cure} can say the same"


def _is_readable(rule: Rule) -> bool:
    try:
        return bool(rule.words)
    except ValueError:
        return False


def _led_to(line: Line, chains: Mapping[str, Sequence[Line]], hand_made: Mapping[str, str]) -> list[Line]:
    """Every line of the hand-made chains that a rule leads to, directly or not."""
    found: dict[Line, None] = {}
    todo, seen = [line], set[str]()
    while todo:
        each = todo.pop()
        try:
            target = needed_chain(split(each.rule.text)) if each.rule else ""
        except ValueError:
            continue
        if target in hand_made and target not in seen:
            seen.add(target)
            todo += chains.get(target, ())
            found.update(dict.fromkeys(chains.get(target, ())))
    return list(found)


def _renamed(entry: Entry, named: Named) -> Entry:
    return replace(entry, text=named.rewrite(entry.text, entry.families[0]))


def _merged(first: Sequence[Entry], second: Sequence[Entry]) -> list[Entry]:
    """Both families' entries: what both have alike is written once, and neither's order is changed."""
    keys = [entry.key for entry in first], [entry.key for entry in second]
    merged: list[Entry] = []
    for operation, a, b, c, d in difflib.SequenceMatcher(None, *keys, autojunk=False).get_opcodes():
        if operation == "equal":
            for one, other in zip(first[a:b], second[c:d], strict=True):
                lines = (*one.lines, *other.lines)
                merged.append(replace(one, families=(*one.families, *other.families), lines=lines))
        else:
            merged += [*first[a:b], *second[c:d]]
    return merged


def _named(merged: Sequence[Entry]) -> Iterator[Entry]:
    taken: set[str] = set()
    for entry in merged:
        wish = _wish(entry)
        names = (wish if number == 1 else f"{wish[: _NAME_MAX - 1 - len(str(number))]}-{number}" for number in count(1))
        name = next(name for name in names if name not in taken)
        taken.add(name)
        yield replace(entry, name=name)


def _wish(entry: Entry) -> str:
    """A name: what the rule's comment calls it, else its chain and port; another one in a file of IPv6's rules."""
    rule = Rule(entry.text)
    words = rule.words
    port = next((a for w, a in pairwise(words) if w in {"--dport", "--dports"}), "")
    told = rule.comments[0] if rule.comments else f"{entry.chain} {port or rule.target}"
    told = f"ip6 {told}" if entry.families == (Family.IPV6,) else told
    letters = "".join(c if c.isascii() and c.isalnum() else " " for c in told.lower())
    name = "-".join(letters.split())[:_NAME_MAX].strip("-") or entry.chain.lower()[:_NAME_MAX]
    return name.removesuffix("-v6") or "rule"
