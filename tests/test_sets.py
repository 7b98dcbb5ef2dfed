"""The content of sets while the daemon runs, with packets: files are followed, entries are added and taken out.

One node and one daemon serve the tests; what a test changes it puts back.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from live import ask, events, last_time, ours, wait_events
from packets import Guarded, both, dial, verdicts

from lab.daemon import Daemon
from lab.flood import Flood
from lab.layout import ALLOWED, BEYOND, FAMILIES, NODE, STRANGER, STRANGER_2
from lab.node import Node
from lab.traffic import Connection, Verdict, serve
from lab.waiting import wait_for
from nodewalld.service import client
from nodewalld.service.wire import Refused

pytestmark = pytest.mark.kernel

PORT, RELAY = 8200, 8300
OPEN, SHUT, MIXED = "open", "shut", "mixed"
RUN_TIME = [STRANGER.ipv4, STRANGER.ipv6]


def office(*files: Path, more: str = "") -> str:
    return f"""
[daemon]
resync = "1h"

[set.office]
entries = {both(ALLOWED)}
files = {json.dumps([str(file) for file in files])}

[[port]]
name = "vault"
ports = [{PORT}]
allow = ["@office"]
action = "reject"
{more}"""


@pytest.fixture(scope="module")
def house() -> Iterator[Guarded]:
    with Node("nft") as node:
        serve(node, "node", tcp=[PORT, RELAY])
        yield Guarded(node)


@pytest.fixture
def file(house: Guarded) -> Path:
    """A set file in a folder of its own, empty."""
    folder = house.node.directory / f"sets{time.monotonic_ns()}"
    folder.mkdir(mode=0o700)
    path = folder / "office.txt"
    put(path, "")
    return path


def put(path: Path, *addresses: str) -> None:
    path.write_text("".join(f"{address}\n" for address in addresses))
    path.chmod(0o600)


def stranger(node: Node) -> str:
    """What a stranger meets at the port, in both families."""
    found = set(verdicts(node, {f: dial(STRANGER, f, NODE, PORT) for f in FAMILIES}).values())
    return OPEN if found == {Verdict.OPEN} else SHUT if found == {Verdict.REFUSED} else MIXED


def becomes(node: Node, wanted: str) -> None:
    wait_for(lambda: stranger(node) == wanted, what=f"the port to be {wanted} for a stranger")


def kernel(node: Node, name: str = "office") -> set[str]:
    """What the two ipsets hold."""
    saved = node.run(f"ipset save {name}; ipset save {name}-v6", check=False).stdout
    return {line.split()[2] for line in saved.splitlines() if line.startswith("add")}


def change(daemon: Daemon, action: str, *addresses: str, name: str = "office", seconds: float | None = None) -> Any:
    request = {"command": "set", "action": action, "name": name, "addresses": list(addresses), "seconds": seconds}
    return client.call(daemon.runtime_directory / "control.sock", request, 30.0)


def listed(daemon: Daemon, source: str = "run time", name: str = "office") -> list[str]:
    """The entries of a set that come from there."""
    request = {"command": "sets", "name": name}
    (one,) = client.call(daemon.runtime_directory / "control.sock", request, 10.0)
    return [entry["entry"] for entry in one["entries"] if entry["source"] == source]


def state(daemon: Daemon, wanted: str) -> None:
    wait_for(lambda: ask(daemon, "status")["state"] == wanted, what=f"{daemon.name} to be {wanted}")


def no_drift(daemon: Daemon) -> bool:
    return json.loads(daemon.ctl("plan", "--json").stdout)["changes"] == []


# --- files


def in_place(path: Path, *addresses: str) -> None:
    put(path, *addresses)


def renamed(path: Path, *addresses: str) -> None:
    put(path.with_name("new"), *addresses)
    path.with_name("new").rename(path)


def as_a_config_map(path: Path, *addresses: str) -> None:
    """The file is a link into ..data, which is a link to a folder, and is put in place of the old one by a rename."""
    folder = path.with_name(f"..{time.monotonic_ns()}")
    folder.mkdir(mode=0o700)
    put(folder / path.name, *addresses)
    path.with_name("..tmp").symlink_to(folder.name)
    path.with_name("..tmp").rename(path.with_name("..data"))
    if not path.is_symlink():
        path.unlink()
        path.symlink_to(f"..data/{path.name}")


def elsewhere(path: Path, *addresses: str) -> None:
    """The file is a link, and what it points to is changed."""
    real = path.parent / "real"
    real.mkdir(mode=0o700, exist_ok=True)
    put(real / path.name, *addresses)
    if not path.is_symlink():
        path.unlink()
        path.symlink_to(real / path.name)


def with_its_folder(path: Path, *addresses: str) -> None:
    """The folder is not there for a while."""
    away = path.parent.rename(path.parent.with_name("away"))
    put(away / path.name, *addresses)
    away.rename(path.parent)


@pytest.mark.parametrize("write", [in_place, renamed, as_a_config_map, elsewhere, with_its_folder])
def test_a_set_file_is_followed_however_it_changes(house: Guarded, file: Path, write: Callable[..., None]) -> None:
    write(file)
    daemon = house.enforce(office(file))
    loaded, since = ask(daemon, "status")["config"], last_time(daemon)
    assert stranger(house.node) == SHUT
    write(file, *RUN_TIME)
    becomes(house.node, OPEN)
    write(file)
    becomes(house.node, SHUT)
    told = wait_events(daemon, lambda seen: len(seen) == 2, since=since)
    assert [event["message"] for event in told] == [
        "Set office: its files changed: 2 came, 0 went",
        "Set office: its files changed: 0 came, 2 went",
    ]
    assert {event["kind"] for event in told} == {"set"}
    assert ask(daemon, "status")["config"] == loaded


WAYS: dict[str, tuple[Callable[[Path], object], str]] = {
    "syntax": (lambda path: put(path, *RUN_TIME, "10.0.0.1/8"), ':3: entry: "10.0.0.1/8" has host bits set'),
    "others can write": (lambda path: path.chmod(0o666), ":1: file: can be written by others than root"),
    "missing": (lambda path: path.unlink(), ":1: file: does not exist"),
    "too large": (lambda path: os.truncate(path, 65 << 20), ":1: file: is more than the 64 MiB"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_becomes_bad_keeps_what_it_held_and_heals_by_itself(house: Guarded, file: Path, way: str) -> None:
    spoil, why = WAYS[way]
    put(file, *RUN_TIME)
    daemon = house.enforce(office(file))
    since = last_time(daemon)
    spoil(file)
    state(daemon, "degraded")
    (reason,) = ask(daemon, "status")["reasons"]
    assert reason.startswith(f"{file}{why}")
    assert reason.endswith("what the file held before stays in force")
    assert stranger(house.node) == OPEN
    change(daemon, "add", "192.0.2.9")  # whatever else happens meanwhile
    change(daemon, "del", "192.0.2.9")
    assert stranger(house.node) == OPEN
    put(file)
    state(daemon, "enforcing")
    becomes(house.node, SHUT)
    kinds = [event["kind"] for event in events(daemon) if event["time"] > since]
    assert (kinds.count("degraded"), kinds.count("recovered")) == (1, 1)


def test_a_bad_file_at_the_start_leaves_what_was_good_before(house: Guarded, file: Path) -> None:
    daemon = house.enforce(office(file))
    put(file, *RUN_TIME)
    becomes(house.node, OPEN)
    wait_for(
        lambda: STRANGER.ipv4 in (daemon.state_directory / "last-good.json").read_text(), what="it to be remembered"
    )
    with house.killed():
        file.unlink()
        daemon.start()
        daemon.wait_ready()
        assert f"{file}:1: file: does not exist" in daemon.status_text
        assert stranger(house.node) == OPEN
        # As well when the configuration itself is broken: its last good state knows the last good content.
        daemon.kill9()
        (daemon.config_directory / "nodewalld.toml").write_text("[[port\n")
        daemon.start()
        daemon.wait_ready()
        assert stranger(house.node) == OPEN
        daemon.kill9()
        put(file, *RUN_TIME)
        daemon.configure(office(file))
        daemon.start()
        daemon.wait_ready()
        state(daemon, "enforcing")


def test_a_change_of_a_file_outlives_the_trial_during_which_it_came(house: Guarded, file: Path) -> None:
    daemon = house.enforce(office(file))
    assert daemon.ctl("try", candidate(house, office(file, more="from_node = true"))).returncode == 0
    since = last_time(daemon)
    put(file, *RUN_TIME)
    wait_events(daemon, bool, "set", since=since)
    assert stranger(house.node) == OPEN
    assert daemon.ctl("revert").returncode == 0
    assert stranger(house.node) == OPEN
    assert no_drift(daemon)


def candidate(house: Guarded, config: str) -> str:
    """A folder with a configuration to try."""
    folder = house.node.directory / "candidate"
    folder.mkdir(exist_ok=True)
    (folder / "nodewalld.toml").write_text(config)
    return str(folder)


# --- entries


def test_an_added_entry_is_in_force_at_once_and_gone_when_it_is_taken_out(house: Guarded) -> None:
    daemon = house.enforce(office())
    since = last_time(daemon)
    done = daemon.ctl("set", "add", "office", *RUN_TIME)
    assert (done.returncode, done.stdout) == (0, "Set office: 2 entries added at run time.\n")
    assert stranger(house.node) == OPEN
    assert no_drift(daemon)
    shown = daemon.ctl("set", "list", "office").stdout
    config = daemon.config_directory / "nodewalld.toml"
    assert ["-", "run", "time"] in [line.split()[1:] for line in shown.splitlines() if STRANGER.ipv4 in line]
    assert ["-", f"{config}:6"] in [line.split()[1:] for line in shown.splitlines() if ALLOWED.ipv6 in line]
    change(daemon, "add", ALLOWED.ipv4)
    done = daemon.ctl("set", "del", "office", *RUN_TIME, ALLOWED.ipv4)
    assert (done.returncode, done.stderr) == (
        0,
        f"note: {ALLOWED.ipv4} is still in the set: {ALLOWED.ipv4} stands in {config}:6\n",
    )
    assert stranger(house.node) == SHUT
    assert [event["message"] for event in events(daemon, "set") if event["time"] > since] == [
        "Set office: 2 entries added at run time",
        "Set office: 1 entry added at run time",
        "Set office: 3 entries taken out again",
    ]
    assert kernel(house.node) == {ALLOWED.ipv4, ALLOWED.ipv6}


def test_an_entry_with_a_time_goes_by_itself(house: Guarded) -> None:
    daemon = house.enforce(office())
    since = last_time(daemon)
    change(daemon, "add", *RUN_TIME, "192.0.2.9", seconds=3600)
    assert stranger(house.node) == OPEN
    value = json.loads(daemon.ctl("set", "list", "office", "--json").stdout)
    (one,) = [entry for entry in value["sets"][0]["entries"] if entry["entry"] == "192.0.2.9"]
    assert (one["source"], one["file"], one["line"], one["family"]) == ("run time", None, None, "ipv4")
    assert one["until"].endswith("Z")
    change(daemon, "add", *RUN_TIME, seconds=0.1)
    becomes(house.node, SHUT)
    wait_events(daemon, lambda seen: "the time is over for 2 entries" in seen[-1]["message"], "set", since=since)
    assert listed(daemon) == ["192.0.2.9"]
    assert no_drift(daemon)
    change(daemon, "del", "192.0.2.9")


def test_a_time_ends_also_while_no_daemon_runs(house: Guarded) -> None:
    daemon = house.enforce(office())
    change(daemon, "add", *RUN_TIME, seconds=1.5)
    added = time.monotonic()
    with house.killed():
        wait_for(lambda: time.monotonic() > added + 1.5)
        daemon.start()
        daemon.wait_ready()
        assert stranger(house.node) == SHUT
        assert listed(daemon) == []
        over, start = (event["message"] for event in events(daemon))  # in this order: not even for a moment
        assert over == "Set office: the time is over for 2 entries added at run time"
        assert "started" in start


def test_a_call_is_done_whole_or_not_at_all_and_says_why(house: Guarded) -> None:
    daemon = house.enforce(office())
    before = kernel(house.node)
    config = daemon.config_directory / "nodewalld.toml"
    for words, says in (
        (
            ("add", "office", "192.0.2.9", "10.0.0.1/8"),
            '"10.0.0.1/8" has host bits set ("10.0.0.0/8" or "10.0.0.1/32")',
        ),
        (("add", "office", "192.0.2.9", "here"), '"here" is not an address or CIDR'),
        (("add", "@office", "192.0.2.9"), "there is no set @office (say office)"),
        (("add", "offices", "192.0.2.9"), "there is no set offices (the configuration has: office)"),
        (("del", "office", ALLOWED.ipv4), f"{ALLOWED.ipv4}: stands in {config}:6; take it out there"),
        (("del", "office", "192.0.2.9"), "192.0.2.9: was not added at run time"),
        (("list", "offices"), "there is no set offices"),
    ):
        done = daemon.ctl("set", *words)
        assert (done.returncode, done.stdout) == (1, ""), words
        assert says in done.stderr
        assert "Traceback" not in done.stderr
    many = [f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}" for n in range(100_000)]
    for addresses, says in ((many, "65536 entries"), ([*many[:500], "ten"], "nothing was changed")):
        with pytest.raises(Refused, match=says):
            change(daemon, "add", *addresses)
    assert kernel(house.node) == before
    assert listed(daemon) == []


def test_many_entries_come_and_go_in_one_call(house: Guarded) -> None:
    daemon = house.enforce(office())
    many = [f"10.1.{n >> 8}.{n & 255}" for n in range(2_000)] + [f"2001:db8:1::{n:x}" for n in range(1, 2_000)]
    change(daemon, "add", *many, *RUN_TIME)
    assert kernel(house.node) == {*many, *RUN_TIME, ALLOWED.ipv4, ALLOWED.ipv6}
    assert stranger(house.node) == OPEN
    change(daemon, "del", *many, *RUN_TIME)
    assert kernel(house.node) == {ALLOWED.ipv4, ALLOWED.ipv6}


def test_what_somebody_takes_out_of_the_ipset_by_hand_comes_back(house: Guarded) -> None:
    daemon = house.enforce(office().replace("1h", "1s"))
    change(daemon, "add", *RUN_TIME)
    house.node.run(f"ipset del office {STRANGER.ipv4}")
    becomes(house.node, OPEN)
    change(daemon, "del", *RUN_TIME)


def test_a_flow_that_a_redirect_refuses_now_is_cut(house: Guarded) -> None:
    relay = (
        f'[[port]]\nname = "relay"\nports = [{RELAY}]\nallow = ["@office"]\naction = "redirect:7"\nfrom_node = true\n'
    )
    daemon = house.enforce(office(more=relay))
    change(daemon, "add", NODE.ipv4, "192.0.2.9")
    flow = Connection(house.node, "node", source=NODE.ipv4, to=(NODE.ipv4, RELAY))
    since = last_time(daemon)
    change(daemon, "del", "192.0.2.9")
    assert flow.alive()
    change(daemon, "del", NODE.ipv4)
    told = [event for event in events(daemon, "set") if event["time"] > since]
    assert [event["flows_deleted"] for event in told] == [0, 1]


def test_what_the_kernel_refuses_changes_nothing(laboratory: None, tmp_path: Path) -> None:
    """Here it is the program `ipset` that fails, which is needed for a change of many entries."""
    many = [f"10.1.{n >> 8}.{n & 255}" for n in range(1_000)]
    path, broken = tmp_path / "office.txt", tmp_path / "broken"
    put(path, "192.0.2.1")
    (tmp_path / "ipset").write_text(f'#!/bin/sh\n[ -e {broken} ] && echo no >&2 && exit 1\nexec /usr/sbin/ipset "$@"\n')
    (tmp_path / "ipset").chmod(0o700)
    with (
        Node("nft") as node,
        Daemon(node, office(path), env={"PATH": f"{tmp_path}:{node.environment()['PATH']}"}) as daemon,
    ):
        daemon.wait_ready()
        before = kernel(node)
        broken.touch()
        with pytest.raises(Refused) as refused:
            change(daemon, "add", "192.0.2.2", *(f"2001:db8:1::{n:x}" for n in range(1_000)))
        assert refused.value.error == "the kernel refused it; the set is as before"
        assert refused.value.problems == ("set office-v6 could not be loaded: no",)
        assert (kernel(node), listed(daemon), list(daemon.state_directory.glob("additions*"))) == (before, [], [])
        put(path, *many)  # a file is not asked for once: it is tried again
        state(daemon, "degraded")
        assert ask(daemon, "status")["reasons"] == ["set office could not be loaded: no"]
        assert kernel(node) == before
        broken.unlink()
        state(daemon, "enforcing")
        assert kernel(node) == {*many, ALLOWED.ipv4, ALLOWED.ipv6}


# --- what outlives what


def banned(more: str = "") -> str:
    return f"""
[daemon]
resync = "1h"

[set.banned]

[[forward]]
name = "banned"
source = "@banned"
action = "drop"
{more}"""


def flood(node: Node, family: str) -> Flood:
    return Flood(node, "client", source=STRANGER.of(family), to=(BEYOND.of(family), 31002), sinks=["beyond"], rate=2000)


def test_an_added_entry_is_missed_by_no_packet_through_kills_restarts_and_reloads(node: Node, backend: str) -> None:
    with Daemon(node, banned()) as daemon:
        daemon.wait_ready()
        change(daemon, "add", *RUN_TIME, STRANGER_2.ipv4, name="banned")
        with flood(node, "ipv4") as four, flood(node, "ipv6") as six:
            daemon.kill9()
            daemon.start()
            daemon.wait_ready()
            daemon.stop()
            daemon.start()
            daemon.wait_ready()
            assert daemon.reload(banned("log = true\n")).returncode == 0
            change(daemon, "add", "192.0.2.9", name="banned")
            change(daemon, "del", "192.0.2.9", name="banned")
            assert daemon.reload(banned()).returncode == 0
            reports = four.stop(), six.stop()
        assert min(report.sent for report in reports) > 100
        assert [report.passed for report in reports] == [[], []]
        assert sorted(listed(daemon, name="banned")) == sorted([*RUN_TIME, STRANGER_2.ipv4])
        assert no_drift(daemon)
        daemon.stop()
        assert no_drift(daemon)


def test_a_reload_keeps_what_was_added_to_sets_that_stay_and_tells_what_it_drops(house: Guarded) -> None:
    other = '[set.other]\n[[port]]\nname = "other"\nports = [9]\nallow = ["@other"]\n'
    daemon = house.enforce(office(more=other))
    change(daemon, "add", *RUN_TIME)
    change(daemon, "add", "192.0.2.9", "192.0.2.10", name="other")
    taken = daemon.reload(office())
    assert taken.returncode == 0
    assert "set other: the configuration doesn't have it any more, which drops 2 entries" in taken.stderr
    assert stranger(house.node) == OPEN
    assert "drops 2 entries" in events(daemon, "set")[-1]["message"]
    assert daemon.reload(office(more=other)).returncode == 0
    assert listed(daemon, name="other") == []
    change(daemon, "del", *RUN_TIME)


def test_a_trial_without_the_set_gives_it_back_with_what_was_added(house: Guarded) -> None:
    daemon = house.enforce(office())
    change(daemon, "add", *RUN_TIME)
    without = candidate(house, office().replace("office", "friends"))
    assert daemon.ctl("try", without).returncode == 0
    assert stranger(house.node) == SHUT
    assert daemon.ctl("revert").returncode == 0
    assert stranger(house.node) == OPEN
    assert daemon.ctl("try", without).returncode == 0
    assert daemon.ctl("confirm").returncode == 0
    assert "drops 2 entries" in events(daemon, "set")[-1]["message"]
    assert daemon.reload(office()).returncode == 0
    assert listed(daemon) == []


def test_what_is_added_during_a_pause_is_in_force_after_it(house: Guarded) -> None:
    daemon = house.enforce(office())
    assert daemon.ctl("pause", "--for", "10m").returncode == 0
    done = daemon.ctl("set", "add", "office", *RUN_TIME)
    assert done.returncode == 0
    assert "it takes effect when the rules are in force again" in done.stderr
    assert ours(house.node) == []
    assert daemon.ctl("resume").returncode == 0
    assert kernel(house.node) == {*RUN_TIME, ALLOWED.ipv4, ALLOWED.ipv6}
    change(daemon, "del", *RUN_TIME)


@pytest.mark.parametrize("running", [True, False])
def test_remove_forgets_what_was_added(house: Guarded, running: bool) -> None:
    daemon = house.enforce(office())
    change(daemon, "add", *RUN_TIME)
    if not running:
        daemon.stop()
    assert daemon.ctl("remove").returncode == 0
    assert ours(house.node) == []
    if running:
        with pytest.raises(Refused, match="nothing is enforced"):
            change(daemon, "add", "192.0.2.9")
        assert daemon.reload().returncode == 0
    else:
        daemon.start()
        daemon.wait_ready()
    assert listed(daemon) == []
    assert stranger(house.node) == SHUT


def test_damaged_state_is_told_and_costs_no_more_than_the_entries(house: Guarded) -> None:
    daemon = house.enforce(office())
    change(daemon, "add", *RUN_TIME)
    with house.killed():
        (daemon.state_directory / "additions.json").write_text('{"sets": {"office": {"ten": [')
        daemon.start()
        daemon.wait_ready()
        assert "additions.json is damaged" in daemon.log_text()
        assert kernel(house.node) == {ALLOWED.ipv4, ALLOWED.ipv6}
        change(daemon, "add", "192.0.2.9")
        change(daemon, "del", "192.0.2.9")


def test_without_a_daemon_the_command_says_so(house: Guarded) -> None:
    daemon = house.enforce(office())
    with house.killed():
        for words in (("list",), ("add", "office", "192.0.2.9"), ("del", "office", "192.0.2.9")):
            done = daemon.ctl("set", *words)
            assert (done.returncode, done.stdout) == (1, "")
            assert "nodewalld is not running" in done.stderr
