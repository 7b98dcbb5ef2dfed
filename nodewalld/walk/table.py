"""One base chain of iptables walked to its end: every way that can't be ruled out.

Laws: where a condition can't be decided, both ways are gone, each with what was supposed. What is supposed once holds
for the same question later, if the answer lasts. Two ways that stand at the same place with the same packet go on as
one; so the number of ways stays small, however many rules can't be decided.
"""

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from nodewalld.core.words import Backend, Table
from nodewalld.walk.matches import Condition, conditions, unmet
from nodewalld.walk.nft import NftRule
from nodewalld.walk.packet import State
from nodewalld.walk.rules import Chain, Rule
from nodewalld.walk.targets import ENDS, HANDED_OVER, MARKS, NOTHING_SEEN, REWRITES, Fate, marked, rewritten
from nodewalld.walk.world import World

_MOST_SUPPOSED = 64  # forks after which answers are no longer remembered: more ways, but none is missed
_DEEPEST = 64  # chains within chains; the kernel refuses loops


@dataclass(frozen=True, slots=True)
class Hit:
    """A rule that matched, or (`supposed`) may have. `before` and `after` differ where it changed the packet."""

    rule: Rule
    before: State
    after: State
    supposed: bool = False


@dataclass(frozen=True, slots=True)
class Supposed:
    """A condition that can't be decided, the rule that asks (if it is one), and which answer this way supposes."""

    rule: Rule | None
    text: str
    holds: bool


@dataclass(frozen=True, slots=True)
class Way:
    """One way through a base chain. `rule` is what ended it; None for the policy. `why` tells of an unknown fate."""

    state: State
    fate: Fate
    rule: Rule | None
    hits: tuple[Hit, ...] = ()
    supposed: tuple[Supposed, ...] = ()
    why: str = ""


@dataclass(slots=True)
class _Thread:
    """Where one way stands: the rest of the chains that it came through."""

    state: State
    chain: Chain
    index: int
    stack: tuple[tuple[Chain, int], ...] = ()
    hits: tuple[Hit, ...] = ()
    supposed: tuple[Supposed, ...] = ()

    @property
    def place(self) -> Hashable:
        """Equal for ways whose future is the same."""
        return (self.chain.name, self.index, tuple((c.name, i) for c, i in self.stack), self.state)


@dataclass
class Walker:
    """Walks the base chains of one world; the conditions of a rule are taken apart once."""

    world: World
    _conditions: dict[int, tuple[Rule, tuple[Condition, ...]]] = field(default_factory=dict)

    def walk(self, state: State, backend: Backend, table: Table, base: str) -> tuple[Way, ...]:
        """Every way of a packet through a built-in chain; one that isn't there lets it pass."""
        chains = self.world.rules[backend].tables.get(table, {})
        if base not in chains:
            return (Way(state, Fate.ACCEPT, None),)
        return self.through(state, chains, base, binds_destination=base in {"PREROUTING", "OUTPUT"})

    def through(
        self, state: State, chains: Mapping[str, Chain], base: str, *, binds_destination: bool
    ) -> tuple[Way, ...]:
        """Every way of a packet through a base chain with the chains of its table."""
        return tuple(_Walk(self, chains, binds_destination).ways(state, chains[base]))

    def conditions(self, rule: Rule) -> tuple[Condition, ...]:
        """What must hold for a rule to match."""
        if isinstance(rule, NftRule):
            return rule.conditions
        known = self._conditions.get(id(rule))
        if known is None:
            known = self._conditions[id(rule)] = (rule, conditions(rule.parsed, self.world.family))
        return known[1]


@dataclass
class _Walk:
    walker: Walker
    chains: Mapping[str, Chain]
    binds_destination: bool
    _forks: int = 0
    _seen: set[Hashable] = field(default_factory=set)

    def ways(self, state: State, chain: Chain) -> Iterator[Way]:
        work = [_Thread(state, chain, 0)]
        while work:
            yield from self._advance(work.pop(), work)

    def _advance(self, thread: _Thread, work: list[_Thread]) -> Iterator[Way]:
        """Follow one way to its end; where it forks, the other is put on the heap of work."""
        while True:
            thread.index = thread.chain.following(thread.index, thread.state.destination_ports)
            if thread.index >= len(thread.chain.texts):
                if not thread.stack:
                    fate = Fate(thread.chain.policy.lower()) if thread.chain.policy in ENDS else Fate.ACCEPT
                    yield Way(thread.state, fate, None, thread.hits, thread.supposed)
                    return
                self._return(thread)
                if self._known(thread):
                    return
                continue
            rule = thread.chain.rules[thread.index]
            thread.index += 1
            open_ = unmet(thread.state, self.walker.world, self.walker.conditions(rule))
            if open_ is None:
                continue
            if open_:
                if not rule.target or rule.target in NOTHING_SEEN:
                    thread.hits += (Hit(rule, thread.state, thread.state, supposed=True),)
                    continue
                answer = self._fork(thread, rule, open_, work)
                if not answer:
                    continue
            way = self._take(thread, rule, supposed=bool(open_))
            if way is not None:
                yield from way
                return
            if open_ and self._known(thread):
                return

    def _fork(self, thread: _Thread, rule: Rule, open_: tuple[Condition, ...], work: list[_Thread]) -> bool:
        """Suppose that the conditions hold, and leave the other way for later; False when it was supposed otherwise."""
        assumed = dict(thread.state.assumed)
        fresh = []
        for condition in open_:
            known = assumed.get(_question(thread.state, condition))
            if known is None:
                fresh.append(condition)
            elif known == condition.negated:
                return False
        if not fresh:
            return True
        self._forks += 1
        text = ", ".join(condition.spelled for condition in fresh)
        other = replace(thread, supposed=(*thread.supposed, Supposed(rule, text, holds=False)))
        if len(fresh) == 1:
            other.state = self._assume(other.state, fresh[0], holds=False)
        thread.supposed = (*thread.supposed, Supposed(rule, text, holds=True))
        for condition in fresh:
            thread.state = self._assume(thread.state, condition, holds=True)
        if not self._known(other):
            work.append(other)
        return True

    def _assume(self, state: State, condition: Condition, *, holds: bool) -> State:
        if self._forks > _MOST_SUPPOSED:
            return replace(state, assumed=frozenset()) if state.assumed else state
        if not condition.lasting:
            return state
        answer = holds is not condition.negated
        return replace(state, assumed=state.assumed | {(_question(state, condition), answer)})

    def _known(self, thread: _Thread) -> bool:
        """Whether another way has stood here with the same packet; it leads on for both."""
        place = thread.place
        if self._forks and place in self._seen:
            return True
        self._seen.add(place)
        return False

    @staticmethod
    def _return(thread: _Thread) -> None:
        *rest, (thread.chain, thread.index) = thread.stack
        thread.stack = tuple(rest)

    def _take(self, thread: _Thread, rule: Rule, *, supposed: bool) -> tuple[Way, ...] | None:
        """Do what the rule does: the ways that end here, or None when the thread goes on."""
        target, state = rule.target, thread.state
        after: tuple[State, ...] | None = (state,)
        if target in REWRITES:
            after = rewritten(state, rule, self.walker.world, destination=self.binds_destination)
        elif target in MARKS:
            changed = marked(state, rule)
            after = (changed,) if changed else None
        shown = after[0] if after else state
        thread.hits += (Hit(rule, state, shown, supposed),)
        if target in ENDS:
            return (self._end(thread, ENDS[target], rule),)
        if target == "RETURN":
            if not thread.stack:
                thread.index = len(thread.chain.texts)
            else:
                self._return(thread)
            return None
        if target in self.chains:
            self._enter(thread, rule)
            return None
        if after and target in REWRITES:
            return tuple(
                replace(
                    self._end(thread, Fate.ACCEPT, rule),
                    state=each,
                    hits=(*thread.hits[:-1], Hit(rule, state, each, supposed)),
                )
                for each in after
            )
        if after and (target in MARKS or target in NOTHING_SEEN or not target):
            thread.state = after[0]
            return None
        why = "a program decides" if target in HANDED_OVER else "what it does is not understood"
        return (replace(self._end(thread, Fate.UNKNOWN, rule), why=f"-j {target}: {why}"),)

    def _enter(self, thread: _Thread, rule: Rule) -> None:
        if not rule.parsed.goto:
            thread.stack = (*thread.stack, (thread.chain, thread.index))
        elif not thread.stack:
            # A goto from a built-in chain ends, as its last rule would, with the policy.
            thread.stack = ((thread.chain, len(thread.chain.texts)),)
        if len(thread.stack) > _DEEPEST:
            raise RecursionError(f"chains within chains at {rule.chain}")
        thread.chain, thread.index = self.chains[rule.target], 0

    @staticmethod
    def _end(thread: _Thread, fate: Fate, rule: Rule) -> Way:
        return Way(thread.state, fate, rule, thread.hits, thread.supposed)


def _question(state: State, condition: Condition) -> Hashable:
    return (condition.text, state.flow, state.inside, state.outside)
