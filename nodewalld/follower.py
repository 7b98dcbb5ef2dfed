"""Follows the files of sets: reads each anew when it has changed and is at rest, in a thread of its own.

Laws: files are looked at a few times a second, not waited for: inotify hears nothing from a network's file system, nor
of a folder that is not there yet, and would want a watch for every folder that a chain of links goes through. A file is
read when two looks in a row saw the same, and counts when it is still the same afterwards; so none is taken half
written. What was read goes to the loop; this thread decides nothing.
"""

import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from nodewalld.configuration.errors import ConfigError
from nodewalld.configuration.setfiles import read_set
from nodewalld.core.config import Problem, SetFile

PERIOD = 0.25
"""Seconds between two looks."""

_Look = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """What a file held when it was read; with problems, nothing that can be used."""

    path: str
    text: str = ""
    file: SetFile | None = None
    problems: tuple[Problem, ...] = ()


class Follower:
    """`ring` is called, in the follower's thread, when there is something to `take`."""

    def __init__(
        self, ring: Callable[[], object], *, period: float = PERIOD, read: Callable[[str], Found] | None = None
    ) -> None:
        self._ring, self._period, self._read = ring, period, read or read_found
        self._changed = threading.Condition()
        self._paths: frozenset[str] = frozenset()
        self._seen: dict[str, _Look] = {}
        self._known: dict[str, _Look] = {}
        self._found: list[Found] = []
        self._course = 0
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="set files", daemon=True)

    def follow(self, paths: Iterable[str]) -> None:
        """From now on follow these. Each is read once in any case; what was found before is forgotten."""
        with self._changed:
            self._paths = frozenset(paths)
            self._seen, self._known = {}, {}
            self._found.clear()
            self._course += 1
            self._changed.notify()

    def take(self) -> tuple[Found, ...]:
        """What was found since the last call."""
        with self._changed:
            found = tuple(self._found)
            self._found.clear()
        return found

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while not self._ending:
            self.look()
            with self._changed:
                course = self._course
                self._changed.wait_for(lambda: self._ending or self._course != course, self._pause)  # noqa: B023

    @property
    def _pause(self) -> float | None:
        """Without files to follow there is nothing to wake up for."""
        return self._period if self._paths else None

    def look(self) -> None:
        """Look at each file once, and read those that have changed and are at rest."""
        with self._changed:
            paths, seen, known = self._paths, self._seen, self._known
        for path in sorted(paths):
            look = _look(path)
            if look == seen.get(path) != known.get(path):
                found = self._read(path)
                if _look(path) == look:
                    known[path] = look
                    self._tell(found, known)
            seen[path] = look

    def _tell(self, found: Found, known: dict[str, _Look]) -> None:
        with self._changed:
            if known is not self._known:
                return  # meanwhile somebody has begun to follow anew
            self._found.append(found)
        self._ring()


def _look(path: str) -> _Look:
    """All by which one can tell that a file, or who may write it, has changed; links are followed."""
    try:
        file, folder = os.stat(path), Path(os.path.realpath(path)).parent.stat()  # noqa: PTH116 - links may form a loop
    except OSError as error:
        return (error.errno,)
    when = (file.st_mtime_ns, file.st_ctime_ns)
    return (file.st_dev, file.st_ino, file.st_size, *when, file.st_mode, file.st_uid, folder.st_mode, folder.st_uid)


def read_found(path: str) -> Found:
    """Read a set file."""
    try:
        text, file = read_set(path)
    except ConfigError as error:
        return Found(path, problems=error.problems)
    return Found(path, text, file)
