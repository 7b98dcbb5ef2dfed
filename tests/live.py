"""Asking a running daemon from within the test's own process: a millisecond a question, where nodewallctl takes fifty.

And neighbours: shell scripts of a known name, whose commands the daemon must tell apart from its own.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lab.daemon import Daemon
from lab.layout import FamilyName
from lab.node import TOOLS, Node
from lab.waiting import LabError, wait_for
from nodewalld.service import client

NEIGHBOUR = "neighbour"


def ask(daemon: Daemon, command: str) -> Any:
    """What the control socket answers."""
    return client.call(daemon.runtime_directory / "control.sock", {"command": command}, 10.0)


def events(daemon: Daemon, *kinds: str) -> list[dict[str, Any]]:
    """The history, oldest first; only these kinds, if any are named."""
    return [event for event in ask(daemon, "history") if not kinds or event["kind"] in kinds]


def last_time(daemon: Daemon) -> str:
    """When the newest event was; the history is a ring, so that counting its events would not do."""
    return str(ask(daemon, "history")[-1]["time"])


def wait_events(
    daemon: Daemon, good: Callable[[list[dict[str, Any]]], object], *kinds: str, since: str = "", what: str = ""
) -> list[dict[str, Any]]:
    """Wait until the events of these kinds that are newer than `since` satisfy `good`; return them."""
    seen: list[dict[str, Any]] = []

    def look() -> object:
        seen[:] = [event for event in events(daemon, *kinds) if event["time"] > since]
        return good(seen)

    try:
        wait_for(look, what=what or f"{' or '.join(kinds)} events in {daemon.name}")
    except LabError as error:
        told = "\n".join(event["message"] for event in events(daemon)[-10:])
        raise LabError(f"{error}\nthe last events:\n{told}") from None
    return seen


def in_force(daemon: Daemon) -> bool:
    """Whether `nodewallctl plan`, which reads the kernel by itself, finds nothing to do."""
    result = daemon.ctl("plan")
    assert result.returncode in (0, 3), result.stderr
    return result.returncode == 0


def wait_in_force(daemon: Daemon, *, timeout: float = 10.0) -> None:
    """Wait until everything is in force; a failure shows what the plan would still change, and the daemon's reasons."""
    try:
        wait_for(lambda: in_force(daemon), timeout=timeout, what="a plan without changes")
    except LabError as error:
        reasons = ask(daemon, "status")["reasons"]
        raise LabError(f"{error}\n{daemon.ctl('plan').stdout}\nreasons: {reasons}") from None


def asleep(daemon: Daemon) -> None:
    """Wait until it sleeps: one that is stopped in the middle of a pass would hold the xtables lock for ever."""

    def sleeps() -> bool:
        fields = Path(f"/proc/{daemon.pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0] == "S" and not Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split()

    wait_for(sleeps, what=f"{daemon.name} to sleep")


def at_rest(daemon: Daemon) -> None:
    """Wait until everything is in force and the daemon sleeps."""
    wait_in_force(daemon)
    asleep(daemon)


class Did(NamedTuple):
    """What a neighbour did: its own pid, those of its commands, and when it began (monotonic)."""

    pid: int
    commands: tuple[int, ...]
    began: float


def disturb(node: Node, commands: Sequence[str], *, check: bool = True) -> Did:
    """Run commands as the children of a script named "neighbour"; a failure ends it when `check` is on."""
    path = node.directory / NEIGHBOUR
    lines = ["#!/bin/sh", "echo $$"]
    for command in commands:
        lines += [f"{command} &", "echo $!", "wait $!" + (" || exit" if check else "")]
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o700)
    began = time.monotonic()
    told = node.run([str(path)], check=check).stdout.split()
    return Did(int(told[0]), tuple(map(int, told[1:])), began)


def our_rules(node: Node, table: str, chain: str, family: FamilyName) -> list[str]:
    """The texts of our rules in a foreign chain, as iptables prints them."""
    return [text for text in node.chain(table, chain, family) if "nodewalld:" in text]


def ours(node: Node) -> list[str]:
    """Everything of ours in either backend: rules, chains, sets."""
    found = []
    for backend in ("nft", "legacy"):
        for family in ("ipv4", "ipv6"):
            saved = node.rules(family, backend=backend).splitlines()
            found += [line for line in saved if "NODEWALL" in line or "nodewalld:" in line]
    return found + node.run(["ipset", "list", "-name"]).stdout.split()


def generation(node: Node) -> int:
    """The number of the last nf_tables transaction in the node."""
    code = "from nodewalld.kernel.nftables import NftablesReader; print(NftablesReader().generation())"
    return int(node.run([node.python(), "-c", code]).stdout)


class WriteLog:
    """Tells each commit of a daemon: its iptables-restore programs are found first in `path`, and note their calls."""

    def __init__(self, node: Node) -> None:
        folder = node.directory / "noting"
        folder.mkdir()
        self._log = folder / "log"
        for tool in TOOLS.values():
            for backend in ("nft", "legacy"):
                program = folder / f"{tool}-{backend}-restore"
                program.write_text(f'#!/bin/sh\necho "$0 $*" >> {self._log}\nexec /usr/sbin/{program.name} "$@"\n')
                program.chmod(0o755)
        self.env = {"PATH": f"{folder}:{node.environment()['PATH']}"}

    def __len__(self) -> int:
        return len(self._log.read_text().splitlines()) if self._log.exists() else 0
