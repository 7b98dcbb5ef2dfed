"""A folder that is full, read-only or damaged costs only what must be kept in it."""

import json
import os
import time
from collections.abc import Callable, Iterator

import pytest
from live import ask, last_time, wait_events
from test_degraded import CONFIG, HEAD, PLAIN, REDIRECT, heals, held, names, standing, told

from lab.daemon import Daemon
from lab.node import Node
from lab.waiting import wait_for

pytestmark = pytest.mark.kernel

# --- a state folder that is full, read-only or damaged


@pytest.fixture
def daemon(node: Node) -> Iterator[Daemon]:
    with Daemon(node, CONFIG, start=False) as made:
        yield made


def fill(daemon: Daemon) -> None:
    folder = daemon.state_directory
    daemon.node.run(f"mount -t tmpfs -o size=64k,mode=700 full {folder}; cat /dev/zero > {folder}/zeros", check=False)


def make_readonly(daemon: Daemon) -> None:
    folder = daemon.state_directory
    daemon.node.run(f"mount --bind {folder} {folder}; mount -o remount,bind,ro {folder}")


def repaired(daemon: Daemon) -> None:
    """Harm is put right, again and again, and whatever is written anew is learned anew."""
    before = standing(daemon.node)
    for _ in range(3):
        for harm in ("-F PREROUTING", "-F NODEWALL-gate-INPUT"):
            since = last_time(daemon)
            daemon.node.run(f"iptables -w -t mangle {harm}")
            wait_events(daemon, bool, "repair", since=since)
            wait_for(lambda: held(daemon) and standing(daemon.node) == before, what="the repair")


@pytest.mark.parametrize(("harm", "why"), [(fill, "No space left on device"), (make_readonly, "Read-only file system")])
def test_without_a_disk_the_rules_are_held_and_only_promises_for_later_are_refused(
    daemon: Daemon, harm: Callable[[Daemon], None], why: str
) -> None:
    harm(daemon)
    daemon.start()
    daemon.wait_ready()
    told(daemon, f"can't be written: {why}")
    assert held(daemon)
    repaired(daemon)
    candidate = daemon.node.directory / "candidate"
    candidate.mkdir()
    (candidate / "nodewalld.toml").write_text(CONFIG + REDIRECT)
    for command in (["try", str(candidate)], ["pause", "--for", "1m"]):
        refused = daemon.ctl(*command)
        assert refused.returncode == 1
        assert "could not be written to the state folder" in refused.stderr
        assert held(daemon)
    assert daemon.reload(CONFIG + REDIRECT).returncode == 0
    # A set that goes with a reload is known as ours, though no disk says so.
    assert daemon.reload(HEAD + PLAIN).returncode == 0
    assert daemon.node.run("ipset list -name").stdout.split() == []
    assert daemon.reload(CONFIG).returncode == 0
    lines = [line for line in daemon.log_text().splitlines() if line.startswith("error: The state in")]
    assert len(lines) == 2, lines  # the first refusal, and the reason why it is degraded
    daemon.restart()
    assert held(daemon)
    assert ask(daemon, "status")["state"] == "degraded"
    daemon.node.run(f"umount {daemon.state_directory}")
    heals(daemon)
    kept = names(daemon.state_directory)
    assert kept == ["backend.json", "last-good.json", "owned.json", "prints.json", "shield.json"]
    assert daemon.ctl("pause", "--for", "1m").returncode == 0


STATE = ("prints", "owned", "backend", "last-good", "trial", "pause", "unconfirmed", "shield", "neighbours")
WRONG = {
    "truncated": '{"sets": ["fri',
    "binary": b"\xff\0\xfe",
    "numbers": '{"backend": 1, "sets": 2, "chains": 3, "until": "4", "boot": 5, "sources": 6, "digest": 7, "nft": 8}',
    "lists": '{"backend": [], "sets": [[]], "chains": [[]], "until": [], "boot": [], "sources": [], "nft": [], '
    '"legacy": []}',
    "objects": '{"backend": {}, "sets": {}, "chains": {}, "sources": {"directory": "/", "texts": {"a": 1}, "sets": {}},'
    ' "nft": {"ipv4": {"mangle": {"x": {}}}}, "legacy": {"ipv4": {"mangle": {"x": [1, [2]]}}}, "digest": {}}',
    "texts": '{"sets": ["\\ud800", "a b", "' + "x" * 99 + '"], "sources": {"directory": "\\u0000", '
    '"texts": {"/x": "\\ud800 = [["}, "sets": {}}, "boot": "BOOT", "until": 1e99, "backend": "\\ud800"}',
    "endless": '{"boot": "BOOT", "until": Infinity, "sources": {"directory": "/x", "texts": {}, "sets": {}}}',
    "no number": '{"boot": "BOOT", "until": NaN, "sources": {"directory": "/x", "texts": {}, "sets": {}}}',
    "huge": '{"boot": "BOOT", "until": ' + "9" * 400 + "}",
    "bad trial": '{"boot": "BOOT", "until": SOON, "sources": {"directory": "/x", "texts": {"/x/nodewalld.toml": "[["}, '
    '"sets": {}}}',
}


def boot_of(daemon: Daemon) -> str:
    """The boot's id as a daemon in the node sees it."""
    code = "from nodewalld.service.tenure import boot_id; print(boot_id())"
    return daemon.node.run([daemon.node.python(), "-c", code]).stdout.strip()


def damage(daemon: Daemon, how: str, boot: str) -> None:
    soon = str(time.clock_gettime(time.CLOCK_BOOTTIME) + 3600)
    for name in STATE:
        path = daemon.state_directory / f"{name}.json"
        path.unlink(missing_ok=True)
        if how == "folder":
            path.mkdir()
        elif how == "fifo":
            os.mkfifo(path)
            os.mkfifo(path.with_name(f".{path.name}.new"))
        else:
            content = WRONG[how]
            if isinstance(content, str):
                content = content.replace("BOOT", boot).replace("SOON", soon).encode()
            path.write_bytes(content)
            if how == "bad trial" and name == "pause":
                path.unlink()  # as a pause it would be a good one


def repair_state(daemon: Daemon) -> None:
    for path in daemon.state_directory.iterdir():
        if path.is_dir():
            path.rmdir()


def test_damaged_state_counts_as_none_and_the_rules_stay(daemon: Daemon) -> None:
    daemon.start()
    daemon.wait_ready()
    plain, boot = standing(daemon.node), boot_of(daemon)
    for how in (*WRONG, "fifo", "folder"):
        daemon.stop()
        damage(daemon, how, boot)
        daemon.start()
        daemon.wait_ready(timeout=10)
        status = ask(daemon, "status")
        assert (how, status["state"]) == (how, "degraded" if how == "folder" else "enforcing"), status["reasons"]
        assert status["note"] is None
        assert standing(daemon.node) == plain, how
        planned = json.loads(daemon.ctl("plan", "--json").stdout)["changes"]  # warnings go elsewhere
        assert how == "folder" or planned == [], how
        assert "Traceback" not in daemon.log_text(), how
    told(daemon, "Is a directory (backend.json, last-good.json, owned.json, prints.json, shield.json)")
    assert daemon.log_text().count("last-good.json is damaged") == 2  # truncated, binary
    assert "it is no regular file" in daemon.log_text()
    repaired(daemon)
    assert daemon.log_text().count("prints.json can't be read: it is no regular file") == 2  # fifo, folder
    repair_state(daemon)
    heals(daemon)
    assert json.loads((daemon.state_directory / "owned.json").read_text())["sets"] == ["friends", "friends-v6"]


def test_state_that_only_looks_strange_is_believed(daemon: Daemon) -> None:
    """The damage above differs from this by nothing but the damage."""
    until = time.clock_gettime(time.CLOCK_BOOTTIME) + 3600
    stored = {"boot": boot_of(daemon), "until": until, "more": [{}]}
    (daemon.state_directory / "pause.json").write_text(json.dumps(stored))
    daemon.start()
    daemon.wait_ready()
    assert ask(daemon, "status")["state"] == "paused"
    assert daemon.ctl("resume").returncode == 0
    assert held(daemon)


def test_a_damaged_last_good_configuration_is_no_good_one(daemon: Daemon) -> None:
    (daemon.state_directory / "last-good.json").write_text(
        '{"time": "then", "sources": {"directory": "/x", "texts": {"/x/nodewalld.toml": "[["}, "sets": {}}}'
    )
    daemon.configure("[[port\n")
    daemon.start()
    assert daemon.wait() == 78
    assert f"{daemon.config_directory}/nodewalld.toml:1" in daemon.log_text()
    assert "of no use any more: /x/nodewalld.toml:1" in daemon.log_text()
    assert "Traceback" not in daemon.log_text()


# --- a runtime folder that is full


def test_a_full_runtime_folder_does_not_stop_it(daemon: Daemon) -> None:
    folder = daemon.runtime_directory
    daemon.node.run(f"mount -t tmpfs -o size=4k,mode=700 full {folder}; cat /dev/zero > {folder}/zeros", check=False)
    daemon.start()
    daemon.wait_ready()
    assert daemon.ctl("status").returncode == 0


@pytest.mark.parametrize("inodes", [2, 3])
def test_a_runtime_folder_that_takes_no_file_ends_it_with_a_sentence(daemon: Daemon, inodes: int) -> None:
    before = daemon.node.rules()
    options = f"nr_inodes={inodes},mode=700"
    daemon.node.run(f"mount -t tmpfs -o {options} full {daemon.runtime_directory}; touch {daemon.runtime_directory}/a")
    daemon.start()
    assert daemon.wait() == 1
    last = daemon.log_text().splitlines()[-1]
    assert last.startswith(f"nodewalld: {daemon.runtime_directory}/")
    assert last.endswith("No space left on device")
    assert ("control socket" in last) == (inodes == 3)
    assert "Traceback" not in daemon.log_text()
    assert [x for x in daemon.node.rules().splitlines() if "NODEWALL" in x] == []
    assert before.count("NODEWALL") == 0
