"""The desk between the control socket's threads and the loop: questions are answered here, changes are handed over.

Law: a control thread touches nothing but frozen values, the history and this queue; whatever changes something is done
by the loop, one after the other, and its outcome handed back.
"""

import contextlib
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from nodewalld.core.events import Status
from nodewalld.service.control import Request
from nodewalld.service.history import History
from nodewalld.service.wire import Refused

CHANGES = frozenset({"reload", "try", "confirm", "revert", "pause", "resume", "remove", "set"})
"""Commands that change something."""

_TIMEOUT = 120.0


@dataclass
class _Asked:
    """A request that changes something, and where its outcome goes."""

    request: Request
    answer: Future[Any] = field(default_factory=Future)


class Desk:
    """`status` gives the present one, `sets` what sets hold (of a name, or None for all); `ring` wakes the loop."""

    def __init__(
        self,
        history: History,
        status: Callable[[], Status],
        sets: Callable[[object], list[dict[str, Any]]],
        ring: Callable[[], None],
    ) -> None:
        self._history, self._status, self._sets, self._ring = history, status, sets, ring
        self._asked: queue.SimpleQueue[_Asked] = queue.SimpleQueue()

    def handle(self, request: Request) -> Any:
        """Answer a request; in a thread of the control socket. Raises Refused."""
        if request.command == "status":
            return {**self._status().to_json(), "exposures": self._history.exposures(datetime.now(UTC)).to_json()}
        if request.command == "history":
            return self._tell_history(request)
        if request.command == "sets":
            return self._sets(request.args.get("name"))
        if request.command in CHANGES:
            return self._hand_over(request)
        raise Refused(f"there is no command {request.command}")

    def _tell_history(self, request: Request) -> Any:
        n = request.args.get("n")
        if n is not None and (not isinstance(n, int) or isinstance(n, bool)):
            raise Refused("n must be a number")
        if request.args.get("follow"):
            return self._history.follow(n)
        return [event.to_json() for event in self._history.last(n)]

    def _hand_over(self, request: Request) -> Any:
        asked = _Asked(request)
        self._asked.put(asked)
        self._ring()
        try:
            return asked.answer.result(_TIMEOUT)
        except TimeoutError as error:
            raise Refused(f"{request.command} did not end within {_TIMEOUT:g} s") from error

    def work(self, obey: Callable[[Request], Any]) -> None:
        """Do what has been asked; in the loop. An unforeseen error is told to the asker and goes on to the loop."""
        for asked in self._waiting():
            try:
                asked.answer.set_result(obey(asked.request))
            except Refused as refused:
                asked.answer.set_exception(refused)
            except Exception as error:
                asked.answer.set_exception(Refused(f"{asked.request.command} failed: {error}"))
                raise

    def close(self) -> None:
        """Refuse what is still waiting."""
        for asked in self._waiting():
            asked.answer.set_exception(Refused("the daemon is stopping"))

    def _waiting(self) -> Iterator[_Asked]:
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._asked.get_nowait()
