"""Real programs that write rules, as units of one machine: restarted, they disturb; the journal says who, how long."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from booted import Machine, wait_for
from guarded import OPEN, UNIT, flood, guard, passed, rules

SECOND = 1_000_000
TIMES = 3


@pytest.fixture
def beside(installed: Callable[[str], list[Path]], boot: Callable[[list[Path]], Machine]) -> Machine:
    """A machine with nodewalld, dockerd and firewalld, all of them started by its boot."""
    machine = boot(installed("neighbours"))
    for unit in ("docker", "firewalld"):
        assert machine.property(unit, "SubState") == "running"
    # Who is not refused by nodewalld gets in: what is seen here is nodewalld's doing.
    machine.run("firewall-cmd -q --set-default-zone=trusted")
    machine.add_peer()
    return machine


def restart(machine: Machine, unit: str) -> list[dict[str, Any]]:
    """Restart a unit; what nodewalld told of it, after its rules were in force again and stayed so."""
    before = ours(machine)
    began = f"@{time.time():.6f}"
    machine.run(
        f"systemctl reset-failed {unit}; systemctl restart {unit}"
    )  # Debian's docker may start three times a minute
    settled = time.monotonic()

    def quiet() -> bool:
        nonlocal settled
        if ours(machine) != before or machine.run("nodewallctl status", check=False).returncode:
            settled = time.monotonic()
        return time.monotonic() - settled > 1.2

    wait_for(quiet, 15, "its rules")
    return machine.journal(f"-u {UNIT} NODEWALLD_KIND=repair --since {began}")


def ours(machine: Machine) -> list[str]:
    return [rule for rule in rules(machine) if "NODEWALL" in rule]


def by(told: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """What is told of a program that was seen at the work."""
    return [entry for entry in told if name in entry.get("NODEWALLD_BY_PARENTS", "")]


def history(machine: Machine) -> list[dict[str, Any]]:
    """The repairs, oldest first."""
    events = map(json.loads, machine.run("nodewallctl history --json -n 1000").stdout.splitlines())
    return [event for event in events if event["kind"] == "repair"]


def first(machine: Machine, chain: str) -> str:
    return machine.run(f"iptables -S {chain} 1").stdout


def test_dockerd_puts_itself_on_top_and_is_named_and_our_ports_stay_shut(beside: Machine) -> None:
    """Without firewalld, through which it would write its rules."""
    beside.run("systemctl disable -q --now firewalld; systemctl restart docker")
    guard(beside)
    assert "NODEWALL" in first(beside, "FORWARD")
    with flood(beside) as counts:
        for _ in range(TIMES):
            told = restart(beside, "docker")
            seen = by(told, "dockerd (")
            if seen:
                break
    assert "NODEWALL" in first(beside, "FORWARD")
    assert "DOCKER-USER" in beside.run("iptables -S FORWARD").stdout
    assert passed(counts()) == 0
    # iptables may be gone before its parents are looked up: then they are left out, and none is made up.
    assert seen, told
    assert seen == [entry for entry in told if "NODEWALLD_BY_PARENTS" in entry]
    for entry in seen:
        assert entry["NODEWALLD_BY_COMM"].startswith("iptables")
        assert entry["NODEWALLD_BY_NAME"] == "dockerd"
        assert (entry["NODEWALLD_TABLE"], entry["NODEWALLD_CHAIN"]) == ("filter", "FORWARD")
        assert 0 < int(entry["NODEWALLD_EXPOSED_USEC"]) < SECOND
    print("dockerd:", [int(entry["NODEWALLD_EXPOSED_USEC"]) / 1000 for entry in seen], "ms")


def test_firewalld_flushes_everything_and_is_named(beside: Machine) -> None:
    """With dockerd, which then writes its own anew."""
    guard(beside)
    with flood(beside) as counts:
        told = restart(beside, "firewalld")
        sent = counts()[str(OPEN)]
        wait_for(lambda: counts()[str(OPEN)] > sent + 500, what="half a second of the flood")
    seen = by(told, "firewalld (")
    # In the journal what comes after a dozen repairs is told in sum; the history has them all.
    repairs = [event for event in history(beside) if (event.get("by") or {}).get("name") == "firewalld"]
    assert len({event["table"] for event in repairs}) >= 3
    assert {event["reason"] for event in repairs} >= {"flushed", "missing"}
    assert all(entry["NODEWALLD_BY_NAME"] == "firewalld" for entry in seen)
    exposed = [int(entry["NODEWALLD_EXPOSED_USEC"]) for entry in seen if "NODEWALLD_EXPOSED_USEC" in entry]
    assert 0 < max(exposed) < SECOND
    assert passed(counts()) == 0  # the shield is nobody's to delete
    print("firewalld:", max(exposed) / 1000, "ms")
