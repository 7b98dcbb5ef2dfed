"""Keeps the rules of one family in one backend: look, plan, commit, look again.

Laws: what is in force is what a second observation finds no fault with. Each table is settled by itself, so one that
can't be written harms no other. Nothing is remembered of the kernel but the fingerprint of the last sound look, and how
its tool prints what we wrote.
"""

import errno
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from nodewalld.core.desired import OWN_PREFIX, Desired, DesiredTable
from nodewalld.core.events import Count, Reason
from nodewalld.core.observed import Learned, Observed, read_back, shallow_chains, stray_targets, targets, wanted_chains
from nodewalld.core.pacing import Pacer, taken
from nodewalld.core.plan import Change, TablePlan, plan, plan_moves
from nodewalld.core.ruletext import target_of
from nodewalld.core.words import Family, Table
from nodewalld.kernel.firewall import NOWHERE, Fingerprint, Firewall, FirewallError
from nodewalld.kernel.nftbatch import Stale

ORDER = (Table.SECURITY, Table.FILTER, Table.NAT, Table.RAW, Table.MANGLE)
"""The order in which tables are written: what catches (backstops, rejects) before what marks."""

ANCHOR_PATIENCE = 1.0
"""Seconds for which a vanished anchor moves nothing downwards: its owner may be about to put it back."""

_MOVES_MAX = 64  # plans remembered by table; what an eager neighbour brings beyond that is planned each time
_ATTEMPTS = 4
_STALE_ATTEMPTS = 8  # then the tool writes, which makes up with whoever is quicker by itself
_RESTLESS_PAUSE = 0.1  # seconds until another try, should no event come
_FLEETING = 3.0  # seconds for which others' haste is no news
_CLEAN_ATTEMPTS = 3  # then what is read is believed, though others were writing all the time


@dataclass(frozen=True, slots=True)
class Settled:
    """How one table ended: what was wrong, when it was right again (monotonic seconds), how often we wrote.

    `since` is when it was first seen to be wrong, or could not be seen: an earlier try may have
    failed, or been put off. `struck`: a strike has put all of it right, and `since` is when that was told to.
    `restless`: others wrote as fast as we did, so it was right after each of our commits, but not at our last look.
    """

    table: Table
    changes: tuple[Change, ...]
    done: float
    commits: int
    since: float
    struck: bool = False
    restless: bool = False


_UNSEEN: Fingerprint = object()
"""Stands for a look that is still to be taken; that of a table that doesn't exist is None."""


@dataclass(frozen=True, slots=True)
class _Strike:
    """A repair that was made before the table was looked at as a whole, and is told of when it has been."""

    changes: tuple[Change, ...]
    since: float
    done: float
    stamp: int


@dataclass
class _TableState:
    fingerprint: Fingerprint = _UNSEEN
    sound: Observed | None = None
    strike: _Strike | None = None
    moves: dict[Hashable, TablePlan] = field(default_factory=dict)
    plan: TablePlan | None = None
    error: str = ""
    busy: bool = False
    fleeting: bool = False
    failing_since: float = 0.0
    wrong_since: float | None = None
    vanished: dict[str, float] = field(default_factory=dict)
    withheld: dict[str, float] = field(default_factory=dict)
    pinned: frozenset[str] = frozenset()


class Guard:
    """One family's rules. `learned` is shared with the state folder through `prints`.

    `meanwhile` is called in the midst of work that takes its time, and may `strike`.
    """

    def __init__(
        self,
        firewall: Firewall,
        prints: Mapping[Table, Learned] | None = None,
        clock: Callable[[], float] = time.monotonic,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> None:
        self.firewall = firewall
        self._meanwhile = meanwhile
        self.family: Family = firewall.family
        self._desired = Desired(self.family, {}, (), ())
        self.chains: dict[Table, frozenset[str]] = {}
        """The chains that concern us, ours and others', by table."""
        self._targets: dict[Table, frozenset[str]] = {}
        self._shallow: dict[Table, dict[str, frozenset[str]]] = {}
        self.learned: dict[Table, Learned] = dict(prints or {})
        self.own_pids: set[int] = set()
        self.made: set[tuple[Table, str]] = set()
        self.pacer = Pacer()
        self._clock = clock
        self._tables: dict[Table, _TableState] = {table: _TableState() for table in Table}

    @property
    def desired(self) -> Desired:
        """What should stand."""
        return self._desired

    @desired.setter
    def desired(self, desired: Desired) -> None:
        """What is wanted anew counts as never looked at, until it has been settled."""
        for table, state in self._tables.items():
            state.moves.clear()
            same = self._desired.tables.get(table) == desired.tables.get(table)
            if not same or self._desired.yield_to != desired.yield_to:
                state.fingerprint, state.sound = _UNSEEN, None
                self.pacer.forget(table)
        self._desired = desired
        self.chains = {table: wanted_chains(table, wanted) for table, wanted in desired.tables.items()}
        self._shallow = {table: shallow_chains(wanted) for table, wanted in desired.tables.items()}
        self._targets = {table: targets(wanted) for table, wanted in desired.tables.items()}
        self.doubt()

    def doubt(self) -> None:
        """Believe nothing of what was read before."""
        self.firewall.attend(self.chains)

    def concerned(self) -> tuple[Table, ...]:
        """Tables in which something of ours is wanted, was written, or stands."""
        return tuple(t for t in ORDER if t in self.desired.tables or self._written_chains(t) or self.leftovers(t))

    def drifted(self, where: frozenset[tuple[Family, Table]] | None = None) -> Iterator[Table]:
        """Tables that have changed since they were found right, as they are found; starts no process.

        With `where` only there is anything new; what was not found right at the last look is named all the same.
        """
        for table in self._used():
            found = self._tables[table].fingerprint
            news = where is None or (self.family, table) in where or found is _UNSEEN
            if news and found != self._fingerprint(table):
                yield table

    def suspects(self) -> tuple[Table, ...]:
        """Tables to try again: the last try failed, an anchor was waited for, or a move was put off."""
        return tuple(t for t in self._used() if self._tables[t].error or self._tables[t].withheld or self._is_held(t))

    @property
    def due(self) -> float:
        """When (monotonic) what was put off should be looked at again, or a contention is over; else infinity."""
        now = self._clock()
        times = [self.pacer.over(now)]
        for table in self._used():
            state = self._tables[table]
            if self._is_held(table):
                times += [since + ANCHOR_PATIENCE for since in state.vanished.values()]
            times += state.withheld.values()
            if state.fleeting:
                times.append(now + _RESTLESS_PAUSE)
        return min(times)

    def _is_held(self, table: Table) -> bool:
        planned = self._tables[table].plan
        return planned is not None and planned.held

    def _used(self) -> Iterable[Table]:
        return (table for table in ORDER if table in self.desired.tables)

    def _fingerprint(self, table: Table) -> Fingerprint:
        try:
            return self.firewall.fingerprint(table, self.chains[table])
        except OSError as error:
            return f"unreadable: {error}"

    def settle(self, table: Table, *, everything: bool = False, linger: Callable[[], None] = lambda: None) -> Settled:
        """Bring one table to what is desired; `everything` looks wherever something of ours may be left over.

        `linger` is called once, and the table looked at again, before chains of ours are made anew.
        Raises FirewallError when the kernel or its tools refuse; the table is then as it was.
        """
        state = self._tables[table]
        try:
            with self.firewall.exclusive():
                settled = self._settle(table, state, everything=everything, linger=linger)
            state.strike = None
        except OSError as error:
            restless = error.errno == errno.EINTR  # the ruleset changed during every read
            failure = FirewallError(str(error), busy=restless, fleeting=restless)
            self._failed(table, failure)
            raise failure from error
        except FirewallError as error:
            self._failed(table, error)
            raise
        if settled.restless:
            words = f"others write to table {table} faster than it can be settled"
            self._failed(table, FirewallError(words, busy=True, fleeting=True))
        else:
            state.error, state.busy, state.fleeting = "", False, False
        return settled

    def _failed(self, table: Table, error: FirewallError) -> None:
        """Remember why; the table is tried again when it changes, and when `suspects` are."""
        state = self._tables[table]
        if not state.error:
            state.failing_since = self._clock()
        state.wrong_since = self._clock() if state.wrong_since is None else state.wrong_since
        state.error, state.busy, state.fleeting, state.sound = str(error), error.busy, error.fleeting, None
        look_again = error.fleeting or table not in self.desired.tables
        state.fingerprint = _UNSEEN if look_again else self._fingerprint(table)

    def strike(self, table: Table, chains: Collection[str], generation: int, noticed: float) -> None:
        """Put back at once what the transaction of this generation displaced in these chains, the only ones it touched.

        `noticed` is the earliest that this can have been (monotonic seconds).
        The plan is the one that `settle` would make, of a table that was right before, and the commit names the
        generation. Where anything is out of the ordinary nothing is done: `settle` must be called in any case, which
        looks at everything and tells of this, too.
        """
        state, desired = self._tables[table], self.desired.tables.get(table)
        if state.sound is None or state.strike or desired is None or not self._shallow[table].keys() >= set(chains):
            return
        found = self.firewall.glance(table, chains, self._shallow[table])
        if found is None:
            return
        observed = Observed({**state.sound.chains, **found.chains}, found.handles)
        learned = self.learned.get(table, Learned())
        # Who disturbs has done so before, as a rule: then what to do is known.
        seen = frozenset(observed.chains), *((name, *[rule.text for rule in found.chains[name]]) for name in chains)
        planned = state.moves.get(seen) or plan_moves(
            self.family, table, desired, observed, learned, self.desired.yield_to, chains
        )
        if not planned.steps or planned.unmet or self._put_off(planned, observed):
            return
        try:
            self.own_pids.add(self.firewall.apply(planned, observed, generation))
        except (Stale, FirewallError):
            return
        state.strike = _Strike(planned.changes, noticed, self._moved(planned, observed), generation + 1)
        if len(state.moves) < _MOVES_MAX:
            state.moves[seen] = planned

    def preview(self, table: Table) -> tuple[TablePlan, Observed]:
        """What `settle` would do to a table, without doing it, and what it is planned from, foreign rules in full."""
        desired = self.desired.tables.get(table, DesiredTable())
        with self.firewall.exclusive():
            observed = self._observe(table, self._everywhere(table, desired), in_full=True)
        state = _TableState()
        planned = self._plan(table, desired, observed, state)
        state.pinned = self._led_to(table, planned.deleted)
        return self._plan(table, desired, observed, state) if state.pinned else planned, observed

    def _led_to(self, table: Table, names: frozenset[str]) -> frozenset[str]:
        """Those of these chains of ours to which a foreign rule leads, wherever it stands."""
        if not names:
            return names
        chains = self.firewall.observe_all(table).chains
        foreign = (rules for name, rules in chains.items() if not name.startswith(OWN_PREFIX))
        return names & {rule.target for rules in foreign for rule in rules if not rule.tag}

    def _everywhere(self, table: Table, desired: DesiredTable) -> frozenset[str]:
        own = self.firewall.own_chains(table)
        return wanted_chains(table, desired) | {*table.builtin_chains, *self._written_chains(table), *own}

    def _settle(self, table: Table, state: _TableState, *, everything: bool, linger: Callable[[], None]) -> Settled:
        desired = self.desired.tables.get(table, DesiredTable())
        names = self._everywhere(table, desired) if everything else wanted_chains(table, desired)
        changes: list[Change] = []
        done, commits, stale, clean, stamp, lingered = self._clock(), 0, 0, False, 0, False
        if struck := state.strike:
            changes, done, commits, clean, stamp = [*struck.changes], struck.done, 1, True, struck.stamp
        state.pinned = frozenset() if everything else state.pinned
        state.sound = None
        while commits < _ATTEMPTS:
            fingerprint = self._fingerprint(table) if table in self.desired.tables else _UNSEEN
            before = self.firewall.stamp()
            observed = self._observe(table, names)
            untouched = clean and before == self.firewall.stamp() == stamp
            if commits and (untouched or commits >= _CLEAN_ATTEMPTS):
                self._learn(table, desired, observed)
            planned = self._plan(table, desired, observed, state)
            state.withheld = {} if everything else self._put_off(planned, observed)
            if planned.commands and state.wrong_since is None:
                state.wrong_since = self._clock()
            since = state.wrong_since or (struck.since if struck else done)
            if not planned.commands or state.withheld:
                state.fingerprint, state.plan = fingerprint, planned
                state.sound = None if planned.unmet or planned.held or state.withheld else observed
                state.wrong_since = since if state.withheld else None
                return Settled(table, tuple(changes), done, commits, since, struck=struck is not None and commits == 1)
            if planned.bereft and not lingered:
                lingered = True
                linger()
                continue
            changes.extend(c for c in planned.changes if c not in changes)
            try:
                writer = self.firewall.apply(planned, observed, before if stale < _STALE_ATTEMPTS else 0)
            except Stale:
                stale += 1
                continue
            except FirewallError:
                pinned = self._led_to(table, planned.deleted)
                overtaken = stale < _STALE_ATTEMPTS and before != self.firewall.stamp()
                if not pinned and not overtaken:
                    raise
                state.pinned, stale = state.pinned | pinned, stale + overtaken
                continue
            self.own_pids.add(writer)
            self.made |= {(table, command[3:]) for command in planned.commands if command.startswith("-N ")}
            stamp = self.firewall.stamp()
            clean = stamp == 0 or stamp == before + 1
            done, commits = self._clock() if everything else self._moved(planned, observed), commits + 1
            if not planned.moves_only:
                self._meanwhile()  # a program has run
                names |= self.firewall.own_chains(table)  # who replaced chains of ours may have left others behind
        state.fingerprint = _UNSEEN
        return Settled(table, tuple(changes), done, commits, since, restless=True)

    def _moved(self, planned: TablePlan, observed: Observed) -> float:
        """Remember who has been answered by a commit; when that was."""
        done = self._clock()
        for chain, takers in taken(planned.changes).items():
            self.pacer.moved((planned.table, chain), observed.chains.get(chain, ()), takers, done)
        return done

    def wrote(self, table: Table, chains: Iterable[str]) -> None:
        """Take it that something of ours may stand in these chains."""
        known = self.learned.get(table, Learned()).prints
        self.learned[table] = Learned({**known, **{f"{name} ": ("", ()) for name in chains}})
        self._tables[table].moves.clear()

    def _written_chains(self, table: Table) -> frozenset[str]:
        """The chains that we are known to have written to."""
        return frozenset(key.split(" ")[0] for key in self.learned.get(table, Learned()).prints)

    def _put_off(self, planned: TablePlan, observed: Observed) -> dict[str, float]:
        """The contended chains for whose sake a plan that only moves waits, and until when (monotonic)."""
        now, table, places = self._clock(), planned.table, taken(planned.changes)
        waits = {
            chain: self.pacer.look((table, chain), observed.chains.get(chain, ()), places.get(chain), now)
            for chain in self.pacer.watched(table)
        }
        only_moves = all(change.reason is Reason.DISPLACED for change in planned.changes)
        waiting = {chain: now + wait for chain, wait in waits.items() if wait}
        return waiting if only_moves and waiting.keys() >= places.keys() else {}

    def _observe(self, table: Table, names: frozenset[str], *, in_full: bool = False) -> Observed:
        shallow = NOWHERE if in_full else self._shallow.get(table, NOWHERE)
        observed = self.firewall.observe(table, names, shallow)
        strays = stray_targets(observed, self._targets.get(table, frozenset()))
        return self.firewall.observe(table, names | strays, shallow) if strays else observed

    def _learn(self, table: Table, desired: DesiredTable, observed: Observed) -> None:
        learned = Learned(dict(read_back(table, desired, observed)))
        if learned != self.learned.get(table):
            self.learned[table] = learned
            self._tables[table].moves.clear()

    def _plan(self, table: Table, desired: DesiredTable, observed: Observed, state: _TableState) -> TablePlan:
        learned, yield_to = self.learned.get(table, Learned()), self.desired.yield_to
        planned = plan(self.family, table, desired, observed, learned, yield_to, pinned=state.pinned)
        now = self._clock()
        before = state.plan.seen if state.plan else {}
        for key, seen in planned.seen.items():
            if before.get(key, frozenset()) - seen:
                state.vanished.setdefault(key, now)
            elif seen >= before.get(key, frozenset()):
                state.vanished.pop(key, None)
        held = {key for key, since in state.vanished.items() if now - since < ANCHOR_PATIENCE}
        return plan(self.family, table, desired, observed, learned, yield_to, held, state.pinned) if held else planned

    @property
    def unmet(self) -> tuple[str, ...]:
        """What can't be met for now, in sentences without the family."""
        states = [(table, self._tables[table]) for table in self._used()]
        waits = (reason for _, s in states if s.plan for reason in s.plan.unmet)
        put_off = (
            f"{contest.table} {contest.chain}: our jump is displaced again and again; putting it back has slowed down"
            for contest in self.pacer.contests(self._clock())
            if contest.slowed
        )
        return (*self.desired.reasons, *waits, *put_off)

    @property
    def errors(self) -> tuple[tuple[Table, str], ...]:
        """Tables that could not be settled, and why; what is over in a moment is told when it isn't."""
        now, states = self._clock(), ((t, self._tables[t]) for t in self._used())
        return tuple(
            (t, s.error) for t, s in states if s.error and (not s.fleeting or now - s.failing_since > _FLEETING)
        )

    @property
    def failing(self) -> frozenset[Table]:
        """All tables that could not be settled."""
        return frozenset(table for table in self._used() if self._tables[table].error)

    @property
    def busy(self) -> bool:
        """Whether a table could not be settled only because others were writing."""
        return any(self._tables[table].busy for table in self.failing)

    def broken(self) -> frozenset[Table]:
        """Tables that failed before anything new was asked of them: all, where not a single one works."""
        failed = self.failing
        return frozenset(Table if failed and failed == set(self._used()) else failed)

    @property
    def in_place(self) -> int:
        """Rules that stood right when their table was last found right."""
        states = (self._tables[table] for table in self._used())
        return sum(s.plan.in_place for s in states if s.plan and not s.error)

    def counts(self) -> Iterator[Count]:
        """What our rules have seen, without those that only lead on or back, and without chains that are not whole."""
        for table in self._used():
            chains = self.desired.tables[table].chains
            found = self.firewall.tallies(table, [chain.name for chain in chains])
            for chain in chains:
                if len(found[chain.name]) != len(chain.lines):
                    continue
                for line, seen in zip(chain.lines, found[chain.name], strict=True):
                    target = target_of(line.text)
                    if target != "RETURN" and not target.startswith(OWN_PREFIX):
                        yield Count(self.family, table, chain.name, line.entry, target, *seen)

    def own_chains(self, table: Table) -> frozenset[str]:
        """Our chains by the names of the desired ones; what else bears the prefix is left over."""
        return frozenset(chain.name for chain in self.desired.tables.get(table, DesiredTable()).chains)

    def leftovers(self, table: Table) -> bool:
        """Whether chains of ours stand in a table that nothing wants there; not those that have been spared."""
        last = self._tables[table].plan
        spared = last.spared if last else frozenset()
        try:
            return bool(self.firewall.own_chains(table) - self.own_chains(table) - spared)
        except OSError:
            return False
