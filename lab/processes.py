"""The programs behind nsenter: it forks the one that was asked for, which has a pid of its own and gets the signals."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

from lab.waiting import LabError, wait_for


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def only_child(pid: int) -> int:
    """The first child that a process has or will have; LabError when none comes."""
    return wait_for(lambda: _children(pid), what=f"a child of process {pid}")[0]


def inner_pid(process: subprocess.Popen[str]) -> int:
    """The pid, as this machine counts, of the program that `popen` started (its nsenter has forked it)."""

    def found() -> int:
        if process.poll() is not None:
            raise LabError(f"the program has ended with {process.returncode}")
        # nsenter forks only once it has entered: until then its child list is empty.
        return (_children(process.pid) or [0])[0]

    return wait_for(found, what=f"the program of nsenter {process.pid}")


def kill_entered(process: subprocess.Popen[str], number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to the program that `popen` started, not to its nsenter; no error when it has ended."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError, LabError):
            os.kill(inner_pid(process), number)
            # nsenter stops when its program is stopped, and must go on to hear of its end.
            if number is signal.SIGSTOP:
                wait_for(lambda: _state(process.pid) == "T", what=f"nsenter {process.pid} to stop")
            elif number in (signal.SIGCONT, signal.SIGKILL):
                process.send_signal(signal.SIGCONT)


def _state(pid: int) -> str:
    """The state of a process as ps(1) names it."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
