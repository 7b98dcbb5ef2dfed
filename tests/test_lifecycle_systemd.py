"""What systemd is told, and when: ready only when the rules are in force, alive only while the daemon turns."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from live import (
    ask,
    at_rest,
    events,
    generation,
    in_force,
    wait_in_force,
)
from test_lifecycle import CAPTURE, CONFIG

from lab.daemon import Daemon
from lab.node import TOOLS, Node
from lab.processes import kill_entered
from lab.waiting import wait_for

pytestmark = pytest.mark.kernel


def test_ready_comes_only_when_the_rules_are_in_force(laboratory: None) -> None:
    with Node("legacy") as node:
        node.load(CAPTURE)
        with xtables_lock(node) as release, Daemon(node, CONFIG, watchdog=0.9) as daemon:
            # It lives, answers, and is fed; but nothing can be written yet.
            first = daemon.wait_notice("WATCHDOG")
            daemon.wait_notice("WATCHDOG", after=first.when + 0.3)
            wait_for((daemon.runtime_directory / "control.sock").exists)
            assert ask(daemon, "status")["state"] == "starting"
            result = daemon.ctl("status")
            assert (result.returncode, "starting" in result.stdout) == (3, True)
            assert daemon.noticed("READY") == []
            assert "NODEWALL" not in "".join(rules_without_lock(node))
            release()
            daemon.wait_ready(timeout=5)
            assert in_force(daemon)
            assert "in force" in daemon.status_text


def test_ready_follows_what_it_promises_on_nft_as_well(laboratory: None) -> None:
    with Node("nft") as node:
        node.load(CAPTURE)
        with Daemon(node, CONFIG) as daemon:
            daemon.wait_ready()
            moved = generation(node)
            assert in_force(daemon)
            assert generation(node) == moved
            assert "in force" in daemon.status_text


def test_the_watchdog_is_fed_by_a_daemon_that_turns_and_by_no_other(node: Node) -> None:
    with Daemon(node, CONFIG, watchdog=0.6) as daemon:
        daemon.wait_ready()
        begun = time.monotonic()
        while time.monotonic() < begun + 0.8:
            before = daemon.noticed("WATCHDOG")[-1].when if daemon.noticed("WATCHDOG") else begun
            assert daemon.wait_notice("WATCHDOG", after=before).when - before < 0.6
        at_rest(daemon)
        daemon.signal(signal.SIGSTOP)
        stopped = time.monotonic()
        wait_for(lambda: time.monotonic() > stopped + 1.0)
        assert [notice for notice in daemon.noticed("WATCHDOG") if notice.when > stopped + 0.2] == []
        daemon.signal(signal.SIGCONT)
        daemon.wait_notice("WATCHDOG", after=time.monotonic())


@pytest.mark.slow
def test_a_lock_that_others_hold_is_waited_for_told_and_forgotten(laboratory: None) -> None:
    with Node("legacy") as node, Node("legacy") as starting_node:
        node.load(CAPTURE)
        with (
            Daemon(node, CONFIG, watchdog=2) as daemon,
            xtables_lock(starting_node) as release_the_other,
            Daemon(starting_node, CONFIG, watchdog=2) as starting,
        ):
            daemon.wait_ready()
            with xtables_lock(node) as release:
                # The lock is no obstacle for who brings a lock of its own.
                node.run("XTABLES_LOCKFILE=/run/own.lock iptables -t mangle -F PREROUTING")
                waiting = time.monotonic()
                degraded = wait_for(
                    lambda: (s := ask(daemon, "status"))["state"] == "degraded" and s, timeout=25, what="a reason"
                )
                assert "xtables.lock" in " ".join(degraded["reasons"])
                assert "xtables.lock" in daemon.status_text
                fed = [notice.when for notice in daemon.noticed("WATCHDOG") if notice.when > waiting]
                assert max(b - a for a, b in zip([waiting, *fed], fed, strict=False)) < 2
                release()
            wait_for(lambda: ask(daemon, "status")["state"] == "enforcing", timeout=15, what="recovery")
            wait_in_force(daemon)
            assert daemon.running
            assert [e["chain"] for e in events(daemon, "repair")] == ["PREROUTING"]
            assert events(daemon, "recovered")
            # One that starts gives up waiting as well, says so, and is not ready before it has been let in.
            told = wait_for(lambda: (s := ask(starting, "status"))["reasons"] and s, timeout=15, what="a reason")
            assert (told["state"], "xtables.lock" in " ".join(told["reasons"])) == ("starting", True)
            assert starting.noticed("READY") == []
            release_the_other()
            starting.wait_ready(timeout=20)
            assert in_force(starting)


@contextmanager
def xtables_lock(node: Node) -> Iterator:
    """Hold the node's xtables lock as an iptables tool would; yields what lets go of it."""
    holder = node.popen("exec 9>/run/xtables.lock; flock 9; echo held; exec sleep 1000", stdout=-1)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    try:
        yield lambda: (kill_entered(holder), holder.wait(10))
    finally:
        kill_entered(holder)


def rules_without_lock(node: Node) -> list[str]:
    return [node.run(f"XTABLES_LOCKFILE=/run/own.lock {tool}-legacy-save").stdout for tool in TOOLS.values()]
