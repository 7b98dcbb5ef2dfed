"""Tells a burst from a war, and slows down in a war.

Laws: a neighbour's restart (many moves within a few seconds) is answered move by move. The same chain taken back in
second after second is contention: answers then come at intervals that double, up to a limit, and never stop; when the
other side has been quiet for a while it is over and forgotten. Only *moving* what is displaced is paced; what is gone
is always put back at once.
"""

from collections import deque
from dataclasses import dataclass, field

from nodewalld.core.words import Table

Key = tuple[Table, str]

WINDOW = 60.0
"""Seconds that a chain's moves are remembered, and of quiet that end a contention."""

BUSY_SECONDS = 8
"""In how many different seconds of the window a chain must have been taken back to call it contention."""

FIRST_WAIT, LAST_WAIT = 0.5, 30.0


@dataclass(frozen=True, slots=True)
class Contest:
    """A contention: since when (on the caller's clock), how many moves of ours so far, how long between them now."""

    since: float
    moves: int
    wait: float


@dataclass
class _Chain:
    moves: deque[float] = field(default_factory=lambda: deque(maxlen=256))
    contest: Contest | None = None


class Pacer:
    """Remembers moves by table and chain. The clock is the caller's, in seconds."""

    def __init__(self) -> None:
        self._chains: dict[Key, _Chain] = {}

    def wait(self, key: Key, now: float) -> float:
        """How many seconds the next move in this chain should wait; 0.0 for none."""
        self._forget(key, now)
        chain = self._chains.get(key)
        if chain is None or chain.contest is None:
            return 0.0
        return max(0.0, chain.moves[-1] + chain.contest.wait - now)

    def moved(self, key: Key, now: float) -> None:
        """Something of ours was moved back in this chain."""
        self._forget(key, now)
        chain = self._chains.setdefault(key, _Chain())
        chain.moves.append(now)
        if chain.contest:
            contest = chain.contest
            chain.contest = Contest(contest.since, contest.moves + 1, min(contest.wait * 2, LAST_WAIT))
            return
        recent = [at for at in chain.moves if now - at <= WINDOW]
        if len({int(at) for at in recent}) >= BUSY_SECONDS:
            chain.contest = Contest(recent[0], len(recent), FIRST_WAIT)

    def contests(self, now: float) -> dict[Key, Contest]:
        """The contentions that are going on."""
        for key in list(self._chains):
            self._forget(key, now)
        return {key: chain.contest for key, chain in self._chains.items() if chain.contest}

    def _forget(self, key: Key, now: float) -> None:
        chain = self._chains.get(key)
        if chain and now - chain.moves[-1] > WINDOW + (chain.contest.wait if chain.contest else 0.0):
            del self._chains[key]
