"""Makes the kernel hold what a configuration decides, and tells what it found: the only maker of repairs.

Laws:
1. Sets before the rules that need them, rules away before the sets they needed.
2. A reload changes every table or none: what was committed when a table is refused is put back and looked at again.
3. The families, and in a repair the tables, succeed and fail apart.
4. Everything that is told (events, reasons, counts) comes from what the guards saw.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from nodewalld.core.blame import Wake, contention, subjects, suspects
from nodewalld.core.config import Config
from nodewalld.core.decide import Decisions, decide
from nodewalld.core.desired import Desired, merge
from nodewalld.core.environment import Environment
from nodewalld.core.events import Contention, Count, Event, Kind
from nodewalld.core.iptables.render import render
from nodewalld.core.plan import Change
from nodewalld.core.words import Backend, Family, Table
from nodewalld.cutter import FlowCutter
from nodewalld.guard import ORDER, Guard, Settled
from nodewalld.keeper import SetKeeper
from nodewalld.kernel import backends
from nodewalld.kernel.culprit import LINGER, outlast
from nodewalld.kernel.firewall import FirewallError, open_firewall, require_tools
from nodewalld.kernel.process import ProgramError
from nodewalld.kernel.sets import SetError
from nodewalld.memory import Memory
from nodewalld.removal import remove_rules
from nodewalld.service.state import StateFolder


class Refused(Exception):
    """A configuration that the kernel doesn't take; the old rules stand. Each problem is a sentence."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems))


@dataclass
class _World:
    """What is enforced now: one guard and its decisions for each family."""

    backend: Backend
    guards: dict[Family, Guard]
    decisions: dict[Family, Decisions] = field(default_factory=dict)

    @property
    def sets(self) -> frozenset[str]:
        """The names of the kernel sets that are needed."""
        return frozenset(entry.name for guard in self.guards.values() for entry in guard.desired.sets)


class Reconciler:
    """See the module. For one thread; `record` takes every event."""

    def __init__(
        self,
        *,
        environment: Callable[[], Environment],
        state: StateFolder,
        runtime_dir: Path,
        record: Callable[[Event], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.environment = environment
        self._firewall = partial(open_firewall, runtime_dir=runtime_dir)
        self._record = record
        self._clock = clock
        self._world: _World | None = None
        self._opened: _World | None = None  # the last one; on the way to it, that is not the one in force yet
        self._env = Environment()
        self._sound = clock()
        self._memory = Memory(state)
        self._keeper = SetKeeper(self._memory, clock)
        self._cutter = FlowCutter()
        self.overhear: Callable[[], Wake] = lambda: Wake(clock(), exact=False)
        """What tells, in the midst of a pass, of what has just been heard."""
        self.flows_cut = 0
        self.config: Config | None = None

    # What there is to tell

    @property
    def _guards(self) -> Mapping[Family, Guard]:
        return self._world.guards if self._world else {}

    @property
    def backend(self) -> Backend | None:
        """The backend that holds the rules; None while none are held."""
        return self._world.backend if self._world else None

    @property
    def desired(self) -> int:
        """How many rules there should be."""
        return sum(guard.desired.rules for guard in self._guards.values())

    @property
    def in_place(self) -> int:
        """How many of them stood right at the last look."""
        return sum(guard.in_place for guard in self._guards.values())

    @property
    def places(self) -> dict[tuple[Family, str], frozenset[str]]:
        """The chains of nf_tables that concern us, by family and table."""
        if self.backend is not Backend.NFT:
            return {}
        return {(f, table.value): names for f, guard in self._guards.items() for table, names in guard.chains.items()}

    def take_own_ports(self) -> frozenset[int]:
        """Process ids (netlink port ids) of our own writers since the last call; later they may be another's."""
        ports: set[int] = set()
        for world in (self._world, self._opened):
            for guard in world.guards.values() if world else ():
                ports |= guard.own_pids
                guard.own_pids.clear()
        return frozenset(ports)

    def family_reasons(self, family: Family) -> tuple[str, ...]:
        """Why the rules of a family are not all in force as meant."""
        guard = self._guards.get(family)
        if guard is None:
            return ()
        errors = (f"{table}: {error}" for table, error in guard.errors)
        return tuple(f"{family}: {text}" for text in dict.fromkeys((*errors, *guard.unmet)))

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why not everything is in force as meant; empty when it is."""
        cutting = (self._cutter.error,) if self._cutter.error else ()
        return (
            *self._keeper.reasons,
            *cutting,
            *(r for family in self._guards for r in self.family_reasons(family)),
        )

    def counts(self) -> tuple[Count, ...]:
        """What our rules have seen; starts no process."""
        return tuple(count for guard in self._guards.values() for count in guard.counts())

    def set_sizes(self) -> dict[str, int]:
        """How many entries each kernel set should hold."""
        return {s.name: len(s.networks) for guard in self._guards.values() for s in guard.desired.sets}

    def contention(self) -> tuple[Contention, ...]:
        """Who takes a place of ours back again and again, and what would end it."""
        now = self._clock()
        return tuple(
            contention(family, contest, guard.desired.yield_to, now - contest.since)
            for family, guard in self._guards.items()
            for contest in guard.pacer.contests(now)
        )

    @property
    def in_force(self) -> bool:
        """Whether every rule that can be written stands right."""
        return (
            self._world is not None
            and not self._keeper.errors
            and not any(guard.failing for guard in self._world.guards.values())
        )

    @property
    def blocked(self) -> bool:
        """Whether something failed only because others were writing."""
        return any(guard.busy for guard in self._guards.values())

    @property
    def due(self) -> float:
        """When (monotonic) another look is due without any event, because something was put off; else infinity."""
        return min((guard.due for guard in self._guards.values()), default=float("inf"))

    # Enforcing a configuration

    def enforce(self, config: Config, *, strict: bool = True) -> bool:
        """Bring a configuration into force; returns whether the kernel had to be changed, `flows_cut` tells of flows.

        All or nothing: raises Refused and leaves what was in force. Not `strict` (at the start, when there is nothing
        to go back to) each table is brought as far as it goes, and `reasons` tell the rest.
        """
        self._env = self.environment()
        wanted = backends.choose(config.daemon.backend, self._memory.backend)
        require_tools(config.daemon.families, wanted)
        world = self._world
        if world is None or world.backend is not wanted or set(world.guards) != set(config.daemon.families):
            world = self._open(wanted, config.daemon.families, world)
        decisions = {family: decide(config, family, self._env) for family in world.guards}
        changed = self._move(world, decisions, strict=strict)
        old, self._world, self.config = self._world, world, config
        if old is not None and old is not world:
            self._leave(old, world)
        self._keeper.drop_all_but(world.sets)
        self._memory.backend = world.backend
        self.flows_cut = self._cutter.cut(world.decisions)
        return changed

    def refill(self, config: Config, *, strict: bool) -> int:
        """Bring other contents of the sets into force, in a configuration that is the same otherwise; touch no rule.

        Returns how many flows were cut. Strict: raises Refused and leaves what was.
        """
        if (world := self._world) is None:
            return 0
        decisions = {family: decide(config, family, self._env) for family in world.guards}
        old = {family: guard.desired for family, guard in world.guards.items()}
        new = {family: replace(old[family], sets=render(decided).sets) for family, decided in decisions.items()}
        try:
            self._keeper.refill(old.values(), new.values(), strict=strict)
        except (SetError, ProgramError, OSError) as error:
            raise Refused([str(error)]) from error
        for family, guard in world.guards.items():
            guard.desired = new[family]
        world.decisions, self.config = decisions, config
        return self._cutter.cut(decisions)

    def _open(self, backend: Backend, families: Iterable[Family], old: _World | None) -> _World:
        prints = self._memory.prints(backend)
        guards = {}
        for family in families:
            kept = old.guards.get(family) if old and old.backend is backend else None
            guards[family] = kept or Guard(
                self._firewall(family, backend), prints.get(family), self._clock, self._meanwhile
            )
        self._opened = _World(backend, guards)
        return self._opened

    def _move(self, world: _World, decisions: Mapping[Family, Decisions], *, strict: bool) -> bool:
        """From what a world holds to what is decided, by way of both together."""
        new = {family: render(d) for family, d in decisions.items()}
        old = {family: guard.desired for family, guard in world.guards.items()}
        old_decisions = world.decisions
        both = {family: merge(old[family], new[family]) for family in new}
        commits = 0
        try:
            self._keeper.sync([entry for desired in both.values() for entry in desired.sets], strict=strict)
            for phase in (both, new) if both != new else (new,):
                commits += self._settle_all(world, phase, strict=strict)
        except (FirewallError, SetError, ProgramError, OSError) as error:
            self._settle_all(world, old, strict=False)
            self._keeper.sync([e for desired in old.values() for e in desired.sets], strict=False)
            self._keeper.drop_all_but(world.sets | (self._world.sets if self._world else frozenset()))
            world.decisions = old_decisions
            raise Refused([str(error)]) from error
        world.decisions = dict(decisions)
        self._remember(world)
        return bool(commits)

    def _settle_all(self, world: _World, phase: Mapping[Family, Desired], *, strict: bool) -> int:
        """Settle every table that is concerned; returns the number of commits.

        Stops at the first that others keep busy: the next would wait as long again for the same lock.
        """
        work: list[tuple[Guard, Table, bool]] = []
        for family, desired in phase.items():
            guard = world.guards[family]
            before, broken = guard.concerned(), guard.broken()
            guard.desired = desired
            wanted = (table for table in ORDER if table in before or table in desired.tables)
            work += [(guard, table, table in broken) for table in wanted]
        commits = 0
        for guard, table, was_broken in work:
            try:
                commits += guard.settle(table, everything=True).commits
            except FirewallError as error:
                if strict and not was_broken:
                    raise
                if error.busy:
                    break
        return commits

    def _remember(self, world: _World) -> None:
        self._memory.keep_prints(world.backend, {family: guard.learned for family, guard in world.guards.items()})
        made = [(world.backend, family, *made) for family, guard in world.guards.items() for made in guard.made]
        self._memory.keep_made(made)

    def _leave(self, old: _World, new: _World) -> None:
        """Take our rules out of guards that are no longer used (another backend, a family given up)."""
        for family, guard in old.guards.items():
            if new.guards.get(family) is not guard:
                self._settle_all(
                    _World(old.backend, {family: guard}), {family: Desired(family, {}, (), ())}, strict=False
                )
                guard.firewall.close()

    # Noticing

    def wake(self, wake: Wake, *, retry: bool = False) -> tuple[Event, ...]:
        """Look at everything of ours that may have changed and put it right; returns the repairs.

        With `retry` also at what failed, or was put off, before.
        """
        if self._world is None:
            return ()
        repairs: list[Event] = []
        started = self._clock()
        for guard in self._world.guards.values():
            tried: set[Table] = set()
            for table in itertools.chain(guard.drifted(wake.where), guard.suspects() if retry else ()):
                if table in tried:
                    continue
                tried.add(table)
                wake.who()  # at once: who has written ends soon, and with it what /proc tells of its parents
                try:
                    settled = guard.settle(table, linger=lambda: outlast(wake.who(), started + LINGER))
                except FirewallError as error:
                    if error.busy:
                        break
                    continue
                repairs.extend(self._tell(guard, settled, wake))
        if repairs:
            repairs = self._with_flows(self._world, repairs)
            self._remember(self._world)
        if not any(guard.failing for guard in self._world.guards.values()):
            self._sound = started
        for event in repairs:
            self._record(event)
        return tuple(repairs)

    def strike(self, wake: Wake) -> None:
        """What one message can put right is put right, before anything else is asked; `wake` looks again, and tells."""
        touched: dict[tuple[Family, Table], list[str]] = {}
        for family, table, chain in wake.touched:
            touched.setdefault((family, table), []).append(chain)
        for (family, table), chains in touched.items():
            if guard := self._guards.get(family):
                guard.strike(table, chains, wake.generation, wake.noticed)
        if touched:
            wake.who()  # at once: who has written ends soon, and with it what /proc tells of its parents

    def _meanwhile(self) -> None:
        """A pass may take a tenth of a second: what can be put right by one message does not wait for its end."""
        self.strike(self.overhear())

    def resync(self) -> tuple[Event, ...]:
        """The full check: sets, leftovers of ours, and everything that `wake` looks at."""
        if self._world is None or self.config is None:
            return ()
        if self.config.daemon.backend is None:
            shown = backends.evidence()
            if shown and shown[0] is not self._world.backend:
                self._follow(self.config, *shown)
        wanted = [entry for guard in self._world.guards.values() for entry in guard.desired.sets]
        repairs = list(self._keeper.sync(wanted, strict=False))
        wake = Wake(self._sound, exact=False)
        for guard in self._world.guards.values():
            guard.doubt()
            for table in ORDER:
                if guard.leftovers(table):
                    repairs.extend(self._settle_quietly(guard, table, wake))
        for event in repairs:
            self._record(event)
        return (*repairs, *self.wake(wake, retry=True))

    def _follow(self, config: Config, backend: Backend, chain: str) -> None:
        """Move to the backend that the neighbours use now."""
        what = f"the chain {chain} shows that this node uses {backend}: "
        try:
            self.enforce(config)
        except Refused as error:
            self._record(Event(time=datetime.now(UTC), kind=Kind.DEGRADED, what=f"{what}{error}"))
        else:
            self._record(Event(time=datetime.now(UTC), kind=Kind.RELOAD, what=f"{what}our rules moved there"))

    def _settle_quietly(self, guard: Guard, table: Table, wake: Wake) -> tuple[Event, ...]:
        try:
            return self._tell(guard, guard.settle(table, everything=True), wake)
        except FirewallError:
            return ()

    def relink(self) -> None:
        """Links, addresses or routes have changed: decide anew, and write what that changes."""
        if self._world is None or self.config is None:
            return
        now = self.environment()
        if now == self._env:
            return
        self._env = now
        decisions = {family: decide(self.config, family, now) for family in self._world.guards}
        if decisions != self._world.decisions:
            # A new link often comes with foreign rules: what these displaced is told before ours move.
            self.strike(heard := self.overhear())
            self.wake(heard)
            self._move(self._world, decisions, strict=False)
            self._keeper.drop_all_but(self._world.sets)

    def _tell(self, guard: Guard, settled: Settled, wake: Wake) -> tuple[Event, ...]:
        """One event for each foreign chain in which ours was wrong, one for our own chains of a table."""
        culprits = suspects(wake.who() or wake.later(), guard.family) if settled.changes else ()
        by = culprits[-1] if culprits else None
        for chain in dict.fromkeys(change.chain for change in settled.changes):
            guard.pacer.blame((settled.table, chain), culprits)
        noticed = settled.since if settled.struck else wake.noticed
        since = noticed if settled.struck else min(settled.since, noticed if wake.exact else self._sound)
        groups: dict[str, list[Change]] = {}
        own = guard.own_chains(settled.table)
        for change in settled.changes:
            groups.setdefault("" if change.chain in own else change.chain, []).append(change)
        return tuple(
            Event(
                time=datetime.now(UTC),
                kind=Kind.REPAIR,
                what=f"put right {subjects(changes)}",
                family=guard.family,
                table=settled.table,
                chain=changes[0].chain,
                reason=changes[0].reason,
                entries=tuple(dict.fromkeys(entry for change in changes for entry in change.entries)),
                by=by,
                exposed_ms=round((settled.done - since) * 1000, 3),
                latency_ms=round((settled.done - noticed) * 1000, 3) if wake.exact else None,
            )
            for changes in groups.values()
        )

    # Flows that a redirect should have caught

    def _with_flows(self, world: _World, repairs: list[Event]) -> list[Event]:
        """The repairs, the last one in nat with the number of flows that were cut after it."""
        last = max((i for i, event in enumerate(repairs) if event.table is Table.NAT), default=None)
        if last is not None:
            repairs[last] = replace(repairs[last], flows_deleted=self._cutter.cut(world.decisions))
        return repairs

    # Taking it all out

    def remove(self) -> dict[str, int]:
        """Take every rule, chain and set of ours out of the kernel, in both backends; returns their numbers.

        Raises Refused when something of ours is still there afterwards; the rest is gone then.
        """
        if self._world:
            for guard in self._world.guards.values():
                guard.firewall.close()
            self._world = None
        removed, problems = remove_rules(self._firewall, self._memory.made)
        removed["sets"] = self._keeper.drop_all_but(())
        self._keeper.errors.clear()
        if problems:
            raise Refused(problems)
        self._memory.forget()
        return removed
