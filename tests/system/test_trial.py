"""A trial that shuts the caller's own way in ends by itself: packets prove it, whatever dies meanwhile."""

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from booted import HOST, Machine, wait_for
from guarded import DROPPED, UNIT, guard, main_pid, probe, rules, wait_until_back
from session import SCRIPT, WAY_IN, Session

SHUT = """
[failsafe]
ports = []

[[port]]
name = "way-in"
ports = [22]
"""
NEW = "/root/new"
LASTS = 3.0
LONG = 8.0  # where the daemon must be back before it is over, on a slow machine as well
LATE = 1.0


@pytest.fixture
def guarded(bookworm: Machine) -> Machine:
    """A machine in use: guarded, with a way in, and a folder that would shut it."""
    join_the_network(bookworm)
    guard(bookworm)
    bookworm.path(NEW).mkdir()
    bookworm.path(f"{NEW}/nodewalld.toml").write_text(SHUT)
    assert way_in(bookworm) == {"open"}
    return bookworm


def join_the_network(machine: Machine) -> None:
    """As after each boot: a peer, and a shell for whoever connects."""
    machine.add_peer()
    machine.run(f"systemd-run -q --unit=way-in /usr/bin/python3 {machine.put(SCRIPT)} serve {WAY_IN}")
    wait_for(lambda: way_in(machine) == {"open"}, what="the way in")


def way_in(machine: Machine) -> set[str]:
    """What becomes of new connections, in both families."""
    return {probe(machine, address, WAY_IN) for address in HOST.values()}


def connect(machine: Machine) -> Session:
    """A shell on the machine, from the peer."""
    return Session(machine.entered("ip", "netns", "exec", "peer"), f"/root/{SCRIPT.name}", HOST["ipv4"])


@contextmanager
def session(machine: Machine) -> Iterator[Session]:
    """The same, once it answers."""
    with connect(machine) as shell:
        assert shell.say("true") == "0\n"
        yield shell


def begin(shell: Session, folder: str, lasts: float) -> float:
    """Try what shuts the shell that asks for it; when that was."""
    began = time.monotonic()
    told = shell.say(f"nodewallctl try {folder} --timeout {lasts:.0f}s --yes") or ""
    assert "would refuse your connection" in told
    assert "come back by themselves" in told  # the last that it hears: replies pass, nothing more gets in
    assert shell.say("echo anybody there", 0.5) is None
    return began


def in_force(machine: Machine) -> list[str]:
    """The rules without the random seeds of sets, which are made anew."""
    return [re.sub(" initval .*", "", rule) for rule in rules(machine)]


def last_told(machine: Machine) -> str:
    told = machine.journal(f"-u {UNIT} NODEWALLD_KIND=reload")[-1]["MESSAGE"]
    assert isinstance(told, str)
    return told


def test_it_is_refused_in_words_and_with_yes_it_comes_back_by_itself(guarded: Machine) -> None:
    before = in_force(guarded)
    with session(guarded) as shell:
        refused = shell.say(f"nodewallctl try {NEW} --timeout {LASTS:.0f}s")
        assert refused is not None
        assert refused.endswith("\n1\n")
        assert f"{NEW}/nodewalld.toml:5: port.way-in: would refuse your connection from 10.99.0.2" in refused
        assert (way_in(guarded), in_force(guarded)) == ({"open"}, before)

        began = begin(shell, NEW, LASTS)
        assert way_in(guarded) == {"silent"}
        assert in_force(guarded) != before
        wait_for(lambda: way_in(guarded) == {"open"}, LASTS + LATE, "the way in")
        took = time.monotonic() - began
        assert LASTS <= took < LASTS + LATE
        # The very connection lives on: what was typed meanwhile arrives.
        answer = shell.say("echo still here", 10)
        assert answer is not None
        assert "still here" in answer
    wait_for(lambda: in_force(guarded) == before, LATE, "all the rest")
    assert "not confirmed in time" in last_told(guarded)


def test_confirmed_from_a_second_connection_it_stays(guarded: Machine) -> None:
    """The caller's address is let in, and nobody else's: the new connection is the proof that a person waits for."""
    narrow = SHUT + f'allow = ["{HOST["ipv4"][:-1]}2"]\n'
    guarded.path(f"{NEW}/nodewalld.toml").write_text(narrow)
    with session(guarded) as shell:
        begun = shell.say(f"nodewallctl try {NEW} --timeout {LASTS:.0f}s")
        assert begun is not None
        assert begun.endswith("\n0\n"), begun
    with session(guarded) as second:
        assert (second.say("nodewallctl confirm") or "").endswith("\n0\n")
    time.sleep(LASTS + 0.2)
    assert [probe(guarded, address, WAY_IN) for address in HOST.values()] == ["open", "silent"]


def test_the_daemon_and_the_shell_may_be_killed_meanwhile(guarded: Machine) -> None:
    before, pid = in_force(guarded), main_pid(guarded)
    with session(guarded) as shell:
        began = begin(shell, NEW, LONG)
    guarded.run(f"kill -9 {pid}; systemctl kill -s KILL way-in; systemctl reset-failed way-in")
    guarded.run(f"systemd-run -q --unit=way-in-again /usr/bin/python3 /root/{SCRIPT.name} serve {WAY_IN}")
    wait_until_back(guarded, pid, 3)
    assert way_in(guarded) == {"silent"}, "its successor goes on with the trial"
    assert "on trial" in guarded.property(UNIT, "StatusText")
    wait_for(lambda: way_in(guarded) == {"open"}, LONG + LATE, "the way in")
    assert LONG <= time.monotonic() - began < LONG + LATE
    wait_for(lambda: in_force(guarded) == before, LATE, "all the rest")


@pytest.mark.parametrize(("how", "folder"), [("power", NEW), ("orderly", "/etc/nodewalld")])
def test_the_machine_may_be_rebooted_meanwhile(guarded: Machine, folder: str, how: str) -> None:
    """Also when what was tried lies where the daemon looks at its start: it was not confirmed, so it is not taken."""
    good = guarded.path("/etc/nodewalld/nodewalld.toml").read_text()
    guarded.path(f"{folder}/nodewalld.toml").write_text(SHUT)
    with session(guarded) as shell:
        begin(shell, folder, 3600)
    assert way_in(guarded) == {"silent"}
    boot = guarded.run("cat /proc/sys/kernel/random/boot_id").stdout
    if how == "orderly":
        guarded.power_off()
    guarded.stop()
    guarded.boot()
    assert guarded.run("cat /proc/sys/kernel/random/boot_id").stdout != boot
    join_the_network(guarded)
    assert any(str(DROPPED) in rule for rule in rules(guarded))
    assert not any("way-in" in rule for rule in rules(guarded))
    status = json.loads(guarded.run("nodewallctl status --json", check=False).stdout)
    if folder == NEW:
        assert (status["state"], status["reasons"]) == ("enforcing", [])
    else:
        assert status["state"] == "degraded"
        assert "was tried and not confirmed" in status["reasons"][0]
        guarded.path("/etc/nodewalld/nodewalld.toml").write_text(good)
        guarded.run(f"systemctl reload {UNIT}; nodewallctl status")
