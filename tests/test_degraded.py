"""What is missing or refused costs only what depends on it, is told, and is made good by itself."""

import time
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


def test_what_comes_into_force_late_is_the_last_good_configuration_from_then_on(node: Node, programs: Programs) -> None:
    with Daemon(node, CONFIG) as daemon:
        good = daemon.state_directory / "last-good.json"
        daemon.wait_ready()
        daemon.stop()
        programs.refuse(f"ip6tables-{node.backend}-restore", "nat")
        daemon.configure(CONFIG + REDIRECT)
        daemon.start()
        daemon.wait_ready()
        assert "turned" not in good.read_text()
        programs.show()
        heals(daemon)
        assert "turned" in good.read_text()


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
