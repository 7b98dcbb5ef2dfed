"""Hears the transactions of nf_tables, and makes of those that touched chains of ours the wake-ups that say who wrote.

Laws: what concerns us not is not looked at. The writes of ours are told from others' exactly, by the port or process
that wrote. What is heard while a pass runs is kept: the pass may undo what it has not been told of yet, and then asks
who it was.
"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from select import select

import structlog

from nodewalld.core.blame import Wake
from nodewalld.core.events import Culprit
from nodewalld.core.words import Family, Table
from nodewalld.kernel.culprit import culprit
from nodewalld.kernel.nftevents import ChainEvents, GenerationEvent, GenerationEvents, Touch

_CULPRITS = 4  # of a burst, the last few are asked for their parents
_STRANGERS = 32  # as many between two looks at what neighbours have lost
_STORM = 0.02  # seconds: transactions that come as fast as that are heard of together, some too late for /proc
_REST = 0.05  # seconds

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class _News:
    """Foreign transactions up to a generation of which some concerned us, and what they touched (None: perhaps all)."""

    events: tuple[GenerationEvent, ...]
    touched: frozenset[Touch] | None
    generation: int = 0

    @cached_property
    def who(self) -> tuple[Culprit, ...]:
        """Asked but once, by whoever needs it first: later /proc may not tell any more."""
        return tuple(culprit(event) for event in self.events[-_CULPRITS:])


class Witness:
    """For the thread of the loop; `own_ports` gives, once, those of our own writers since the last call."""

    def __init__(self, own_ports: Callable[[], frozenset[int]]) -> None:
        self._own_ports = own_ports
        self._overheard: list[tuple[float, _News]] = []
        self._listened = time.monotonic()  # when it was read last: what is heard later is not older
        self._chains: ChainEvents | None = None
        self._attended: Mapping[tuple[Family, str], Collection[str]] = {}
        self._early: frozenset[Touch] = frozenset()
        self._strangers: list[Culprit] | None = []
        self._every = False
        self._unconcerned = float("-inf")
        self.events: GenerationEvents | None = None
        """What to wait on for reading; None where this kernel has no such events, or nobody listens."""

    def listen(self) -> None:
        """Begin to hear."""
        try:
            self.events, self._chains = GenerationEvents(), ChainEvents()
        except OSError as error:
            _log.info(f"No nf_tables events from this kernel: {error}")

    def attend(self, places: Mapping[tuple[Family, str], Collection[str]], *, every: bool = False) -> None:
        """Care from now on about these chains, by family and table; after a change the next wake-up is for them all.

        `every`: a transaction that touched none of them is a wake-up as well, for no table.
        """
        self._every = every
        if self._chains is None or places == self._attended:
            return
        self._attended = places
        try:
            self._chains.attend(places)
        except OSError as error:
            _log.info(f"nf_tables events can't be filtered, so each is a reason to look: {error}")
            self._chains.close()
            self._chains = None

    def close(self) -> None:
        """Hear no more."""
        for socket in (self.events, self._chains):
            if socket:
                socket.close()

    @property
    def waiting(self) -> bool:
        """Whether a pass has overheard something that is to be looked at when it is over."""
        return bool(self._overheard)

    def rest(self, limit: float, bell: int) -> bool:
        """After a look at what concerns us not: in a storm of it, let more gather, for at most so many seconds.

        What concerns us, and the bell, end it at once. Whether that is all that can have come meanwhile.
        """
        rests = False
        if self._chains and time.monotonic() - self._unconcerned < _STORM:
            rests = not select([self._chains], (), (), 0)[0]
            if rests:
                select([self._chains.fileno(), bell], (), (), min(limit, _REST))
        self._unconcerned = time.monotonic()
        return rests

    def heard(self, noticed: float) -> Wake | None:
        """What the transactions since the last turn have to do with us; None when nothing.

        `noticed` is the earliest that one of them can have ended, but for those that were overheard.
        """
        heard, self._overheard = self._overheard, []
        if news := self._news():
            heard.append((noticed, news))
        return self._wake(heard[0][0], [news for _, news in heard]) if heard else None

    def overhear(self) -> Wake:
        """As `heard`, in the midst of a pass, which may be too early for that: so it will be heard of again.

        Where nothing was heard, what stands wrong has done so for no longer than that, if all is heard.
        """
        since = self._listened
        if news := self._news():
            self._overheard.append((since, news))
            return self._wake(since, [news])
        return Wake(self._listened, exact=self._chains is not None and bool(self._attended), later=self._later)

    def take_strangers(self) -> tuple[Culprit, ...] | None:
        """Who wrote elsewhere than in chains of ours since the last call; None when some of them are not known."""
        strangers, self._strangers = self._strangers, []
        return None if strangers is None else tuple(strangers)

    def _note(self, events: Iterable[GenerationEvent]) -> None:
        """Ask who they are while /proc still tells; of the first ones only, so that a busy node pays no more for it."""
        for event in events:
            if self._strangers is not None:
                known = len(self._strangers) < _STRANGERS
                self._strangers = [*self._strangers, culprit(event)] if known else None

    def _wake(self, noticed: float, news: list[_News]) -> Wake:
        known = [each.touched for each in news if each.touched is not None]
        touched = frozenset([(touch.family, Table(touch.table), touch.chain) for each in known for touch in each])
        whole = len(known) == len(news)
        return Wake(
            noticed,
            where=frozenset([place[:2] for place in touched]) if whole else None,
            touched=touched if whole else frozenset(),
            generation=news[-1].generation,
            who=partial(_names, news),
            later=self._later,
        )

    def _later(self) -> tuple[Culprit, ...]:
        self.overhear()
        return _names(news for _, news in self._overheard)

    def _news(self) -> _News | None:
        """What has been heard since the last time; None when it does not concern us."""
        self._listened = time.monotonic()
        heard = self.events.read() if self.events else None
        if heard is None or not (heard.events or heard.overflow):
            return None
        touches = self._chains.read() if self._chains else None
        own = self._own_ports()
        if heard.overflow or touches is None:
            self._early = frozenset()
            self._strangers = None if heard.overflow else self._strangers
            return _News(tuple(event for event in heard.events if event.port_id not in own), None)
        # What was told of a transaction whose end has not been heard yet waits for that, but no longer.
        ended = {event.port_id for event in heard.events}
        old, self._early = self._early, frozenset(touch for touch in touches if touch.port_id not in ended)
        touched = [touch for touch in (touches | old) - self._early if touch.port_id not in own]
        ports = {touch.port_id for touch in touched}
        elsewhere = tuple(event for event in heard.events if event.port_id not in own | ports)
        self._note(elsewhere)
        if not touched:
            return _News(elsewhere, frozenset()) if self._every and elsewhere else None
        events = tuple(event for event in heard.events if event.port_id in ports)
        return _News(events, frozenset(touched), heard.events[-1].generation)


def _names(news: Iterable[_News]) -> tuple[Culprit, ...]:
    return tuple(name for each in news for name in each.who)
