"""The process within a node that disturbs, observes and times: `python -m bench.inside COMMAND JSON`.

Laws: one observer for both sides. It hears the end of each nf_tables transaction as nodewalld does, by a
subscription of its own. What counts is the time between the foreign transaction and the one after which our jump is on
top again, and that it is on top is read from the chain. It runs before all others on its processor, so that it hears in
time. Every wait has an end.
"""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.programs import Ended, Started, run
from bench.writer import Writer
from nodewalld.core.words import Family
from nodewalld.kernel.nftables import NetlinkError, NftablesReader
from nodewalld.kernel.nftevents import GenerationEvents
from nodewalld.kernel.xtables import LegacyReader

OWN = "NODEWALL-"
_DISPLACE = ("-I", "FORWARD", "-j", "ACCEPT")
_PATIENCE = 5.0  # seconds for a repair
# Seconds between one disturbance and the next: what this process has deleted must be destroyed by then, else the next
# tool's close() waits for it, and with it everybody who writes.
_BREATH = 0.05


class NotRepairedError(Exception):
    """Our jump did not come back in time."""


class Chain:
    """filter FORWARD (IPv4, nft): whether our jump is on top, and what others put there."""

    def __init__(self) -> None:
        self._reader = NftablesReader()

    def right(self) -> bool:
        """Whether our jump is the first rule; no when others write faster than one can read."""
        try:
            rules = self._reader.rules(Family.IPV4, "filter", "FORWARD") or ()
        except NetlinkError:
            return False
        return bool(rules) and rules[0].tagged and (rules[0].jump or "").startswith(OWN)

    def handles(self, *, ours: bool) -> list[int]:
        """The handles of our rules, or of all others."""
        rules = self._reader.rules(Family.IPV4, "filter", "FORWARD") or ()
        return [rule.handle for rule in rules if rule.tagged is ours]

    def clear(self, writer: Writer) -> None:
        """Delete what others put there."""
        for handle in self.handles(ours=False):
            writer.delete("filter", "FORWARD", handle)


class Observer:
    """Times repairs of the jump in filter FORWARD."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._events = GenerationEvents()

    def drain(self) -> None:
        """Forget what was heard."""
        self._events.read()

    def repair(self, port: int) -> float:
        """Milliseconds from the transaction of that netlink port to the one that put our jump right."""
        disturbed = answered = 0.0
        end = time.monotonic() + _PATIENCE
        while (left := end - time.monotonic()) > 0:
            # A look that failed because others wrote meanwhile is taken again soon; the time is that of the answer.
            select.select([self._events], [], [], min(left, 0.001) if answered else left)
            heard, now = self._events.read(), time.monotonic()
            for event in heard.events:
                if event.port_id == port:
                    disturbed = disturbed or now
                elif disturbed:
                    answered = now
            if answered and self._chain.right():
                return (answered - disturbed) * 1000
        raise NotRepairedError(f"after {_PATIENCE:g} s our jump is not on top of filter FORWARD again")


def _run_first() -> None:
    """Before all others on this processor; programs that are started from here are not."""
    os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))


def repairs(writer: str, events: int, seconds: float) -> dict[str, Any]:
    """Displace our jump again and again, for at most so long: by `iptables-nft -I` or through an open socket.

    Through a socket it is told as well how long each foreign commit took the kernel.
    """
    foreign, chain = Writer(), Chain()
    observer = Observer(chain)
    _run_first()
    end = time.monotonic() + seconds
    taken: list[float] = []
    commits: list[float] = []
    while len(taken) < events and time.monotonic() < end:
        observer.drain()
        tool = None
        if writer == "tool":
            tool = Started(["iptables-nft", *_DISPLACE])
        else:
            begun = time.monotonic()
            foreign.insert("filter", "FORWARD")
            commits.append((time.monotonic() - begun) * 1000)
        taken.append(observer.repair(tool.pid if tool else foreign.port))
        if tool:
            tool.wait()
        chain.clear(foreign)
        time.sleep(_BREATH)
    return {"ms": taken, "commits": commits}


def restores(tool: str, events: int) -> dict[str, Any]:
    """Move a jump by one transaction of `iptables-nft-restore` or `iptables-legacy-restore`, again and again."""
    script, jump = Path("/run/bench-move"), "FORWARD -j BENCH-REFERENCE"
    plain = tool.removesuffix("-restore")
    subprocess.run([plain, "-N", "BENCH-REFERENCE"], check=True)
    subprocess.run([plain, "-I", *jump.split()], check=True)
    script.write_text(f"*filter\n-D {jump}\n-I {jump}\nCOMMIT\n")
    ended = []
    for _ in range(events):
        ended.append(run([tool, "--noflush"], str(script)))
        time.sleep(_BREATH)
    subprocess.run([plain, "-D", *jump.split()], check=True)
    subprocess.run([plain, "-X", "BENCH-REFERENCE"], check=True)
    return _told(ended)


def legacy(events: int, seconds: float) -> dict[str, Any]:
    """Displace our jump by `iptables-legacy -I`; from the tool's exit until the table is as it is when we are right."""
    look, end = LegacyReader(Family.IPV4), time.monotonic() + seconds
    displace, undo = ["iptables-legacy", *_DISPLACE], ["iptables-legacy", "-D", *_DISPLACE[1:]]
    run(displace)
    _until(_legacy_right)
    right = look.fingerprint("filter")
    taken: list[float] = []
    while len(taken) < events and time.monotonic() < end:
        run(undo)
        time.sleep(_BREATH)
        exited = run(displace).when
        _until(lambda: look.fingerprint("filter") == right)
        taken.append((time.monotonic() - exited) * 1000)
        time.sleep(_BREATH)
    run(undo)
    return {"ms": taken}


def _legacy_right() -> bool:
    listed = subprocess.run(["iptables-legacy", "-S", "FORWARD"], capture_output=True, text=True, check=True).stdout
    rules = [line for line in listed.splitlines() if line.startswith("-A ")]
    return len(rules) > 1 and f"-j {OWN}" in rules[0]


def _until(good: Callable[[], bool]) -> None:
    end = time.monotonic() + _PATIENCE
    while not good():
        if time.monotonic() > end:
            raise NotRepairedError(f"after {_PATIENCE:g} s our jump is not on top of filter FORWARD again (legacy)")
        time.sleep(0.0001)


def displacements(events: int, interval: float) -> dict[str, Any]:
    """Displace whatever is on top of filter FORWARD by single commands at an even pace, then clear up."""
    begun = time.monotonic()
    for number in range(events):
        time.sleep(max(0.0, begun + number * interval - time.monotonic()))
        run(["iptables-nft", *_DISPLACE])
    ended = begun + events * interval
    time.sleep(max(0.0, ended - time.monotonic()))
    while not subprocess.run(["iptables-nft", "-D", *_DISPLACE[1:]], stderr=subprocess.DEVNULL, check=False).returncode:
        pass
    return {"begun": begun, "ended": ended}


def programs(argv: Sequence[str], stdin: str, times: int) -> dict[str, Any]:
    """Run a program again and again."""
    return _told([run(argv, stdin or os.devnull) for _ in range(times)])


def noise(transactions: int, pause: float) -> dict[str, Any]:
    """Transactions in nat, in a chain BENCH-NOISE that must be there, that concern nobody."""
    foreign = Writer()
    for number in range(transactions):
        if number % 2:
            foreign.flush("nat", "BENCH-NOISE")
        else:
            foreign.insert("nat", "BENCH-NOISE")
        time.sleep(pause)
    return {}


def vandal(interval: float) -> dict[str, Any]:
    """Put something above our jump and take it away again, every so often, until standard input ends."""
    foreign, chain, writes = Writer(), Chain(), 0
    while not select.select([0], [], [], interval)[0]:
        foreign.insert("filter", "FORWARD")
        time.sleep(interval / 2)
        chain.clear(foreign)
        writes += 1
    return {"writes": writes}


def endure(transactions: int, probe_every: int, pid: int) -> dict[str, Any]:
    """Foreign transactions as fast as they go; now and then our jump is deleted; once it is back the daemon is weighed.

    Deleted and not displaced: what is displaced second after second is put back ever more slowly, as it should be.
    """
    foreign, chain = Writer(), Chain()
    observer = Observer(chain)
    probes: list[tuple[int, float, float, float]] = []
    for number in range(transactions):
        if number % probe_every == 0:
            observer.drain()
            foreign.delete("filter", "FORWARD", chain.handles(ours=True)[0])
            took = observer.repair(foreign.port)
            probes.append((number, took, *_weight(pid)))
        elif number % 2:
            foreign.flush("nat", "BENCH-NOISE")
        else:
            foreign.insert("nat", "BENCH-NOISE")
    return {"probes": probes}


def _weight(pid: int) -> tuple[float, int]:
    """Resident memory in KiB and the number of open descriptors."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 1024, len(list(Path(f"/proc/{pid}/fd").iterdir()))


def _told(ended: Sequence[Ended]) -> dict[str, Any]:
    return {"ms": [each.wall for each in ended], "cpu": [each.cpu for each in ended]}


_COMMANDS: dict[str, Callable[..., dict[str, Any]]] = {
    each.__name__: each for each in (repairs, restores, legacy, displacements, programs, noise, vandal, endure)
}

if __name__ == "__main__":
    print(json.dumps(_COMMANDS[sys.argv[1]](**json.loads(sys.argv[2]))))
