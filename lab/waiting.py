"""How the lab waits and how it fails: no wait is unbounded, and one that was in vain says for what."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class LabError(Exception):
    """The lab itself failed: a tool is missing, a command inside a node failed, a wait was in vain."""


def wait_for(predicate: Callable[[], T], *, timeout: float = 10.0, what: str = "") -> T:
    """Wait until `predicate` returns something true, and return it; LabError after `timeout` seconds.

    The pauses grow from 1 to 20 ms: quick conditions cost little time, slow ones little work.
    """
    end = time.monotonic() + timeout
    pause = 0.001
    while True:
        last = predicate()
        if last:
            return last
        if time.monotonic() >= end:
            name = what or getattr(predicate, "__qualname__", repr(predicate))
            raise LabError(f"waited {timeout:g} s in vain for {name}; last seen: {last!r}")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.02)
