"""Asking a running daemon from within the test's own process: a millisecond a question, where nodewallctl takes fifty.

And neighbours: shell scripts of a known name, whose commands the daemon must tell apart from its own.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lab.daemon import Daemon
from lab.node import FamilyName, LabError, Node, wait_for
from nodewalld.service import client

TOOLS = {"ipv4": "iptables", "ipv6": "ip6tables"}
NEIGHBOUR = "neighbour"


def ask(daemon: Daemon, command: str) -> Any:
    """What the control socket answers."""
    return client.call(daemon.runtime_directory / "control.sock", {"command": command}, 10.0)


def events(daemon: Daemon, *kinds: str) -> list[dict[str, Any]]:
    """The history, oldest first; only these kinds, if any are named."""
    return [event for event in ask(daemon, "history") if not kinds or event["kind"] in kinds]


def wait_events(
    daemon: Daemon, good: Callable[[list[dict[str, Any]]], object], *kinds: str, since: int = 0, what: str = ""
) -> list[dict[str, Any]]:
    """Wait until the events of these kinds, without the first `since`, satisfy `good`; return them."""
    seen: list[dict[str, Any]] = []

    def look() -> object:
        seen[:] = events(daemon, *kinds)[since:]
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
