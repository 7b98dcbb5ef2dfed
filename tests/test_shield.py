"""The shield's life: nothing gets past it, nobody but us takes it away, and we always can."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from entries import FRIENDS
from live import ask, events, wait_events
from packets import OPEN, REFUSED, TIMEOUT, answer_to, dial, verdicts
from shields import PLAIN, raise_alone, stands, take_out

from lab.daemon import Daemon
from lab.flood import Flood
from lab.layout import FAMILIES, NODE, STRANGER, STRANGER_2
from lab.node import TOOLS, Node
from lab.processes import kill_entered
from lab.traffic import serve
from lab.waiting import wait_for

pytestmark = pytest.mark.kernel

PORT, REJECTED = 7001, 7002
CONFIG = f"""{FRIENDS}
[[port]]
name = "shut"
ports = [{PORT}]
protocol = ["tcp", "udp"]
allow = ["@friends"]

[[port]]
name = "answered"
ports = [{REJECTED}]
action = "reject"
"""
OFF = '[daemon]\nshield = "off"\n' + CONFIG
REQUIRED = '[daemon]\nshield = "require"\n' + CONFIG
RATE = 12_000


@pytest.fixture
def served(node: Node) -> Node:
    serve(node, "node", tcp=[PORT, REJECTED], udp=[PORT])
    return node


@pytest.fixture
def nft_node(laboratory: None) -> Iterator[Node]:
    with Node("nft") as made:
        serve(made, "node", tcp=[PORT, REJECTED], udp=[PORT])
        yield made


def shield_of(daemon: Daemon) -> dict[str, Any]:
    found = ask(daemon, "status")["shield"]
    assert isinstance(found, dict)
    return found


def handle(node: Node) -> int:
    """The table's identity: another one when it was taken away and made again."""
    # Not by `nft -j`: that of Debian 12 dies of a table with exactly one flag, which an owner's death leaves.
    code = "from nodewalld.kernel.nftshield import ShieldTable; print(ShieldTable().held().handle)"
    return int(node.run([node.python(), "-c", code]).stdout)


def reload(daemon: Daemon, config: str) -> None:
    daemon.configure(config)
    result = daemon.ctl("reload")
    assert result.returncode == 0, result.stderr


@contextmanager
def flooded(node: Node, found: dict[str, tuple[int, int]], name: str, port: int = PORT) -> Iterator[None]:
    """A flood that is to be refused; what was sent, and what passed, is kept under a name."""
    with Flood(node, "client", to=(NODE.ipv4, port), source=STRANGER.ipv4, rate=RATE) as flood:
        yield
        report = flood.stop()
    found[name] = report.sent, report.received


def test_an_owned_table_is_nobody_elses(nft_node: Node) -> None:
    daemon = Daemon(nft_node, CONFIG).wait_ready()
    assert shield_of(daemon)["state"] == "owned"
    before = handle(nft_node)
    refused = nft_node.run("nft delete table inet nodewalld", check=False)
    assert "Operation not permitted" in refused.stderr
    assert nft_node.run("nft flush chain inet nodewalld prerouting", check=False).returncode
    nft_node.run("nft flush ruleset")
    assert handle(nft_node) == before
    wait_events(daemon, lambda found: found, "repair")
    assert {event["table"] for event in events(daemon, "repair")} <= {"mangle", "filter", "security"}


def test_a_restarted_daemon_takes_its_table_over(nft_node: Node) -> None:
    daemon = Daemon(nft_node, CONFIG).wait_ready()
    before = handle(nft_node)
    daemon.kill9()
    assert stands(nft_node)
    daemon.start()
    daemon.wait_ready()
    assert (handle(nft_node), shield_of(daemon)["state"]) == (before, "owned")
    daemon.stop()
    assert handle(nft_node) == before
    assert answer_to(nft_node, dial(STRANGER, "ipv4", NODE, PORT)).verdict is TIMEOUT


def test_while_no_daemon_runs_it_outlasts_iptables_and_nft_can_take_it_away(nft_node: Node) -> None:
    daemon = Daemon(nft_node, CONFIG).wait_ready()
    probes = {family: dial(STRANGER, family, NODE, PORT) for family in FAMILIES}
    daemon.kill9()
    nft_node.run("\n".join(f"{tool} -t {table} -F" for tool in TOOLS.values() for table in ("mangle", "filter")))
    assert set(verdicts(nft_node, probes).values()) == {TIMEOUT}
    nft_node.run("nft flush ruleset")
    assert not stands(nft_node)
    assert set(verdicts(nft_node, probes).values()) == {OPEN}
    daemon.start()
    daemon.wait_ready()
    assert shield_of(daemon)["state"] == "owned"
    assert set(verdicts(nft_node, probes).values()) == {TIMEOUT}


def test_a_plain_table_is_put_back_and_it_is_told_how_long_it_was_gone(nft_node: Node) -> None:
    daemon = Daemon(nft_node, CONFIG, env=PLAIN).wait_ready()
    assert shield_of(daemon)["state"] == "guarded"
    found: dict[str, tuple[int, int]] = {}
    with flooded(nft_node, found, "plain"):
        for command, reason in (
            ("nft flush ruleset", "missing"),
            ("nft delete table inet nodewalld", "missing"),
            ("nft flush chain inet nodewalld ipv4-port/shut", "changed"),
            ("nft add table inet nodewalld '{ flags dormant; }'", "changed"),
            ("nft insert rule inet nodewalld prerouting accept", "changed"),
            (f"nft delete element inet nodewalld ipv4-prerouting-tcp '{{ {PORT} }}'", "changed"),
        ):
            since = ask(daemon, "history")[-1]["time"]
            nft_node.run(command)
            (repair,) = wait_events(
                daemon, lambda found: [e for e in found if e["chain"] == "inet nodewalld"], "repair", since=since
            )[:1]
            wait_for(lambda: daemon.ctl("plan").returncode == 0, what="everything to be in force again")
            assert (repair["reason"], repair["by"]["comm"]) == (reason, "nft"), repair
            assert repair["exposed_ms"] > 0
    print("sent, passed:", found)
    repairs = len(events(daemon, "repair"))
    nft_node.run("nft add table ip foreign")
    wait_for(lambda: ask(daemon, "status")["state"] == "enforcing", what="peace")
    assert len(events(daemon, "repair")) == repairs


def test_what_a_set_holds_is_checked_as_well_in_a_plain_table(nft_node: Node) -> None:
    daemon = Daemon(nft_node, '[daemon]\nresync = "1s"\n' + CONFIG, env=PLAIN).wait_ready()
    nft_node.run(f"nft add element inet nodewalld set-friends '{{ {STRANGER.ipv4} }}'")
    wait_events(daemon, lambda found: [e for e in found if e["chain"] == "inet nodewalld"], "repair")
    wait_for(lambda: daemon.ctl("plan").returncode == 0, what="the set to be right")


@pytest.mark.parametrize("env", [{}, PLAIN], ids=["owned", "plain"])
def test_it_is_always_ours_to_take_away(nft_node: Node, env: dict[str, str]) -> None:
    daemon = Daemon(nft_node, CONFIG, env=env).wait_ready()
    reload(daemon, OFF)
    assert not stands(nft_node)
    reload(daemon, CONFIG)
    assert stands(nft_node)
    daemon.ctl("pause", "--for", "10m")
    assert not stands(nft_node)
    daemon.ctl("resume")
    assert stands(nft_node)
    assert daemon.ctl("remove").returncode == 0
    assert not stands(nft_node)
    reload(daemon, CONFIG)
    daemon.kill9()
    assert stands(nft_node)
    assert daemon.ctl("remove").returncode == 0
    assert not stands(nft_node)
    raise_alone(daemon)
    daemon.configure(OFF)
    daemon.start()
    daemon.wait_ready()
    assert not stands(nft_node)


def test_a_trial_covers_it(nft_node: Node) -> None:
    daemon = Daemon(nft_node, OFF).wait_ready()
    daemon.configure(CONFIG)
    assert daemon.ctl("try", "--timeout", "5m").returncode == 0
    assert stands(nft_node)
    assert daemon.ctl("revert").returncode == 0
    assert not stands(nft_node)
    assert daemon.ctl("try", "--timeout", "3s").returncode == 0
    assert stands(nft_node)
    daemon.kill9()
    daemon.configure(OFF)
    daemon.start()
    daemon.wait_ready()
    wait_for(lambda: not stands(nft_node), what="the end of the trial")


def test_entries_of_sets_come_and_go_without_a_rule_being_written(nft_node: Node) -> None:
    daemon = Daemon(nft_node, CONFIG).wait_ready()
    probes = {family: dial(STRANGER, family, NODE, PORT) for family in FAMILIES}
    for family in FAMILIES:
        assert answer_to(nft_node, probes[family]).verdict is TIMEOUT
    before = [row for row in shown(daemon) if row["packets"]]
    assert {row["entry"] for row in before} == {"port/shut"}
    assert daemon.ctl("set", "add", "friends", STRANGER.ipv4, STRANGER.ipv6).returncode == 0
    for family in FAMILIES:
        assert answer_to(nft_node, probes[family]).verdict is OPEN
    assert [row for row in shown(daemon) if row["packets"]] == before
    assert daemon.ctl("set", "del", "friends", STRANGER.ipv4, STRANGER.ipv6).returncode == 0
    for family in FAMILIES:
        assert answer_to(nft_node, probes[family]).verdict is TIMEOUT
    assert daemon.ctl("plan").returncode == 0


def test_a_set_that_outgrows_its_room_becomes_a_larger_one_and_nothing_gets_past(nft_node: Node) -> None:
    many = [f"172.16.{n >> 8}.{n & 255}" for n in range(2000)]
    daemon = Daemon(nft_node, CONFIG).wait_ready()
    found: dict[str, tuple[int, int]] = {}
    table, sizes = handle(nft_node), []
    with flooded(nft_node, found, "grown and shrunk"):
        for entries in (many[:40], many, [*many, STRANGER_2.ipv4], []):
            reload(daemon, CONFIG.replace("entries = [", f"entries = {json.dumps(entries)[:-1]}{', ' * bool(entries)}"))
            listed = nft_node.run("nft list set inet nodewalld set-friends").stdout
            sizes.append(int(listed.partition("size ")[2].split()[0]))
            probe = dial(STRANGER_2, "ipv4", NODE, PORT)
            assert answer_to(nft_node, probe).verdict is (OPEN if STRANGER_2.ipv4 in entries else TIMEOUT)
            assert daemon.ctl("plan").returncode == 0
    assert sizes == [128, 4096, 4096, 64]
    assert handle(nft_node) == table
    sent, passed = found["grown and shrunk"]
    assert sent
    assert not passed


def shown(daemon: Daemon) -> list[dict[str, Any]]:
    """The rows of `nodewallctl show` that are the shield's."""
    return [row for row in json.loads(daemon.ctl("show", "--json").stdout)["rules"] if row["table"] == "shield"]


def test_a_healthy_reject_answers_and_one_that_lost_its_rules_is_a_drop(served: Node) -> None:
    daemon = Daemon(served, CONFIG).wait_ready()
    for family in FAMILIES:
        assert answer_to(served, dial(STRANGER, family, NODE, REJECTED)).verdict is REFUSED
        assert answer_to(served, dial(STRANGER_2, family, NODE, 22)).verdict is REFUSED  # nobody listens there
    daemon.stop()
    for family in FAMILIES:
        served.run(f"{TOOLS[family]} -t mangle -F; {TOOLS[family]} -F")
        assert answer_to(served, dial(STRANGER, family, NODE, REJECTED)).verdict is TIMEOUT
    take_out(served)
    assert answer_to(served, dial(STRANGER, "ipv4", NODE, REJECTED)).verdict is OPEN


@contextmanager
def held_by_another(node: Node) -> Iterator[None]:
    """The table's name, owned by a process that is none of ours."""
    code = (
        "import time; from nodewalld.core.shield.rules import *; from nodewalld.kernel.nftshield import ShieldTable;"
        "t = ShieldTable(); t.write(Shield(), ''); print('held', flush=True); time.sleep(600)"
    )
    process = node.popen([node.python(), "-c", code], log="holder")
    try:
        wait_for(lambda: stands(node), what="somebody else's table")
        yield
    finally:
        kill_entered(process)
        process.wait()


def test_where_it_cannot_be_had_auto_tells_and_require_refuses(nft_node: Node) -> None:
    daemon = Daemon(nft_node, OFF + "\n").wait_ready()
    with held_by_another(nft_node):
        daemon.configure(REQUIRED)
        refused = daemon.ctl("reload")
        assert refused.returncode == 1
        assert "the shield is required, and can't be had" in refused.stderr
        assert shield_of(daemon)["mode"] == "off"
        daemon.configure(CONFIG)
        daemon.ctl("reload")
        status = ask(daemon, "status")
        assert (status["state"], status["shield"]["state"]) == ("degraded", "failing")
        assert "Operation not permitted" in status["reasons"][0]
        assert answer_to(nft_node, dial(STRANGER, "ipv4", NODE, PORT)).verdict is TIMEOUT
    wait_for(lambda: ask(daemon, "status")["state"] == "enforcing", what="the shield to be had")
    assert shield_of(daemon)["state"] == "owned"
    reload(daemon, REQUIRED)


def test_it_is_shown_with_what_it_does_not_carry(nft_node: Node) -> None:
    raw = '[[rule]]\nname = "raw"\ntable = "filter"\nchain = "INPUT"\nrule = "-p tcp --dport 7003 -j DROP"\n'
    daemon = Daemon(nft_node, CONFIG + raw).wait_ready()
    answer_to(nft_node, dial(STRANGER, "ipv4", NODE, PORT))
    lines = daemon.ctl("show").stdout.splitlines()
    assert "shield ipv4-refuse-port/shut (IPv4)" in lines
    assert any(row["rule"].endswith(" counter drop") and row["packets"] for row in shown(daemon))
    assert lines[-1].split() == ["rule/raw", "the", "text", "of", "a", "rule", "is", "iptables'"]
    assert "table inet nodewalld {" in daemon.ctl("show", "--compiled").stdout
    assert "  shield:     owned, " in daemon.ctl("status").stdout
    assert shield_of(daemon)["iptables_only"] == [{"entry": "rule/raw", "reason": "the text of a rule is iptables'"}]
    daemon.stop()
    take_out(nft_node)
    planned = daemon.ctl("plan")
    assert planned.returncode == 3
    assert "the shield does not stand" in planned.stdout
    raise_alone(daemon)
    assert daemon.ctl("plan").returncode == 0
    nft_node.run("nft add element inet nodewalld set-friends '{ 192.0.2.1 }'")
    assert "the sets of the shield" in daemon.ctl("plan").stdout
    nft_node.run("nft add rule inet nodewalld prerouting accept")
    assert "the shield holds other rules" in daemon.ctl("plan").stdout
