"""What was begun ends: trials and pauses in this daemon or its successor; a broken boot falls back to what was good."""

from dataclasses import replace
from pathlib import Path

import pytest
from doubles import Clock

from lab import layout
from lab.daemon import Daemon
from lab.node import Node
from lab.traffic import Probe, Verdict, connect_all, serve_cluster
from lab.waiting import wait_for
from nodewalld.commands.daemon import REFUSED
from nodewalld.core.config import Sources
from nodewalld.core.lockout import Connection, parse_connection
from nodewalld.service.state import StateFolder
from nodewalld.service.tenure import Tenure, boot_id

SOURCES = Sources("/etc/nodewalld", {"/etc/nodewalld/nodewalld.toml": "[failsafe]\nports = []\n"}, {})
GUARDED = '[[port]]\nname = "a"\nports = [31002]\nallow = ["10.90.0.7", "fd90::7"]\n'
SHUTS_SSH = f'[failsafe]\nports = []\n{GUARDED}[[port]]\nname = "ssh"\nports = [22]\n'


@pytest.fixture
def clock() -> Clock:
    return Clock()


def tenure(folder: Path, clock: Clock, boot: str = "boot-1") -> Tenure:
    return Tenure(StateFolder(folder), clock=clock, boot=lambda: boot)


def test_a_trial_is_known_to_the_next_daemon_until_its_time_is_over(tmp_path: Path, clock: Clock) -> None:
    assert tenure(tmp_path, clock).begin_trial(SOURCES, 60.0) == 1060.0
    trial = tenure(tmp_path, clock).trial
    assert trial is not None
    assert (trial.sources, trial.until) == (SOURCES, 1060.0)


def test_a_reboot_ends_a_trial_and_a_pause(tmp_path: Path, clock: Clock) -> None:
    before = tenure(tmp_path, clock)
    before.begin_trial(SOURCES, 60.0)
    before.begin_pause(60.0)
    clock.now = 5.0
    after = tenure(tmp_path, clock, "boot-2")
    assert after.trial is not None
    assert after.trial.until < clock.now
    assert after.pause is None


def test_an_unconfirmed_trial_is_remembered_by_its_content(tmp_path: Path, clock: Clock) -> None:
    first = tenure(tmp_path, clock)
    first.begin_trial(SOURCES, 60.0)
    first.end_trial(confirmed=False)
    after = tenure(tmp_path, clock)
    assert after.trial is None
    assert after.is_unconfirmed(SOURCES)
    assert after.is_unconfirmed(replace(SOURCES, sets={"/followed": "whatever is tried\n"}))
    assert not after.is_unconfirmed(Sources("/etc/nodewalld", {}, {}))
    after.forgive()
    assert not after.is_unconfirmed(SOURCES)


def test_damaged_state_counts_as_none(tmp_path: Path, clock: Clock) -> None:
    kept = tenure(tmp_path, clock)
    kept.begin_trial(SOURCES, 60.0)
    kept.enforced(SOURCES)
    for file in tmp_path.iterdir():
        file.write_text('{"sources": {"directory": 3}, "until": "soon"}')
    assert (kept.trial, kept.good, kept.pause) == (None, None, None)


def test_nothing_is_begun_that_the_disk_does_not_take(tmp_path: Path, clock: Clock) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert tenure(blocked, clock).begin_trial(SOURCES, 60.0) is None
    assert tenure(blocked, clock).begin_pause(60.0) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("203.0.113.7 51234 10.90.0.1 22", Connection("203.0.113.7", "10.90.0.1", 22)),
        ("fe80::7%eth0 51234 fe80::1%eth0 22", Connection("fe80::7", "fe80::1", 22)),
        ("", None),
        ("203.0.113.7 51234 10.90.0.1", None),
        ("here 51234 there 22", None),
        ("203.0.113.7 51234 10.90.0.1 ssh", None),
    ],
)
def test_ssh_connections_are_read_as_sshd_writes_them(text: str, expected: Connection | None) -> None:
    assert parse_connection(text) == expected


pytestmark = pytest.mark.kernel


@pytest.fixture
def guarded(node: Node) -> Daemon:
    serve_cluster(node)
    return Daemon(node, GUARDED).wait_ready()


def rules(node: Node) -> list[str]:
    """All rules, without the times at which they were printed, and without counters."""
    saved = node.rules("ipv4") + node.rules("ipv6")
    return [line.partition(" [")[0] for line in saved.splitlines() if not line.startswith("#")]


def folder(node: Node, text: str) -> str:
    made = node.directory / "candidate"
    made.mkdir(exist_ok=True)
    (made / "nodewalld.toml").write_text(text)
    return str(made)


def ssh(node: Node) -> set[Verdict]:
    """What a stranger meets at port 22, over both families."""
    probes = [
        Probe("client", (layout.NODE.of(f), 22), source=layout.STRANGER.of(f), protocol="tcp") for f in layout.FAMILIES
    ]
    return {answer.verdict for answer in connect_all(node, probes)}


def test_a_trial_that_shuts_the_way_in_goes_back_by_itself(node: Node, guarded: Daemon) -> None:
    assert ssh(node) == {Verdict.OPEN}
    assert guarded.ctl("try", folder(node, SHUTS_SSH), "--timeout", "10s").returncode == 0
    assert ssh(node) == {Verdict.TIMEOUT}
    wait_for(lambda: ssh(node) == {Verdict.OPEN}, timeout=60, what="the way in to open again")
    wait_for(lambda: guarded.status()["note"] is None, what="the status to forget the trial")


def test_a_trial_goes_back_although_the_daemon_was_killed(node: Node, guarded: Daemon) -> None:
    assert guarded.ctl("try", folder(node, SHUTS_SSH), "--timeout", "10s").returncode == 0
    guarded.kill9()
    assert ssh(node) == {Verdict.TIMEOUT}
    guarded.restart()
    wait_for(lambda: ssh(node) == {Verdict.OPEN}, timeout=60, what="the way in to open again")


def test_try_refuses_to_shut_the_connection_that_it_is_typed_through(node: Node, guarded: Daemon) -> None:
    env = {"SSH_CONNECTION": f"{layout.STRANGER.ipv4} 40000 {layout.NODE.ipv4} 22"}
    refused = guarded.ctl("try", folder(node, SHUTS_SSH), "--timeout", "60s", env=env)
    assert refused.returncode == 1
    assert "port.ssh: would refuse your connection from 203.0.113.7" in refused.stderr
    assert ssh(node) == {Verdict.OPEN}
    assert guarded.ctl("try", folder(node, SHUTS_SSH), "--timeout", "60s", "--yes", env=env).returncode == 0
    assert guarded.ctl("revert").returncode == 0
    assert ssh(node) == {Verdict.OPEN}


def test_reload_says_when_it_shuts_the_connection_that_it_is_typed_through(node: Node, guarded: Daemon) -> None:
    env = {"SSH_CONNECTION": f"{layout.STRANGER.ipv4} 40000 {layout.NODE.ipv4} 22"}
    guarded.configure(SHUTS_SSH)
    taken = guarded.ctl("reload", env=env)
    assert taken.returncode == 0
    assert "port.ssh: would refuse your connection" in taken.stderr


def test_a_confirmed_trial_stays(node: Node, guarded: Daemon) -> None:
    assert guarded.ctl("try", folder(node, SHUTS_SSH), "--timeout", "60s").returncode == 0
    assert guarded.ctl("confirm").returncode == 0
    assert guarded.status()["note"] is None
    assert ssh(node) == {Verdict.TIMEOUT}
    assert guarded.ctl("confirm").returncode == 1


def test_what_was_tried_in_place_and_not_confirmed_does_not_come_back_with_a_restart(
    node: Node, guarded: Daemon
) -> None:
    guarded.configure(SHUTS_SSH)
    assert guarded.ctl("try", "--timeout", "60s").returncode == 0
    assert guarded.ctl("revert").returncode == 0
    guarded.kill9()
    guarded.restart()
    guarded.wait_ready()
    assert ssh(node) == {Verdict.OPEN}
    status = guarded.status()
    assert status["state"] == "degraded"
    assert "tried and not confirmed" in status["reasons"][0]
    assert guarded.ctl("reload").returncode == 0
    assert ssh(node) == {Verdict.TIMEOUT}
    assert guarded.status()["state"] == "enforcing"


def test_a_pause_survives_a_crash_and_ends_by_itself(node: Node, guarded: Daemon) -> None:
    assert guarded.ctl("pause", "--for", "10s").returncode == 0
    guarded.kill9()
    guarded.restart()
    assert guarded.status()["state"] == "paused"
    assert "NODEWALL" not in node.rules()
    guarded.wait_status(state="enforcing")
    assert "NODEWALL" in node.rules()


def test_a_broken_boot_enforces_the_last_good_configuration_and_says_so(node: Node, guarded: Daemon) -> None:
    before = rules(node)
    guarded.stop()
    guarded.configure('[[port]]\nname = "a"\nports = [99999]\n')
    guarded.restart()
    guarded.wait_ready()
    status = guarded.status()
    assert status["state"] == "degraded"
    assert "nodewalld.toml:3" in status["reasons"][0]
    assert "last good configuration" in status["reasons"][0]
    assert rules(node) == before


def test_without_any_good_configuration_nothing_is_changed_and_the_start_fails(node: Node) -> None:
    before = rules(node)
    daemon = Daemon(node, '[[port]]\nname = "a"\nports = [99999]\n')
    assert daemon.wait() == REFUSED
    assert "nodewalld.toml:3" in daemon.log_text()
    assert rules(node) == before


def test_a_container_that_boots_again_on_the_same_kernel_counts_as_another_boot(tmp_path: Path) -> None:
    """Its first process is another one; names may hold spaces and parentheses."""
    (tmp_path / "sys/kernel/random").mkdir(parents=True)
    (tmp_path / "sys/kernel/random/boot_id").write_text("a6d61e12\n")
    (tmp_path / "1").mkdir()
    found = []
    for name, began in (("systemd", 7), ("in) it", 7), ("systemd", 4711)):
        (tmp_path / "1/stat").write_text(f"1 ({name}) S 0 {'1 ' * 17}{began} 2 3\n")
        found.append(boot_id(tmp_path))
    assert found == ["a6d61e12/7", "a6d61e12/7", "a6d61e12/4711"]
    (tmp_path / "1/stat").unlink()
    assert boot_id(tmp_path) == "", "and every start counts as one, where neither can be told"
