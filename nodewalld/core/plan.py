"""plan(desired, observed): what must change so that ours stand right. Pure, and empty when they do.

Laws:
1. Planned from what is observed, never from what was written before.
2. Foreign rules are neither deleted nor moved. Ours are deleted by their text or their handle, never by number: a
   number that has become stale between reading and writing would hit somebody else's rule. (Surplus copies of a
   `[[jump]]` are the exception that the contract names.)
3. One table's plan is one transaction. The plan for what its commit leaves behind is empty.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from nodewalld.core.config import Place
from nodewalld.core.desired import OWN_PREFIX, PLACED, DesiredTable, Line, OwnChain, Placement
from nodewalld.core.events import Reason
from nodewalld.core.observed import Learned, Observed, wanted_chains
from nodewalld.core.position import Room, choose, rank, room
from nodewalld.core.ruletext import Rule, target_of, words_of
from nodewalld.core.steps import Command, Delete, Insert, Step, render
from nodewalld.core.tracing.traffic import TAG as TRACE_TAG
from nodewalld.core.words import Family, Table

_TAKERS_MAX = 8  # enough to know them again


@dataclass(frozen=True, slots=True)
class Change:
    """One chain in which something of ours was wrong: `subject` "was not there".

    `takers` are the foreign rules on the wrong side of a displaced one: the first few.
    """

    chain: str
    reason: Reason
    subject: str
    wrong: str
    entries: tuple[str, ...] = ()
    takers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TablePlan:
    """What to write into one table, step by step, why, and what can't be met now.

    `held` is true when something was left where it is, or untold, because an anchor vanished only a moment ago;
    `seen` says for every anchored placement ("CHAIN TAG") which of its anchors are there; `spared` names chains of
    ours that stay because foreign rules lead to them.
    """

    family: Family
    table: Table
    steps: tuple[Step, ...]
    changes: tuple[Change, ...]
    unmet: tuple[str, ...]
    in_place: int
    desired: int
    seen: Mapping[str, frozenset[str]]
    held: bool = False
    spared: frozenset[str] = frozenset()

    @property
    def commands(self) -> tuple[str, ...]:
        """The steps in iptables-restore's words."""
        return tuple(map(render, self.steps))

    @property
    def moves_only(self) -> bool:
        """Whether it concerns nothing but rules of ours in foreign chains."""
        return not any(isinstance(step, Command) for step in self.steps)

    @property
    def bereft(self) -> bool:
        """Whether chains of ours are gone, so that it makes them anew."""
        return any(c.reason is Reason.MISSING and c.chain.startswith(OWN_PREFIX) for c in self.changes)

    @property
    def deleted(self) -> frozenset[str]:
        """The chains that it deletes."""
        return frozenset(command[3:] for command in self.commands if command.startswith("-X "))

    @property
    def script(self) -> str:
        """The whole transaction for iptables-restore --noflush."""
        return "\n".join((f"*{self.table}", *self.commands, "COMMIT", ""))


def _lives_in_ours(rule: Rule) -> bool:
    """Whether this is what only a chain of ours holds, whatever its name: a foreign chain may hold nothing but ours."""
    placed = rule.tag.startswith(PLACED) or (rule.tag.startswith("rule/") and rule.returns)
    return bool(rule.tag) and not placed


def plan(
    family: Family,
    table: Table,
    desired: DesiredTable,
    observed: Observed,
    learned: Learned,
    yield_to: Sequence[str] = (),
    held: Collection[str] = (),
    pinned: Collection[str] = (),
) -> TablePlan:
    """What must change in one table.

    `held` names placements that must not be moved downwards for now, `pinned` chains that the kernel doesn't delete.
    """
    draft = _Draft(table, observed, learned, yield_to, frozenset(held), frozenset(pinned))
    chains = {chain.name: chain for chain in desired.chains}
    for chain in desired.chains:
        draft.own_chain(chain)
    for place in desired.placements:
        draft.create(place)
    by_chain: dict[str, list[Placement]] = {
        name: [] for name, rules in observed.chains.items() if any(r.tag for r in rules) and name not in chains
    }
    for place in desired.placements:
        by_chain.setdefault(place.chain, []).append(place)
    for name, places in by_chain.items():
        if not name.startswith(OWN_PREFIX):
            draft.foreign_chain(name, places)
    draft.stale(wanted_chains(table, desired))
    return draft.finished(family, desired)


def plan_moves(
    family: Family,
    table: Table,
    desired: DesiredTable,
    observed: Observed,
    learned: Learned,
    yield_to: Sequence[str],
    chains: Collection[str],
) -> TablePlan:
    """The part of a table's plan that moves rules of ours in these foreign chains, when all others stand right."""
    draft = _Draft(table, observed, learned, yield_to, frozenset(), frozenset())
    for name in chains:
        draft.foreign_chain(name, [place for place in desired.placements if place.chain == name])
    return draft.finished(family, desired)


@dataclass
class _Draft:
    """A plan in the making."""

    table: Table
    observed: Observed
    learned: Learned
    yield_to: Sequence[str]
    held: frozenset[str]
    pinned: frozenset[str]
    replaced: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    last: list[Step] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    unmet: list[str] = field(default_factory=list)
    in_place: int = 0
    seen: dict[str, frozenset[str]] = field(default_factory=dict)
    was_held: bool = False
    created: set[str] = field(default_factory=set)
    spared: frozenset[str] = frozenset()

    def finished(self, family: Family, desired: DesiredTable) -> TablePlan:
        return TablePlan(
            family,
            self.table,
            (*(Command(f":{name} - [0:0]") for name in self.replaced), *self.steps, *self.last),
            tuple(self.changes),
            tuple(self.unmet),
            self.in_place,
            desired.rules,
            self.seen,
            self.was_held,
            self.spared,
        )

    def there(self, chain: str) -> bool:
        return chain in self.table.builtin_chains or chain in self.observed.chains or chain in self.created

    def own_chain(self, chain: OwnChain) -> None:
        lines = [line for line in chain.lines if self._can_stand(line)]
        written = [line.text for line in lines]
        rules = self.observed.chains.get(chain.name)
        if rules is not None and self.learned.same(chain.name, written, [r.text for r in rules]):
            self.in_place += len(lines)
            return
        if rules is None:
            reason, wrong = Reason.MISSING, "was not there"
        elif not rules:
            reason, wrong = Reason.FLUSHED, "was empty"
        else:
            reason, wrong = Reason.CHANGED, f"held {len(rules)} rules that were not our {len(lines)}"
        self.replaced.append(chain.name)
        self.steps.extend(Command(f"-A {chain.name} {text}") for text in written)
        subject, entries = f"our chain {chain.name}", _unique(line.entry for line in lines)
        self.changes.append(Change(chain.name, reason, subject, wrong, entries))

    def _can_stand(self, line: Line) -> bool:
        if not line.needs or self.there(line.needs):
            return True
        self.unmet.append(f"{line.entry} waits: there is no chain {line.needs} in table {self.table}")
        return False

    def create(self, place: Placement) -> None:
        if place.creates and not self.there(place.creates):
            self.created.add(place.creates)
            self.steps.append(Command(f"-N {place.creates}"))
            subject = f"the chain {place.creates}"
            self.changes.append(Change(place.creates, Reason.MISSING, subject, "was not there", place.entries))

    def foreign_chain(self, name: str, places: list[Placement]) -> None:
        waiting = [p for p in places if not self.there(name) or (p.needs and not self.there(p.needs))]
        for place in waiting:
            needed = place.needs if self.there(name) else name
            self.unmet.append(f"{place.entries[0]} waits: there is no chain {needed} in table {self.table}")
        standing = [place for place in places if place not in waiting]
        if self.there(name):
            _ChainPlan(self, name, sorted(standing, key=_our_order)).write()

    def stale(self, wanted: Collection[str]) -> None:
        """Chains of ours that nothing wants, under our prefix or under a name that somebody gave them.

        One that a foreign rule leads to stays: the kernel would refuse to delete it, and with it the whole transaction.
        It is emptied when it holds rules of ours, else it only bears a name like ours.
        """
        chains = self.observed.chains
        ours = {
            name: rules
            for name, rules in chains.items()
            if name not in wanted
            and name not in self.table.builtin_chains
            and (name.startswith(OWN_PREFIX) or (rules and all(map(_lives_in_ours, rules))))
        }
        replaced = {name for name in wanted if name.startswith(OWN_PREFIX)}
        foreign = (rules for name, rules in chains.items() if name not in ours and name not in replaced)
        led_to = {rule.target for rules in foreign for rule in rules if not rule.tag}
        self.spared = frozenset((led_to | self.pinned) & ours.keys())
        names = [n for n, rules in ours.items() if n not in self.spared or any(rule.tag for rule in rules)]
        self.last.extend(Command(f"-F {name}") for name in names)
        self.last.extend(Command(f"-X {name}") for name in names if name not in self.spared)
        self.changes.extend(
            Change(name, Reason.CHANGED, f"the chain {name}", "was left over from us") for name in names
        )


class _ChainPlan:
    """The plan for one foreign chain: which of its rules are ours, where they stand, where they should."""

    def __init__(self, draft: _Draft, name: str, places: list[Placement]) -> None:
        self.draft, self.name, self.places = draft, name, places
        self.rules = draft.observed.chains.get(name, ())
        self.copies: list[list[int]] = [[] for _ in places]
        self.surplus: list[int] = []
        self.foreign: list[Rule] = []
        self.standing: list[int] = []  # where the foreign rules stand
        self.traces: list[int] = []  # rules of `nodewallctl trace`, which go by themselves and count for nobody
        self.slots: list[int] = []
        for index, rule in enumerate(self.rules):
            self.slots.append(len(self.foreign))
            found = next((i for i, place in enumerate(places) if self._is(place, rule)), None)
            if found is not None:
                self.copies[found].append(index)
            elif rule.tag.startswith(TRACE_TAG):
                self.traces.append(index)
            elif rule.tag:
                self.surplus.append(index)
            else:
                self.foreign.append(rule)
                self.standing.append(index)

    @staticmethod
    def _is(place: Placement, rule: Rule) -> bool:
        return rule.tag == place.tag if place.tag else rule.words == words_of(place.text)

    def _as_written(self, place: Placement, rule: Rule) -> bool:
        return self.draft.learned.same(f"{self.name} {place.tag}", [place.text], [rule.text])

    def write(self) -> None:
        rooms = [room(p.position, self.foreign, self.draft.yield_to, applies=_applies(p)) for p in self.places]
        self._tell(rooms)
        standing = [self.slots[found[0]] if found else None for found in self.copies]
        anchored = [place.position.place is Place.BETWEEN for place in self.places]
        targets = choose(rooms, standing, anchored)
        for i, place in enumerate(self.places):
            now = standing[i]
            if now is not None and f"{self.name} {place.tag}" in self.draft.held and targets[i] > now:
                targets[i], self.draft.was_held = now, True
        wrong = self._wrong(standing, targets)
        self._steps(targets, wrong)

    def _tell(self, rooms: Sequence[Room]) -> None:
        for place, space in zip(self.places, rooms, strict=True):
            if place.position.place is Place.BETWEEN:
                self.draft.seen[f"{self.name} {place.tag}"] = space.seen
            if space.unmet and f"{self.name} {place.tag}" in self.draft.held:
                self.draft.was_held = True  # an anchor that is back in a moment is no news
            elif space.unmet:
                self.draft.unmet.append(f"{place.entries[0]} in {self.draft.table} {self.name}: {space.unmet}")

    def _wrong(self, standing: Sequence[int | None], targets: Sequence[int]) -> dict[int, Change]:
        """The placements to be put in anew, each with what was wrong."""
        wrong: dict[int, Change] = {}

        def note(i: int, reason: Reason, what: str, between: Sequence[Rule] = ()) -> None:
            place = self.places[i]
            target = target_of(place.text)
            jumps = not place.tag or target.startswith(OWN_PREFIX)
            subject = f"the jump to {target}" if jumps else f"our rule {place.tag}"
            takers = tuple(rule.text for rule in between[:_TAKERS_MAX])
            wrong[i] = Change(self.name, reason, subject, what, place.entries, takers)

        highest = (-1, -1)
        for i in sorted(range(len(self.places)), key=lambda i: self.copies[i][:1] or [len(self.rules)]):
            found, place = self.copies[i], self.places[i]
            if not found:
                gone = not self.rules and self.name in self.draft.table.builtin_chains
                note(i, Reason.FLUSHED if gone else Reason.MISSING, "was not there")
            elif not self._as_written(place, self.rules[found[0]]):
                note(i, Reason.CHANGED, "was not as written")
            elif (now := standing[i]) is not None and now != targets[i]:
                between = self.foreign[min(now, targets[i]) : max(now, targets[i])]
                note(i, Reason.DISPLACED, f"stood below {_foreign(now)} instead of {targets[i]}", between)
            elif len(found) > 1:
                note(i, Reason.CHANGED, f"stood there {len(found)} times")
            elif (targets[i], i) < highest:
                note(i, Reason.DISPLACED, "stood in the wrong order among ours")
            else:
                highest = (targets[i], i)
                self.draft.in_place += 1
        return wrong

    def _steps(self, targets: Sequence[int], wrong: Mapping[int, Change]) -> None:
        draft, name = self.draft, self.name
        for index in self.surplus:
            rule = self.rules[index]
            draft.steps.append(Delete(name, index, rule.text))
            draft.changes.append(Change(name, Reason.CHANGED, f"our rule {rule.tag}", "was left over from us"))
        for i in wrong:
            draft.steps.extend(Delete(name, index, self._delete_text(i, index)) for index in self.copies[i])
        ours = sorted(range(len(self.places)), key=lambda i: (targets[i], i))
        for above, i in enumerate(ours):
            if i not in wrong:
                continue
            staying = (self.copies[j][0] for j in ours[above + 1 :] if j not in wrong and targets[j] == targets[i])
            below = next(staying, next(iter(self.standing[targets[i] :]), None))
            traces = sum(below is None or index < below for index in self.traces)
            at_end = below is None and targets[i]
            number = None if at_end else targets[i] + above + traces + 1
            draft.steps.append(Insert(name, self.places[i].text, number, below))
            draft.changes.append(wrong[i])

    def _delete_text(self, i: int, index: int) -> str:
        """What deletes this copy: the text that wrote it where it still is what was written, else what is read."""
        place, rule = self.places[i], self.rules[index]
        return place.text if self._as_written(place, rule) else rule.text


def _foreign(count: int) -> str:
    return f"{count} foreign {'rule' if count == 1 else 'rules'}"


def _our_order(place: Placement) -> tuple[int, tuple[int, int]]:
    return rank(place.position), place.order


def _applies(place: Placement) -> bool:
    return place.position.place is not Place.BETWEEN or bool(place.position.after or place.position.before)


def _unique(entries: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(entries))
