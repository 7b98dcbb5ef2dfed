"""The unit on a booted machine: it is ready before the network, hardened, reloads visibly, and comes back by itself."""

import pytest
from booted import HOST, Machine, wait_for
from guarded import (
    ALLOWED,
    DROPPED,
    OPEN,
    REDIRECTED,
    REJECTED,
    UNIT,
    flood,
    guard,
    listen,
    main_pid,
    passed,
    probe,
    rules,
    wait_until_back,
)

BACK_WITHIN = 5.0
WATCHDOG = 15.0
EXPOSURE = 23  # tenths


def test_it_boots_enabled_before_the_network_and_systemd_has_nothing_to_say(machine: Machine) -> None:
    assert machine.run("systemctl is-system-running").stdout.strip() == "running"
    assert machine.property(UNIT, "ActiveState") == "active"
    ready = int(machine.property(UNIT, "ActiveEnterTimestampMonotonic"))
    assert ready <= int(machine.property("network-pre.target", "ActiveEnterTimestampMonotonic"))
    verified = machine.run(f"systemd-analyze verify --man=no {UNIT}")
    assert verified.stdout + verified.stderr == ""


def test_status_is_a_sentence_that_says_how_it_is(machine: Machine) -> None:
    guard(machine)
    shown = machine.run(f"systemctl status {UNIT}").stdout
    assert 'Status: "Enforcing' in shown, shown
    assert machine.run("nodewallctl status").returncode == 0


def test_its_exposure_is_low(machine: Machine) -> None:
    done = machine.run(
        f"systemd-analyze security --no-pager --offline=yes --threshold={EXPOSURE} /usr/lib/systemd/system/{UNIT}",
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("backend", ["nft", "legacy"])
def test_rules_of_every_kind_are_in_force_under_the_hardened_unit(machine: Machine, backend: str) -> None:
    for tool in ("iptables", "ip6tables"):
        machine.run(f"update-alternatives --set {tool} /usr/sbin/{tool}-{backend}")
    machine.add_peer()
    listen(machine)
    guard(machine, backend)
    assert machine.run("nodewallctl status --json").returncode == 0
    for address in HOST.values():
        outcomes = {port: probe(machine, address, port) for port in (DROPPED, REJECTED, REDIRECTED, ALLOWED, OPEN)}
        assert outcomes == {
            DROPPED: "silent",
            REJECTED: "refused",
            REDIRECTED: "refused",
            ALLOWED: "open",
            OPEN: "open",
        }, address
    before = rules(machine, backend)
    assert "add friends-v6 fd99::/64" in before
    # What another program takes away comes back, in both families, without a word from anybody.
    for tool in ("iptables", "ip6tables"):
        machine.run(f"{tool}-{backend} -w -t mangle -F PREROUTING")
    wait_for(lambda: rules(machine, backend) == before, what="the repair")
    assert machine.journal(f"-u {UNIT} -p err") == []


def test_the_legacy_lock_is_made_anew_when_somebody_has_deleted_it(bookworm: Machine) -> None:
    guard(bookworm, "legacy")
    bookworm.run("rm /run/xtables.lock; sed -i s/31002/31012/ /etc/nodewalld/nodewalld.toml")
    bookworm.run(f"systemctl reload {UNIT}")
    assert any("31012" in rule for rule in rules(bookworm, "legacy"))
    assert bookworm.run("nodewallctl status --json").returncode == 0
    assert bookworm.run("stat -c %a /run/xtables.lock").stdout.strip() == "600"


def test_a_good_reload_is_waited_for_and_a_bad_one_fails_visibly(machine: Machine) -> None:
    guard(machine)
    before, pid = rules(machine), main_pid(machine)
    good = machine.path("/etc/nodewalld/nodewalld.toml").read_text()
    machine.path("/etc/nodewalld/nodewalld.toml").write_text(good.replace("ports = [31002]", "ports = [99999]"))
    done = machine.run(f"systemctl reload {UNIT}", check=False)
    assert done.returncode != 0
    assert machine.property(UNIT, "ActiveState") == "active"
    assert rules(machine) == before
    told = machine.journal("NODEWALLD_KIND=refused")[-1]
    assert "nodewalld.toml:" in told["MESSAGE"]
    assert told["_SYSTEMD_UNIT"] == UNIT
    status = machine.run(f"systemctl status {UNIT}", check=False).stdout
    assert "nodewalld.toml" in status, status

    machine.path("/etc/nodewalld/nodewalld.toml").write_text(good.replace("31002", "31012"))
    machine.run(f"systemctl reload {UNIT}")
    assert any("31012" in rule for rule in rules(machine))
    assert main_pid(machine) == pid
    assert machine.property(UNIT, "NRestarts") == "0"


@pytest.mark.parametrize("folder", ["/root/new", "/tmp/new", "/etc/new"])
def test_a_folder_on_trial_may_lie_where_people_work(bookworm: Machine, folder: str) -> None:
    """The daemon reads it: ProtectHome=yes or PrivateTmp=yes would hide it."""
    guard(bookworm)
    bookworm.run(f"cp -r /etc/nodewalld {folder}; sed -i s/31002/31012/ {folder}/nodewalld.toml")
    bookworm.run(f"nodewallctl try {folder} --timeout 60s")
    assert any("31012" in rule for rule in rules(bookworm))
    bookworm.run("nodewallctl revert")
    assert not any("31012" in rule for rule in rules(bookworm))


def test_killed_it_is_back_at_once_and_its_rules_were_never_absent(machine: Machine) -> None:
    machine.add_peer()
    guard(machine)
    with flood(machine) as counts:
        pid = main_pid(machine)
        machine.run(f"kill -9 {pid}")
        took = wait_until_back(machine, pid, 10)
    assert took < BACK_WITHIN
    assert passed(counts()) == 0


_BEGIN_TRACE_AND_KILL_IT = """
nodewallctl trace tcp --dport 31002 --for 1h >/dev/null 2>/run/told & trace=$!
until grep Following /run/told; do sleep 0.02; done
iptables-legacy -t raw -S; cat /proc/net/netfilter/nf_log
kill -9 $(cat /proc/$trace/task/$trace/children); kill -9 $trace; wait $trace
"""


def test_killed_with_a_trace_it_gives_back_what_the_trace_had_borrowed(bookworm: Machine) -> None:
    for tool in ("iptables", "ip6tables"):
        bookworm.run(f"update-alternatives --set {tool} /usr/sbin/{tool}-legacy")
    guard(bookworm, "legacy")
    before = bookworm.run("cat /proc/net/netfilter/nf_log").stdout
    during = bookworm.run(_BEGIN_TRACE_AND_KILL_IT, check=False).stdout
    assert "nodewalld:trace/" in during
    assert " 2 nfnetlink_log " in during
    pid = main_pid(bookworm)
    bookworm.run(f"kill -9 {pid}")
    wait_until_back(bookworm, pid, 10)
    assert "nodewalld:trace/" not in bookworm.run("iptables-legacy -t raw -S").stdout
    assert bookworm.run("cat /proc/net/netfilter/nf_log").stdout == before
    assert "nf_log_ipv4" in before


def test_a_daemon_that_hangs_is_killed_by_the_watchdog_and_back(bookworm: Machine) -> None:
    bookworm.add_peer()
    guard(bookworm)
    with flood(bookworm) as counts:
        pid = main_pid(bookworm)
        bookworm.run(f"kill -STOP {pid}")
        wait_until_back(bookworm, pid, WATCHDOG + 10)
    assert passed(counts()) == 0
    messages = [entry["MESSAGE"] for entry in bookworm.journal(f"-u {UNIT}")]
    assert any("Watchdog timeout" in message for message in messages)
    # What it hung in is in the journal, by faulthandler.
    assert any("most recent call first" in message for message in messages)


def test_stopped_its_rules_stay_and_started_again_nothing_is_touched(bookworm: Machine) -> None:
    guard(bookworm)
    before = rules(bookworm)
    bookworm.run(f"systemctl stop {UNIT}")
    assert rules(bookworm) == before
    assert bookworm.run("nodewallctl status", check=False).returncode == 4
    bookworm.run(f"systemctl start {UNIT}")
    assert rules(bookworm) == before


def test_a_boot_with_a_broken_file_and_no_good_one_fails_with_the_reason(bookworm: Machine) -> None:
    bookworm.run(f"systemctl stop {UNIT}; rm -rf /var/lib/nodewalld/*")
    bookworm.path("/etc/nodewalld/nodewalld.toml").write_text("[[port]]\nname = 3\n")
    before = rules(bookworm)
    assert bookworm.run(f"systemctl start {UNIT}", check=False).returncode != 0
    shown = bookworm.show(UNIT, "ActiveState", "ExecMainStatus", "NRestarts")
    assert shown == {"ActiveState": "failed", "ExecMainStatus": "78", "NRestarts": "0"}
    assert rules(bookworm) == before
    assert any("nodewalld.toml:2" in entry["MESSAGE"] for entry in bookworm.journal(f"-u {UNIT}"))


def test_the_journal_says_who_did_it_in_fields_and_explains_itself(machine: Machine) -> None:
    guard(machine)
    machine.run("systemd-run -q --unit=vandal /bin/sh -c 'iptables -w -t mangle -F PREROUTING; sleep 2'")
    [entry] = wait_for(lambda: machine.journal("NODEWALLD_KIND=repair"), what="the repair's entry")
    assert entry["_SYSTEMD_UNIT"] == UNIT
    assert entry["NODEWALLD_TABLE"] == "mangle"
    assert entry["NODEWALLD_CHAIN"] == "PREROUTING"
    assert entry["NODEWALLD_FAMILY"] == "ipv4"
    assert entry["NODEWALLD_REASON"] in {"missing", "flushed"}
    assert entry["NODEWALLD_BY_COMM"] == "iptables"
    assert int(entry["NODEWALLD_BY_PID"]) > 1
    assert entry["NODEWALLD_BY_PARENTS"].startswith("sh (")
    assert int(entry["NODEWALLD_EXPOSED_USEC"]) > 0
    assert "in force again" in machine.run("journalctl --no-pager -x NODEWALLD_KIND=repair").stdout


def test_other_programs_processes_can_be_seen_from_the_sandbox(machine: Machine) -> None:
    """The journal names who had started the tool that changed a rule, and who holds the xtables lock."""
    pid = main_pid(machine)
    machine.run("systemd-run -q --unit=bystander /bin/sleep 1000")
    other = machine.property("bystander.service", "MainPID")
    seen = f"setpriv --bounding-set=-all,+net_admin,+net_raw --inh-caps=-all cat /proc/{other}/stat /proc/locks"
    assert "(sleep)" in machine.run(f"nsenter -t {pid} -m {seen}").stdout


def test_without_an_address_of_its_own_and_without_failsafe_its_rules_stand_before_the_network(
    bookworm: Machine,
) -> None:
    guard(bookworm)
    bookworm.path("/etc/nodewalld/conf.d/10-no-failsafe.toml").write_text("[failsafe]\nports = []\n")
    bookworm.run(f"systemctl reload {UNIT}")
    before = [rule for rule in rules(bookworm) if rule.startswith(("iptables mangle -A", "ip6tables mangle -A"))]
    bookworm.stop()
    bookworm.boot()
    after = [rule for rule in rules(bookworm) if rule.startswith(("iptables mangle -A", "ip6tables mangle -A"))]
    assert after == before
    assert bookworm.journal(f"-b -u {UNIT} NODEWALLD_KIND=degraded") == []
