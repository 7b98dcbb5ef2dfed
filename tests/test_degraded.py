"""What is missing, refused, full or damaged costs only what depends on it, is told, and is made good by itself."""

import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from live import ask, events, in_force, last_time, wait_events, wait_in_force

from lab.daemon import Daemon
from lab.layout import FAMILIES
from lab.node import TOOLS, Node
from lab.waiting import wait_for
from nodewalld.core.config import Sources
from nodewalld.core.events import Event, Kind
from nodewalld.core.summary import FIRST_FEW, QUIET, Summary
from nodewalld.service.state import StateFolder
from nodewalld.service.tenure import LONGEST, Tenure, since_boot

pytestmark = pytest.mark.kernel

HEAD = '[daemon]\nresync = "1h"\n'
PLAIN = '[[port]]\nname = "plain"\nports = [7001]\nallow = ["10.90.0.7", "fd90::7"]\n'
SET = '[set.friends]\nentries = ["10.90.0.7", "fd90::7"]\n'
MEMBERS = '[[rule]]\nname = "members"\ntable = "raw"\nchain = "PREROUTING"\n'
MEMBERS += 'rule = "-p tcp --dport 7002 -m set ! --match-set friends src -j DROP"\n'
REDIRECT = '[[port]]\nname = "turned"\nports = [7003]\naction = "redirect"\n'
CONFIG = HEAD + PLAIN + SET + MEMBERS


class Programs:
    """The node's /usr/sbin as a folder of links, so that programs can go, come back, and be another's."""

    REAL, SHOWN = "/run/sbin-real", "/run/sbin-shown"

    def __init__(self, node: Node) -> None:
        self.node = node
        node.run(
            f"mkdir {self.REAL} {self.SHOWN}; mount --bind /usr/sbin {self.REAL}; cd {self.REAL};"
            f"for f in *; do ln -s {self.REAL}/$f {self.SHOWN}/$f; done; mount --bind {self.SHOWN} /usr/sbin"
        )

    def hide(self, pattern: str) -> None:
        self.node.run(f"rm {self.SHOWN}/{pattern}")

    def show(self) -> None:
        self.node.run(f"cd {self.REAL}; for f in *; do ln -sfn {self.REAL}/$f {self.SHOWN}/$f; done")

    def refuse(self, program: str, table: str) -> None:
        """Let a restore program refuse scripts for one table, as a kernel without that table does."""
        text = f"""#!/bin/sh
script=$(cat; echo .); script=${{script%.}}
case $script in *"*{table}"*) echo "{program}: can't initialize table '{table}'" >&2; exit 3;; esac
printf %s "$script" | exec {self.REAL}/{program} "$@"
"""
        self.node.run(
            f"rm {self.SHOWN}/{program}; cat > {self.SHOWN}/{program}; chmod 755 {self.SHOWN}/{program}", stdin=text
        )

    def reword(self) -> None:
        """Let the tools print rules as another version of theirs might: the same rules in other words."""
        for tool in TOOLS.values():
            for program in (f"{tool}-{self.node.backend}", f"{tool}-{self.node.backend}-save"):
                text = f"""#!/bin/sh
said=$({self.REAL}/{program} "$@"; echo ".$?")
printf %s "${{said%.*}}" | sed 's/ --dport / --destination-port /; s/ --ctdir REPLY/ --ctdir reply/'
exit "${{said##*.}}"
"""
                self.node.run(
                    f"rm {self.SHOWN}/{program}; cat > {self.SHOWN}/{program}; chmod 755 {self.SHOWN}/{program}",
                    stdin=text,
                )

    def rules(self, family: str) -> str:
        """The rules, though the tools be hidden from the daemon."""
        tool = f"{TOOLS[family]}-{self.node.backend}-save"
        return self.node.run(["sh", "-c", f"exec {self.REAL}/{tool}"]).stdout

    def plain(self) -> dict[str, bool]:
        return {family: "--dport 7001" in self.rules(family) for family in FAMILIES}


@pytest.fixture
def programs(node: Node) -> Programs:
    return Programs(node)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def standing(node: Node) -> list[str]:
    return sorted(line for f in FAMILIES for line in node.rules(f).splitlines() if line.startswith("-"))


def held(daemon: Daemon) -> bool:
    """Whether all is in place; `nodewallctl plan` can't tell, for what it must know is in the state folder."""
    counted = ask(daemon, "status")["rules"]
    return bool(counted["in_place"] == counted["desired"] > 0)


def told(daemon: Daemon, words: str) -> None:
    """The reasons, systemd's status line and the log all say it."""
    reasons = ask(daemon, "status")["reasons"]
    assert any(words in reason for reason in reasons), reasons
    assert "Degraded: " in daemon.status_text or "Starting: " in daemon.status_text
    assert words in daemon.log_text()
    assert "Traceback" not in daemon.log_text()


def heals(daemon: Daemon) -> None:
    wait_for(lambda: ask(daemon, "status")["state"] == "enforcing", timeout=20, what="everything to be in force")
    assert ask(daemon, "status")["reasons"] == []
    assert events(daemon, "recovered")
    wait_for(lambda: daemon.status_text.startswith("Enforcing"), what="systemd to be told")
    wait_in_force(daemon)


# --- programs that are not there (yet)


def test_without_ip6tables_ipv4_is_in_force_and_ipv6_follows_with_the_tools(node: Node, programs: Programs) -> None:
    programs.hide("ip6tables*")
    with Daemon(node, CONFIG) as daemon:
        daemon.wait_ready()
        told(daemon, f"ip6tables-{node.backend}-restore can't be started")
        status = ask(daemon, "status")
        assert status["families"] == {"ipv4": "enforcing", "ipv6": "degraded"}
        assert all(reason.startswith("ipv6: ") for reason in status["reasons"])
        assert programs.plain() == {"ipv4": True, "ipv6": False}
        assert "last-good.json" in names(daemon.state_directory)
        assert daemon.reload(CONFIG + '[[port]]\nname = "more"\nports = [7]\n').returncode == 0
        programs.show()
        heals(daemon)
        assert programs.plain() == {"ipv4": True, "ipv6": True}


def test_without_ipset_only_the_tables_that_need_sets_wait_for_it(node: Node, programs: Programs) -> None:
    programs.hide("ipset*")
    with Daemon(node, CONFIG) as daemon:
        daemon.wait_ready()
        told(daemon, "ipset can't be started: No such file or directory (for sets friends, friends-v6)")
        reasons = ask(daemon, "status")["reasons"]
        assert [reason.split(": ")[:2] for reason in reasons[1:]] == [["ipv4", "raw"], ["ipv6", "raw"]]
        assert all("friends" in reason for reason in reasons)
        assert programs.plain() == {"ipv4": True, "ipv6": True}
        # What needs no set can be had meanwhile; what needs a new one is refused, and nothing changes.
        assert daemon.reload(CONFIG + REDIRECT).returncode == 0
        assert "--dport 7003" in programs.rules("ipv4")
        more = '[set.more]\nentries = ["192.0.2.1"]\n[[port]]\nname = "more"\nports = [7004]\nallow = ["@more"]\n'
        refused = daemon.reload(CONFIG + REDIRECT + more)
        assert refused.returncode == 1
        assert "ipset can't be started" in refused.stderr
        assert "7004" not in programs.rules("ipv4")
        programs.show()
        daemon.configure(CONFIG + REDIRECT)
        heals(daemon)
        assert "--dport 7002" in programs.rules("ipv6")


@pytest.mark.parametrize("chosen", ["auto", "configured"])
def test_an_iptables_that_appears_later_is_waited_for_in_peace(node: Node, programs: Programs, chosen: str) -> None:
    programs.hide("*tables*")
    backend = "" if chosen == "auto" else f'backend = "{node.backend}"\n'
    # A resync that is due, and links that come and go, are no reason to turn without a pause.
    with Daemon(node, CONFIG.replace('"1h"\n', '"1s"\n' + backend)) as daemon:
        wait_for((daemon.runtime_directory / "control.sock").exists)
        wait_for(lambda: "Starting: " in daemon.status_text, what="systemd to be told")
        assert ask(daemon, "status")["state"] == "starting"
        told(daemon, "iptables can't be started" if chosen == "auto" else "are not installed")
        assert events(daemon, "degraded")
        node.run("ip link add veth9 type veth peer name veth10; ip link del veth9")
        began, used = time.monotonic(), daemon.cpu_seconds()
        wait_for(lambda: time.monotonic() > began + 2.5)
        assert daemon.cpu_seconds() - used < 0.25
        assert daemon.noticed("READY") == []
        assert daemon.log_text().count("iptables") <= 4
        programs.show()
        daemon.wait_ready(timeout=20)
        assert programs.plain() == {"ipv4": True, "ipv6": True}
        heals(daemon)


def test_once_without_iptables_fails_and_says_why(node: Node, programs: Programs) -> None:
    programs.hide("*tables*")
    with Daemon(node, CONFIG, args=["--once"]) as daemon:
        assert daemon.wait() == 1
        assert "error: iptables can't be started" in daemon.log_text()
        assert "Traceback" not in daemon.log_text()


# --- tables that are refused


def test_a_table_that_is_refused_harms_no_other(node: Node, programs: Programs) -> None:
    program = f"ip6tables-{node.backend}-restore"
    reject = '[[port]]\nname = "said"\nports = [7005]\naction = "reject"\n'  # its backstop stands in security
    programs.refuse(program, "security")
    with Daemon(node, CONFIG + reject) as daemon:
        daemon.wait_ready()
        told(daemon, f"ipv6: security: {program}: ")
        assert len(ask(daemon, "status")["reasons"]) == 1
        assert programs.plain() == {"ipv4": True, "ipv6": True}
        since = last_time(daemon)
        node.run("ip6tables -w -t mangle -F PREROUTING")
        wait_events(daemon, lambda seen: any(e["table"] == "mangle" for e in seen), "repair", since=since)
        assert daemon.reload(CONFIG + reject.replace("7005", "7006")).returncode == 0
        assert "--dport 7006" in programs.rules("ipv6")
        programs.show()
        heals(daemon)
        assert "security" in programs.rules("ipv6")


def test_what_comes_into_force_late_is_the_last_good_configuration_from_then_on(
    node: Node, programs: Programs, daemon: Daemon
) -> None:
    def is_good() -> bool:
        return "turned" in (daemon.state_directory / "last-good.json").read_text()

    daemon.start()
    daemon.wait_ready()
    daemon.stop()
    programs.refuse(f"ip6tables-{node.backend}-restore", "nat")
    daemon.configure(CONFIG + REDIRECT)
    daemon.start()
    daemon.wait_ready()
    assert not is_good()
    programs.show()
    heals(daemon)
    assert is_good()


def test_a_reload_that_needs_a_refused_table_for_the_first_time_changes_nothing(node: Node, programs: Programs) -> None:
    program = f"ip6tables-{node.backend}-restore"
    with Daemon(node, CONFIG) as daemon:
        daemon.wait_ready()
        before = standing(node)
        programs.refuse(program, "nat")
        for _ in range(2):  # the first refusal excuses nothing the second time
            refused = daemon.reload(CONFIG + REDIRECT)
            assert refused.returncode == 1
            assert f"{program}: can't initialize table 'nat'" in refused.stderr
            assert standing(node) == before
            assert ask(daemon, "status")["state"] == "enforcing"
        programs.show()
        assert daemon.reload().returncode == 0
        assert in_force(daemon)


# --- tools of another version


def test_an_iptables_that_prints_the_same_rules_in_other_words_makes_no_storm(node: Node, programs: Programs) -> None:
    with Daemon(node, CONFIG.replace('"1h"', '"1s"')) as daemon:
        daemon.wait_ready()
        before = standing(node)
        programs.reword()
        assert standing(node) != before

        def calm() -> bool:
            """Whether one more resync writes nothing."""
            began, counted = time.monotonic(), ask(daemon, "status")["repairs"]
            wait_for(lambda: time.monotonic() > began + 1.2)
            return bool(ask(daemon, "status")["repairs"] == counted)

        for tool in TOOLS.values():
            node.run(f"{tool} -w -t mangle -F PREROUTING")
        wait_for(lambda: ask(daemon, "status")["repairs"] >= 2 and held(daemon), what="the repair")
        assert calm()
        assert ask(daemon, "status")["reasons"] == []
        daemon.restart()  # which reads what nobody had touched, too
        assert in_force(daemon)
        assert ask(daemon, "status")["repairs"] == 0
        programs.show()
        assert standing(node) == before


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


# --- a clock that jumps

SOURCES = Sources("/etc/nodewalld", {"/etc/nodewalld/nodewalld.toml": ""}, {})


def test_deadlines_hang_on_no_clock_that_anybody_can_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    tenure = Tenure(StateFolder(tmp_path), clock=lambda: now, boot=lambda: "boot")
    for jump in (0, 10**9, -(10**9)):
        monkeypatch.setattr(time, "time", lambda jump=jump: 1.7e9 + jump)
        assert tenure.begin_trial(SOURCES, 60) == 1060
        assert tenure.begin_pause(60) == 1060
        assert abs(since_boot() - time.clock_gettime(time.CLOCK_BOOTTIME)) < 60
        trial = tenure.trial
        assert (trial and trial.until, tenure.pause) == (1060, 1060)
    assert "17" not in (tmp_path / "pause.json").read_text()
    now = 1061.0
    assert tenure.pause is None


def test_no_deadline_is_believed_that_nobody_can_have_set(tmp_path: Path) -> None:
    tenure = Tenure(StateFolder(tmp_path), clock=lambda: 1000.0, boot=lambda: "boot")
    for until, expected in ((1000 + LONGEST, 1000 + LONGEST), (1001 + LONGEST, None), (float("inf"), None), (-1, None)):
        StateFolder(tmp_path).write("pause", {"boot": "boot", "until": until})
        assert tenure.pause == expected


def test_a_jump_in_a_flood_is_no_part_of_its_length() -> None:
    summary = Summary()
    start = datetime(2026, 1, 1, tzinfo=UTC)
    for number in range(FIRST_FEW + 3):
        wall = start + timedelta(hours=number % 2 * 5)
        summary.take(Event(time=wall, kind=Kind.REPAIR, what="put right x"), number / 10)
    (sum_,) = summary.flush(100 * QUIET)
    assert "3 more repairs in 0.2 s" in sum_.what


def test_what_a_disk_refused_is_read_as_written_and_never_revived_when_it_was_refused(tmp_path: Path) -> None:
    blocked = tmp_path / "folder"
    blocked.write_text("")
    folder = StateFolder(blocked)
    tenure = Tenure(folder, clock=lambda: 1000.0, boot=lambda: "boot")
    assert not folder.write("owned", {"sets": ["a"]})
    assert folder.read("owned") == {"sets": ["a"]}
    assert tenure.begin_pause(60) is None
    assert "can't be written: " in folder.trouble
    blocked.unlink()
    folder.catch_up()
    assert folder.trouble == ""
    assert names(blocked) == ["owned.json"]
    assert tenure.pause is None
