"""Tells a war from a burst, and slows down in a war.

Laws:
1. In a war the same rules take the same place in answer to our writes. A burst is somebody at work: its rules come and
   go, or its program is another each time. A burst is answered move by move, at once, however long it is.
2. In a war our answers come at intervals that double up to a limit, and never stop. Whoever has won is quiet while we
   wait. So when anything else moves in that chain meanwhile, it was no answer to us: ours is put back at once, and if
   rules came or went, the waits are over until there is a new reason for them.
3. Only *moving* what is displaced is paced; what is gone is always put back at once, and only told of.
4. What the other side has left alone for longer than it ever took to answer is over. Should it come back (Felix looks
   after 1, 2 and 4 s, and then at its refresh), it is met at the pace that it had.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from nodewalld.core.desired import OWN_PREFIX
from nodewalld.core.events import Culprit, Reason
from nodewalld.core.plan import Change
from nodewalld.core.ruletext import Rule
from nodewalld.core.words import Table

Key = tuple[Table, str]

ROUNDS = 3
"""Answers in a row that make a contention: two may be chance (a program that settles at its start), and a fourth write
of ours would only bring a fourth of theirs. What happens otherwise in the chain starts the row anew."""

STUBBORN = 20
"""Different seconds within `MEMORY` in which the same rules took the place, that make a contention whatever else went
on: of two that fight each other as well neither answers us alone. It is told; what is paced is only haste."""

HASTE = 60.0
"""Seconds for so many of them that are met by waits. Ten restarts of Docker within 20 s are ten, and a node that makes
networks all day takes longer."""

MEMORY = 600.0
"""Seconds after which a take is no answer: the slowest neighbour known (kube-router) looks every 300 s."""

QUIET = 60.0
"""Seconds of being left alone that end a contention, at the least; else twice what the other side took to answer."""

FIRST_WAIT, LAST_WAIT = 0.5, 64.0
"""Seconds between our answers, at first and at last: less than one a minute."""

_OPPONENTS_MAX = 8  # by chain; the oldest is forgotten


@dataclass(frozen=True, slots=True)
class Contest:
    """A contention in one chain.

    `takers` are the rules that take the place, none where ours are taken out. `since` and `last` (the last round) are
    on the caller's clock; `wait` is how long after our last answer the next one comes; `slowed` says whether any had to
    wait.
    """

    table: Table
    chain: str
    takers: tuple[str, ...]
    by: Culprit | None
    rounds: int
    since: float
    last: float
    wait: float
    slowed: bool


@dataclass
class _Opponent:
    takers: tuple[str, ...]
    began: float
    last: float = 0.0
    rounds: int = 0
    row: int = 0
    slowest: float = 0.0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=STUBBORN))
    by: Culprit | None = None
    contested: bool = False
    wait: float = 0.0
    slowed: bool = False
    lapsed: float = 0.0

    def took(self, now: float, lag: float | None) -> None:
        """It has taken the place once more; `lag`: in answer to our last write, after so many seconds."""
        if lag is None:
            self.row = 0
        else:
            self.slowest = max(self.slowest, lag)
        if not self.contested and not self.row:
            self.began, self.rounds = now, 0
        self.rounds, self.row, self.last = self.rounds + 1, self.row + 1, now
        if lag is not None and self.lapsed:
            self.contested, self.wait, self.lapsed = True, min(self.lapsed * 2, LAST_WAIT), 0.0
        if not self.seconds or int(self.seconds[-1]) != int(now):
            self.seconds.append(now)

    def judge(self) -> None:
        """See whether it is contention by now. Not done at once: who did it is known a little later than what."""
        spread = self.last - self.seconds[0] if len(self.seconds) == STUBBORN else float("inf")
        in_a_row = self.row >= ROUNDS and bool(self.takers)
        if not self.contested and (in_a_row or spread <= MEMORY):
            self.contested = True
            if not in_a_row:
                self.began, self.rounds = self.seconds[0], STUBBORN
        if self.contested and self.takers and not self.wait and (in_a_row or spread <= HASTE):
            self.wait = FIRST_WAIT

    def acquit(self) -> None:
        """It has gone on though it had the place: it does not answer us, whatever it does."""
        self.wait, self.row, self.slowed = 0.0, 0, False
        self.seconds.clear()

    def lapse(self) -> None:
        """It has been quiet for long enough. If it comes back while it is remembered, the pace is the one it had."""
        self.contested, self.slowed, self.lapsed, self.wait, self.row = False, False, self.wait, 0.0, 0
        self.seconds.clear()

    @property
    def over(self) -> float:
        """When it is over, or forgotten, unless it takes the place once more."""
        return self.last + max(QUIET, 2 * self.slowest) + self.wait if self.contested else self.last + MEMORY


@dataclass
class _Chain:
    """What was so when ours were put back last; then, since when and how ours stand wrong again."""

    moved: float
    content: int
    current: frozenset[str]
    opponents: dict[frozenset[str], _Opponent] = field(default_factory=dict)
    disturbed: bool = False
    taken: float | None = None
    found: tuple[int, frozenset[str]] = (0, frozenset())
    restless: bool = False
    stirred: bool = False


class Pacer:
    """Remembers, by table and chain, who took places of ours. The clock is the caller's, in seconds."""

    def __init__(self) -> None:
        self._chains: dict[Key, _Chain] = {}

    def watched(self, table: Table) -> tuple[str, ...]:
        """The chains of a table of which every look should be told."""
        return tuple(chain for where, chain in self._chains if where is table)

    def look(self, key: Key, rules: Iterable[Rule], takers: Sequence[str] | None, now: float) -> float:
        """What was seen in a chain: its rules, and which of them have taken our place (None: we stand right).

        Returns how many seconds moving ours back should wait; 0.0 for none.
        """
        chain = self._chains.get(key)
        if chain is None:
            return 0.0
        found = _content(rules), frozenset(takers or ())
        if chain.taken is not None:
            chain.restless |= takers is None or found != chain.found
            chain.stirred |= found[0] != chain.found[0]
        else:
            chain.disturbed |= found[0] != chain.content
        if takers is None:
            return 0.0
        if chain.taken is None:
            chain.taken, chain.found = now, found
        opponent = chain.opponents.get(found[1])
        if opponent is None or chain.restless:
            return 0.0
        opponent.judge()
        wait = max(0.0, chain.moved + opponent.wait - now) if opponent.wait else 0.0
        opponent.slowed |= wait > 0.0
        return wait

    def moved(self, key: Key, rules: Iterable[Rule], takers: Sequence[str], now: float) -> None:
        """Ours were put back in a chain that held these rules; `takers` had the place, () when ours were gone."""
        content, kind = _content(rules), frozenset(takers)
        chain = self._chains.setdefault(key, _Chain(now, content, kind))
        lag = (now if chain.taken is None else chain.taken) - chain.moved
        answers = kind == chain.current and content == chain.content and not chain.disturbed and lag <= MEMORY
        opponent = chain.opponents.pop(kind, None) or _Opponent(tuple(takers), now)
        if chain.stirred:
            opponent.acquit()
        elif opponent.wait:
            opponent.wait = min(opponent.wait * 2, LAST_WAIT)
        opponent.took(now, lag if answers else None)
        chain.opponents[kind] = opponent
        if len(chain.opponents) > _OPPONENTS_MAX:
            del chain.opponents[next(iter(chain.opponents))]
        self._chains[key] = _Chain(now, content, kind, chain.opponents)

    def blame(self, key: Key, culprits: Sequence[Culprit]) -> None:
        """Who may have done what was just put right. Another process than before has not answered us, it has begun."""
        chain = self._chains.get(key)
        opponent = chain.opponents.get(chain.current) if chain else None
        if opponent is None or not culprits:
            return
        before = opponent.by.lineage if opponent.by else frozenset()
        known = [culprit for culprit in culprits if culprit.lineage]
        again = [culprit for culprit in known if culprit.lineage & before]
        if before and known and not again:
            opponent.row = 1
        if known or opponent.by is None:
            opponent.by = (again or known or list(culprits))[-1]

    def contests(self, now: float) -> tuple[Contest, ...]:
        """The contentions that are going on."""
        for key, chain in list(self._chains.items()):
            for kind, opponent in list(chain.opponents.items()):
                opponent.judge()
                if now < opponent.over:
                    continue
                if opponent.contested:
                    opponent.lapse()
                else:
                    del chain.opponents[kind]
            if not chain.opponents:
                del self._chains[key]
        return tuple(
            Contest(*key, o.takers, o.by, o.rounds, o.began, o.last, o.wait, o.slowed)
            for key, chain in self._chains.items()
            for o in chain.opponents.values()
            if o.contested
        )

    def over(self, now: float) -> float:
        """When the next of them is over if nothing happens; infinity without any."""
        self.contests(now)
        each = (o.over for chain in self._chains.values() for o in chain.opponents.values() if o.contested)
        return min(each, default=float("inf"))

    def forget(self, table: Table) -> None:
        """Something else is wanted in this table: what was fought for before is no matter any more."""
        self._chains = {key: chain for key, chain in self._chains.items() if key[0] is not table}


def _content(rules: Iterable[Rule]) -> int:
    """Which foreign rules these are, whatever their order."""
    return hash(tuple(sorted(rule.text for rule in rules if not rule.tag)))


def taken(changes: Iterable[Change]) -> dict[str, tuple[str, ...]]:
    """The foreign chains in which a place of ours was taken, and by which rules; by none where ours were gone."""
    found: dict[str, tuple[str, ...]] = {}
    for change in changes:
        if not change.chain.startswith(OWN_PREFIX) and change.reason is not Reason.CHANGED:
            found[change.chain] = tuple(dict.fromkeys((*found.get(change.chain, ()), *change.takers)))
    return found
