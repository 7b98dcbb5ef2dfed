"""The one door to other programs: argument lists, never a shell; a fixed environment; a limit on time."""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# An ordinary user's PATH holds no sbin, where iptables lives.
_MORE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class ProgramError(Exception):
    """A program is missing, hung or failed in a way that is no answer; the text is fit for people."""


@dataclass(frozen=True, slots=True)
class Result:
    """How a program ended: its exit status, what it printed, and which process it was."""

    status: int
    stdout: str
    stderr: str
    pid: int


def installed(program: str) -> bool:
    """Whether `run` would find it."""
    return shutil.which(program, path=_path()) is not None


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:{_MORE_PATH}".lstrip(":")


def run(argv: Sequence[str], *, stdin: str = "", env: Mapping[str, str] | None = None, timeout: float = 60.0) -> Result:
    """Run a program to its end and return how it ended, whatever its status; `timeout` is in seconds.

    Raises ProgramError when it is not there or does not end in time (then it is killed).
    """
    environment = {"PATH": _path(), "LC_ALL": "C", **(env or {})}
    try:
        process = subprocess.Popen(
            list(argv),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            encoding="utf-8",
            errors="surrogateescape",
        )
    except OSError as error:
        raise ProgramError(f"{argv[0]} can't be started: {error.strerror}") from error
    with process:
        try:
            stdout, stderr = process.communicate(stdin, timeout=timeout)
        except subprocess.TimeoutExpired as error:
            process.kill()
            process.communicate()
            raise ProgramError(f"{argv[0]} did not end within {timeout:g} s") from error
    return Result(process.returncode, stdout, stderr, process.pid)
