"""Who did it: the process that the kernel names, and its parents as far as /proc still tells.

The kernel names the writing tool (NFTA_GEN_PROC_PID and _NAME, at most 15 characters); the program behind it is found
by walking up at once, while the tool is still closing its socket.
"""

import os
import select
import time
from collections.abc import Iterable
from pathlib import Path

from nodewalld.core.events import Culprit, Process
from nodewalld.kernel.nftevents import GenerationEvent

LINGER = 0.05
"""Seconds that a tool which deletes our chains is granted for the other tables of its restore.

It reads all chains of its family for each of them, and the kernel counts from the first (nf_tables_dump_chains): when
ours come back before it has the last part, it gets one chain twice, deletes that twice, and fails (iptables 1.8.9: what
nft_refresh_transaction does not undo). The end of the tool is waited for by our own commit anyway.
"""

_RESTORES = "-r"  # iptables-restore as the kernel has it: iptables-restor, iptables-nft-re, ip6tables-nft-r
_DEPTH = 8
_STAT_MAX = 4096


def culprit(event: GenerationEvent, proc: Path = Path("/proc")) -> Culprit:
    """The writer of a transaction. Within a pid namespace the kernel's pid is another's: then the port id is tried."""
    for pid in (event.pid, event.port_id):
        stat = _stat(proc, pid)
        if stat and stat[0] == event.comm:
            return Culprit(pid, event.comm, _parents(proc, stat[1]))
    return Culprit(event.pid, event.comm)


def process(pid: int, proc: Path = Path("/proc")) -> Culprit | None:
    """A process and its parents, or None when it has gone."""
    stat = _stat(proc, pid)
    return Culprit(pid, stat[0], _parents(proc, stat[1])) if stat else None


def outlast(culprits: Iterable[Culprit], until: float) -> None:
    """Wait until those of them that restore several tables have ended, but not beyond a time (monotonic seconds)."""
    for tool in culprits:
        if not (tool.is_tool and _RESTORES in tool.comm):
            continue
        try:
            ends = os.pidfd_open(tool.pid)
        except OSError:  # it has ended, or this kernel is older than 5.3
            continue
        try:
            if (known := process(tool.pid)) and known.comm == tool.comm:
                select.select([ends], [], [], max(0.0, until - time.monotonic()))
        finally:
            os.close(ends)


def _parents(proc: Path, pid: int) -> tuple[Process, ...]:
    parents: list[Process] = []
    while pid > 1 and len(parents) < _DEPTH:
        stat = _stat(proc, pid)
        if stat is None:
            break
        parents.append(Process(pid, stat[0]))
        pid = stat[1]
    return tuple(parents)


def _stat(proc: Path, pid: int) -> tuple[str, int] | None:
    """Name and parent of a process; the name stands in parentheses and may hold any character (proc(5)).

    By bare system calls, because a repair waits for it.
    """
    try:
        file = os.open(f"{proc}/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        text = os.read(file, _STAT_MAX).decode(errors="backslashreplace")
    except OSError:  # it has ended meanwhile
        return None
    finally:
        os.close(file)
    name, _, rest = text.partition("(")[2].rpartition(")")
    return name, int(rest.split(maxsplit=2)[1])
