"""The heart feeds systemd's watchdog from its own thread, for as long as the main loop keeps its promises.

Law: at every moment the main loop stands under a promise to come back by a certain time: the one of its last
`beat`, or that of the pass or the sleep that it is in. Inside another promise no promise lasts longer than
the outer one, so a pass can't prolong itself by beating. While all are kept the thread feeds; once one is
broken it stops, and systemd kills the daemon. A long lock wait within the limit of a pass is a kept promise;
a loop that hangs is not.
"""

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import NamedTuple, Self

import structlog

_log = structlog.get_logger(__name__)

TURN_LIMIT = 5.0
"""How long one turn of the loop may take outside of `working` and `sleeping`, in seconds."""

SLEEP_GRACE = 5.0
"""How much later than asked a sleep may end on a node that is short of CPU, in seconds."""


class _Promise(NamedTuple):
    until: float
    what: str


class _Under:
    """A promise for as long as a block lasts. No generator: on the way to a repair each call counts."""

    __slots__ = ("_heart", "_seconds", "_what")

    def __init__(self, heart: "Heart", what: str, seconds: float) -> None:
        self._heart, self._what, self._seconds = heart, what, seconds

    def __enter__(self) -> None:
        self._heart.promise(self._what, self._seconds)

    def __exit__(self, *_: object) -> None:
        self._heart.keep()


class Heart:
    """Feeds by `feed` every third of `interval` seconds; without an interval it has nothing to do.

    `beat`, `working` and `sleeping` are for the thread of the main loop.
    """

    def __init__(
        self, interval: float | None, feed: Callable[[], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._interval = interval
        self._feed = feed
        self._clock = clock
        self._guard = threading.Lock()
        self._promises = [self._new("the turn of the main loop", TURN_LIMIT)]
        self._complained = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)

    @property
    def longest_sleep(self) -> float | None:
        """The longest timeout that `sleeping` takes: half the interval; None without a watchdog."""
        return None if self._interval is None else self._interval / 2

    def beat(self) -> None:
        """The main loop turns. Inside `working` and `sleeping` this promises nothing: theirs stands."""
        with self._guard:
            if len(self._promises) == 1:
                self._promises[0] = self._new("the turn of the main loop", TURN_LIMIT)

    def working(self, limit: float = 30.0, what: str = "a pass") -> AbstractContextManager[None]:
        """Around work that may take up to `limit` seconds."""
        return _Under(self, what, limit)

    def sleeping(self, timeout: float) -> AbstractContextManager[None]:
        """Around a wait that the kernel ends after `timeout` seconds at the latest.

        A wait of more than `longest_sleep` is refused with ValueError: a loop that has died in it would be
        noticed late.
        """
        longest = self.longest_sleep
        if timeout < 0 or (longest is not None and timeout > longest):
            raise ValueError(f"a sleep of {timeout:g} s is not within {longest or 0:g} s (half the watchdog's)")
        return _Under(self, "a sleep", timeout + SLEEP_GRACE)

    def pulse(self) -> bool:
        """Feed if every promise is kept; whether it did. The thread calls this; so do tests."""
        with self._guard:
            broken = min(self._promises, key=lambda promise: promise.until)
            late = self._clock() - broken.until
        if late > 0:
            if not self._complained:
                self._complained = True
                _log.error(f"The main loop hangs: {broken.what} is overdue; the watchdog is no longer fed")
            return False
        self._complained = False
        self._feed()
        return True

    def start(self) -> None:
        """Begin to feed, if systemd has asked for it."""
        if self._interval is not None:
            self._thread.start()

    def stop(self) -> None:
        """Feed no more."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _new(self, what: str, seconds: float) -> _Promise:
        return _Promise(self._clock() + seconds, what)

    def promise(self, what: str, seconds: float) -> None:
        """Stand under one more promise; that of the turn is at rest until the outermost has ended."""
        with self._guard:
            if len(self._promises) == 1:
                self._promises[0] = _Promise(float("inf"), "")
            self._promises.append(self._new(what, seconds))

    def keep(self) -> None:
        """The last promise is kept; behind the outermost that of the turn begins anew."""
        with self._guard:
            self._promises.pop()
        self.beat()

    def _run(self) -> None:
        assert self._interval is not None  # noqa: S101 - start() asked
        while not self._stopping.is_set():
            self.pulse()
            self._stopping.wait(self._interval / 3)
