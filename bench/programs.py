"""Running a program to its end as cheaply as Python can, timed: what it took by the clock and of the processor.

Law: the clock runs from just before the program is started until its end has been heard of, so a reference holds what
anybody pays who calls that program, and nothing of ours.
"""

import os
import time
from collections.abc import Sequence
from typing import NamedTuple


class Ended(NamedTuple):
    """Milliseconds by the clock, milliseconds of processor time (own and kernel's), and when it ended (monotonic)."""

    wall: float
    cpu: float
    when: float


class ProgramFailedError(Exception):
    """A program of the bench itself failed."""


class Started:
    """A program that runs; standard input is a file, standard output is thrown away."""

    def __init__(self, argv: Sequence[str], stdin: str = os.devnull) -> None:
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, stdin, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        ]
        self._argv = list(argv)
        self._begun = time.monotonic()
        self.pid = os.posix_spawnp(argv[0], self._argv, os.environ, file_actions=actions)

    def wait(self) -> Ended:
        """Wait for its end. Raises ProgramFailedError unless it exits with 0."""
        _, status, usage = os.wait4(self.pid, 0)
        when = time.monotonic()
        if status:
            raise ProgramFailedError(f"{' '.join(self._argv)} ended with {os.waitstatus_to_exitcode(status)}")
        return Ended((when - self._begun) * 1000, (usage.ru_utime + usage.ru_stime) * 1000, when)


def run(argv: Sequence[str], stdin: str = os.devnull) -> Ended:
    """Run a program to its end."""
    return Started(argv, stdin).wait()
