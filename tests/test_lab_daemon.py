"""The keeper of a daemon tells the truth: tried against a stand-in that keeps to the contract."""

import time
from pathlib import Path

import pytest

from lab.daemon import Daemon
from lab.node import Node
from lab.waiting import LabError

pytestmark = pytest.mark.kernel

STAND_IN = """
import json, os, pathlib, signal, socket, sys
def folder(name): return pathlib.Path(sys.argv[sys.argv.index(name) + 1])
def notify(text):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s: s.sendto(text.encode(), os.environ["NOTIFY_SOCKET"])
def stop(*_): notify("STOPPING=1"); print("bye", flush=True); sys.exit(0)
signal.signal(signal.SIGTERM, stop)
text = (folder("--config") / "nodewalld.toml").read_text()
if text == "bad": sys.exit("line 1: bad")
notify("STATUS=Enforcing 3 rules on " + os.readlink("/etc/alternatives/iptables"))
(folder("--runtime-dir") / "status.json").write_text(json.dumps({"state": "enforcing"}))
notify("READY=1\\nWATCHDOG_USEC=" + os.environ.get("WATCHDOG_USEC", "")); print("hello", flush=True)
while True: signal.pause()
"""
STAND_IN_CTL = """
import pathlib, sys
def folder(name): return pathlib.Path(sys.argv[sys.argv.index(name) + 1])
if sys.argv[1] == "status": print((folder("--runtime-dir") / "status.json").read_text())
if sys.argv[1] == "history": print('{"kind": "repair"}\\n{"kind": "reload"}')
if sys.argv[1] == "reload": sys.exit((folder("--config") / "conf.d" / "10.toml").exists())
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> dict[str, str]:
    commands = tmp_path / "nodewalld" / "commands"
    commands.mkdir(parents=True)
    for name, text in (("daemon", STAND_IN), ("ctl", STAND_IN_CTL)):
        (commands / f"{name}.py").write_text(text)
    return {"PYTHONPATH": str(tmp_path)}


def test_a_daemon_is_started_watched_and_stopped(node: Node, stand_in: dict[str, str]) -> None:
    daemon = Daemon(node, "[daemon]\n", env=stand_in, watchdog=2).wait_ready()
    assert daemon.status_text == f"Enforcing 3 rules on /usr/sbin/iptables-{node.backend}"
    assert [notice.value for notice in daemon.noticed("WATCHDOG_USEC")] == ["2000000"]
    assert daemon.wait_status(state="enforcing") == {"state": "enforcing"}
    assert [event["kind"] for event in daemon.history()] == ["repair", "reload"]
    assert daemon.reload().returncode == 0
    assert daemon.reload({"nodewalld.toml": "", "conf.d/10.toml": "x"}).returncode == 1
    assert daemon.cpu_seconds() >= 0
    daemon.kill9()
    assert not daemon.running
    daemon.restart()
    assert daemon.stop() == 0
    assert daemon.noticed("STOPPING")
    assert daemon.log_text() == "hello\nhello\nbye\n"


def test_a_daemon_that_dies_is_told_at_once_with_its_last_words(node: Node, stand_in: dict[str, str]) -> None:
    started = time.monotonic()
    with pytest.raises(LabError, match=r"(?s)ended with 1.*line 1: bad"):
        Daemon(node, "bad", env=stand_in).wait_ready()
    assert time.monotonic() - started < 10


def test_daemons_run_side_by_side(node: Node, stand_in: dict[str, str]) -> None:
    one = Daemon(node, "", name="one", env=stand_in).wait_ready()
    other = Daemon(node, "", name="other", ns="pod1", env=stand_in).wait_ready()
    one.kill9()
    assert other.running
    assert other.status() == {"state": "enforcing"}
