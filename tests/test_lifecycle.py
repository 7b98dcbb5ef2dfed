"""What outlives the daemon, what a reload may not break, and what systemd and people are told: the real daemon."""

import json
import re
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
from captured import CAPTURES
from live import (
    WriteLog,
    ask,
    at_rest,
    events,
    generation,
    in_force,
    last_time,
    ours,
    wait_events,
    wait_in_force,
)

from lab import layout
from lab.daemon import Daemon
from lab.flood import Flood, FloodReport
from lab.layout import FAMILIES, FamilyName
from lab.node import TOOLS, BackendName, Node
from lab.saved import TABLES
from lab.traffic import Connection, Probe, connect, connect_all, serve, serve_cluster
from lab.waiting import wait_for

pytestmark = pytest.mark.kernel

CAPTURE = CAPTURES / "kp126-{backend}-3svc"
NODEPORT, RELAY = 31002, 30001
HEAD = '[daemon]\nresync = "1h"\n'
# What is shut for strangers in every configuration with which a flood must not get through.
SET = '[set.friends]\nentries = ["10.90.0.7", "fd90::7"]\n'
PORT = f"""
[[port]]
name = "vault"
ports = [{NODEPORT}]
allow = ["@friends"]
"""
OTHERS = f"""
[[port]]
name = "relay"
ports = [{RELAY}, 8200]
allow = ["@friends"]
action = "redirect"

[[port]]
name = "kubelet"
ports = [10250]
action = "reject"

[[rule]]
name = "raw"
table = "raw"
chain = "PREROUTING"
rule = "-p udp --dport 9 -j DROP"
"""
CONFIG = HEAD + SET + PORT + OTHERS


def rules(node: Node) -> list[str]:
    """Everything that iptables-save prints, in both families, without counters and dates."""
    saved = [line for family in FAMILIES for line in [family, *node.rules(family).splitlines()]]
    return [re.sub(r" \[\d+:\d+\]$", "", line) for line in saved if not line.startswith("#")]


def sets(node: Node) -> str:
    return node.run("ipset save | sed 's/ initval .*//' | sort").stdout


def packets_seen(daemon: Daemon) -> dict[tuple[str, str, str, int], int]:
    """The packet counter of each rule of ours, by where it stands."""
    rows = json.loads(daemon.ctl("show", "--json").stdout)["rules"]
    return {(r["family"], r["table"], r["chain"], r["position"]): r["packets"] for r in rows}


def knock(node: Node) -> list[bool]:
    """Whether a stranger, and then a friend, gets in at the NodePort, in each family."""
    probes = [
        Probe("client", (layout.NODE.of(family), NODEPORT), source.of(family))
        for source in (layout.STRANGER, layout.ALLOWED)
        for family in FAMILIES
    ]
    return [answer.open for answer in connect_all(node, probes)]


SHUT = [False, False, True, True]


@contextmanager
def nothing_passes(node: Node, family: FamilyName) -> Iterator[None]:
    """Flood the NodePort from a stranger meanwhile: not one packet may reach a pod."""
    target, source = (layout.NODE.of(family), NODEPORT), layout.STRANGER.of(family)
    flood = Flood(node, "client", source=source, to=target, protocol="tcp", sinks=["pod1", "pod2"], sink_port=8080)
    with flood:
        yield
        report: FloodReport = flood.stop()
    assert report.sent > 100
    assert report.ranges() == []


@pytest.fixture
def guarded(kube_node: Node) -> Iterator[Daemon]:
    """A node with kube-proxy's rules and listeners, and a daemon that is in force."""
    serve_cluster(kube_node)
    with Daemon(kube_node, CONFIG) as daemon:
        yield daemon.wait_ready()


@pytest.fixture
def unshielded(kube_node: Node) -> Iterator[Daemon]:
    """The same without a shield, for what begins while our rules in iptables are gone: it would not let it begin."""
    serve_cluster(kube_node)
    with Daemon(kube_node, {"nodewalld.toml": CONFIG, "conf.d/shield.toml": '[daemon]\nshield = "off"\n'}) as daemon:
        yield daemon.wait_ready()


# --- the rules outlive the daemon


def test_after_kill_9_the_rules_stay_and_the_next_daemon_changes_nothing(kube_node: Node) -> None:
    serve_cluster(kube_node)
    log = WriteLog(kube_node)
    with Daemon(kube_node, CONFIG, env=log.env) as daemon:
        daemon.wait_ready()
        assert knock(kube_node) == SHUT
        before, counted, written = rules(kube_node), packets_seen(daemon), len(log)
        assert sum(counted.values()) > 0
        assert written > 0
        daemon.kill9()
        assert rules(kube_node) == before
        assert knock(kube_node) == SHUT
        moved = generation(kube_node)
        for family in FAMILIES:
            with nothing_passes(kube_node, family):
                daemon.start()
                daemon.wait_ready()
                assert ask(daemon, "status")["state"] == "enforcing"
                daemon.kill9()
        daemon.start()
        daemon.wait_ready()
        assert len(log) == written
        assert generation(kube_node) == moved + 1 + len(FAMILIES)  # each takes the shield over as it is
        assert in_force(daemon)
        assert rules(kube_node) == before
        now = packets_seen(daemon)
        assert {rule: now[rule] >= count for rule, count in counted.items()} == dict.fromkeys(counted, True)
        assert events(daemon, "repair") == []


def test_without_its_state_it_writes_anew_and_leaves_no_gap(guarded: Daemon) -> None:
    node = guarded.node
    before = rules(node)
    for family in FAMILIES:
        guarded.kill9()
        for file in guarded.state_directory.iterdir():
            file.unlink()
        with nothing_passes(node, family):
            guarded.start()
            guarded.wait_ready()
        wait_in_force(guarded)
        assert sorted(rules(node)) == sorted(before)


def test_sigterm_keeps_the_rules(guarded: Daemon) -> None:
    before, all_sets = rules(guarded.node), sets(guarded.node)
    assert guarded.stop() == 0
    assert [notice.value for notice in guarded.noticed("STOPPING")] == ["1"]
    assert rules(guarded.node) == before
    assert sets(guarded.node) == all_sets
    assert knock(guarded.node) == SHUT


def test_once_enforces_and_leaves(kube_node: Node) -> None:
    with Daemon(kube_node, CONFIG, args=["--once"]) as daemon:
        assert daemon.wait() == 0
        assert in_force(daemon)
        daemon.configure(CONFIG + REFUSED_BY_THE_KERNEL)
        daemon.start()
        assert daemon.wait() == 1
        assert "REJECT" in daemon.log_text() or "restore" in daemon.log_text()


# --- reloads

REFUSED_BY_THE_KERNEL = """
[[rule]]
name = "reject-in-mangle"
table = "mangle"
chain = "PREROUTING"
rule = "-p tcp --dport 9 -j REJECT"
"""


def test_a_reload_that_one_table_refuses_leaves_every_table_as_it_was(guarded: Daemon) -> None:
    node = guarded.node
    before, all_sets = rules(node), sets(node)
    # Something new for every table, and sets: mangle is written last, when the others have been.
    changed = CONFIG.replace("30001, 8200", "30001, 8200, 8201").replace("--dport 9", "--dport 10")
    changed = changed.replace('"10.90.0.7"', '"10.90.0.7", "10.90.0.8"') + REFUSED_BY_THE_KERNEL
    changed += '\n[set.more]\nentries = ["192.0.2.1"]\n[[port]]\nname = "more"\nports = [7]\nallow = ["@more"]\n'
    changed += '\n[[rule]]\nname = "f"\ntable = "filter"\nchain = "INPUT"\nrule = "-p udp --dport 7 -j REJECT"\n'
    result = guarded.reload(changed)
    assert result.returncode == 1
    assert re.search(r"ip6?tables-(nft|legacy)-restore: .*(RULE_APPEND failed|line \d+ failed)", result.stderr)
    assert rules(node) == before
    assert sets(node) == all_sets
    status = ask(guarded, "status")
    assert status["state"] == "enforcing"
    assert "restore" in status["config"]["error"]
    (refused,) = events(guarded, "refused")
    assert "restore" in refused["what"]
    # The old configuration is still the one that is held.
    node.run("iptables -w -t mangle -F PREROUTING")
    guarded.configure(CONFIG)
    wait_in_force(guarded)
    assert rules(node) == before
    assert guarded.reload().returncode == 0
    assert ask(guarded, "status")["config"]["error"] is None


def test_a_broken_file_is_refused_with_its_line_and_the_old_rules_stay(guarded: Daemon) -> None:
    before, written = rules(guarded.node), ask(guarded, "status")["config"]["generation"]
    for text, line, word in (
        (CONFIG + '\n[[port]]\nname = "x"\nports = [70000]\n', CONFIG.count("\n") + 4, "70000"),
        (CONFIG + "\n[[port\n", CONFIG.count("\n") + 2, ""),
        (CONFIG.replace("resync", "rsync"), 2, "rsync"),
    ):
        result = guarded.reload(text)
        assert result.returncode == 1
        assert f"nodewalld.toml:{line}: " in result.stderr
        assert word in result.stderr
        assert "Traceback" not in result.stderr
        assert rules(guarded.node) == before
    status = ask(guarded, "status")
    assert status["state"] == "enforcing"
    assert "nodewalld.toml:2: " in status["config"]["error"]
    assert status["config"]["generation"] == written
    guarded.configure(CONFIG)
    assert in_force(guarded)


# Pairs of configurations of which each shuts UDP port 31002 of the host behind the node, and of the node itself, for
# strangers; reloading one after the other must never open it.
TRANSIT = f"""
[[forward]]
name = "transit"
in = "eth0"
source = "!@friends"
protocol = "udp"
ports = [{NODEPORT}]
action = "ACTION"
POSITION
"""


def transit(action: str = "drop", position: str = "") -> str:
    return HEAD + SET + TRANSIT.replace("ACTION", action).replace("POSITION", position)


RULE = f"""
[[rule]]
name = "vault"
table = "mangle"
chain = "PREROUTING"
rule = "-p tcp --dport {NODEPORT} -m set ! --match-set friends src -j DROP"
"""
RAW_RULE = RULE.replace("mangle", "raw")
BETWEEN = 'position = { after = ["KUBE-PROXY-FIREWALL"], before = ["KUBE-FORWARD"] }'
VAULT: Mapping[str, str] = {
    "drop": CONFIG,
    "others allowed": CONFIG.replace('"@friends"', '"192.0.2.0/24", "2001:db8:ffff::/48"'),
    "other ports": CONFIG.replace(f"[{NODEPORT}]", f'[1234, {NODEPORT}, "32000-32010"]'),
    "another set": CONFIG.replace("friends", "colleagues"),
    "another name": CONFIG.replace('"vault"', '"renamed"'),
    "reject": CONFIG.replace(PORT, PORT + 'action = "reject"\n'),
    "redirect": CONFIG.replace(PORT, PORT + 'action = "redirect"\n'),
    "a rule": HEAD + SET + RULE,
    "a rule in raw": HEAD + SET + RAW_RULE,
}
CHAIN_OF_RELOADS = [
    "others allowed", "drop", "other ports", "another set", "drop", "another name", "reject", "drop", "redirect",
    "reject", "redirect", "drop", "a rule", "a rule in raw", "a rule", "drop",
]  # fmt: skip
TRANSITS: Mapping[str, str] = {
    "drop": transit(),
    "reject": transit("reject"),
    "positioned": transit("drop", BETWEEN),
    "first": transit("drop", 'position = "first"'),
    "positioned reject": transit("reject", BETWEEN),
    "content": transit().replace("10.90.0.7", "10.90.0.8"),
}
CHAIN_OF_TRANSITS = [
    "content", "drop", "reject", "drop", "positioned", "positioned reject", "first", "drop", "positioned", "reject",
    "positioned", "drop",
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_no_packet_of_a_flood_passes_while_reloads_change_what_shuts_a_port(
    guarded: Daemon, family: FamilyName
) -> None:
    with nothing_passes(guarded.node, family):
        for name in CHAIN_OF_RELOADS:
            result = guarded.reload(VAULT[name])
            assert result.returncode == 0, f"{name}: {result.stderr}"
    assert ask(guarded, "status")["state"] == "enforcing"
    assert in_force(guarded)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_packet_of_a_flood_passes_while_reloads_move_a_forward_entry(guarded: Daemon, family: FamilyName) -> None:
    assert guarded.reload(TRANSITS["drop"]).returncode == 0
    target, source = (layout.BEYOND.of(family), NODEPORT), layout.STRANGER.of(family)
    with Flood(guarded.node, "client", source=source, to=target, sinks=["beyond"]) as flood:
        for name in CHAIN_OF_TRANSITS:
            result = guarded.reload(TRANSITS[name])
            assert result.returncode == 0, f"{name}: {result.stderr}"
        report = flood.stop()
    assert report.sent > 100
    assert report.ranges() == []
    friend = Probe("client", (layout.BEYOND.of(family), 443), layout.ALLOWED.of(family))
    assert connect_all(guarded.node, [friend])[0].open


def test_sighup_reloads_and_says_so(guarded: Daemon) -> None:
    generation_before, since = ask(guarded, "status")["config"]["generation"], last_time(guarded)
    guarded.configure(CONFIG + '[[port]]\nname = "more"\nports = [7]\n')
    guarded.signal(signal.SIGHUP)
    wait_events(guarded, bool, "reload", since=since)
    wait_for(lambda: ask(guarded, "status")["config"]["generation"] == generation_before + 1)
    wait_in_force(guarded)
    reloading = guarded.wait_notice("RELOADING")
    guarded.wait_notice("READY", after=reloading.when)
    assert int(guarded.noticed("MONOTONIC_USEC")[-1].value) <= reloading.when * 1e6 + 1000
    guarded.configure("[[port\n")
    guarded.signal(signal.SIGHUP)
    wait_events(guarded, bool, "refused", since=since)
    assert ask(guarded, "status")["state"] == "enforcing"
    assert "nodewalld.toml:1: " in ask(guarded, "status")["config"]["error"]


# --- flows


@pytest.mark.parametrize("family", FAMILIES)
def test_a_flow_that_began_in_a_gap_of_a_redirect_is_dead_after_the_repair(
    unshielded: Daemon, family: FamilyName
) -> None:
    node, tool = unshielded.node, TOOLS[family]
    serve(node, "node", tcp=[8200])
    address, stranger, friend = layout.NODE.of(family), layout.STRANGER.of(family), layout.ALLOWED.of(family)
    ssh = Connection(node, "client", source=stranger, to=(address, 22))
    allowed = Connection(node, "client", source=friend, to=(address, RELAY))
    assert not connect(node, "client", source=stranger, to=(address, RELAY)).open
    at_rest(unshielded)
    since = last_time(unshielded)
    unshielded.signal(signal.SIGSTOP)
    for table, chain in (("nat", "PREROUTING"), *(("mangle", c) for c in ("PREROUTING", "INPUT", "FORWARD"))):
        numbers = [n for n, text in enumerate(node.chain(table, chain, family), 1) if "nodewalld:" in text]
        for number in reversed(numbers):
            node.run([tool, "-w", "-t", table, "-D", chain, str(number)])
    through_dnat = Connection(node, "client", source=stranger, to=(address, RELAY))
    listener = Connection(node, "client", source=stranger, to=(address, 8200))
    assert through_dnat.alive()
    assert listener.alive()
    all_is_acknowledged(node)
    unshielded.signal(signal.SIGCONT)
    repairs = wait_events(
        unshielded, lambda seen: sum(event["flows_deleted"] for event in seen) >= 1, "repair", since=since
    )
    # The listener's flow is not deleted but starved, see the next test.
    assert sum(event["flows_deleted"] for event in repairs) == 1
    assert all(event["table"] == "nat" for event in repairs if event["flows_deleted"])
    wait_in_force(unshielded)
    assert not through_dnat.alive(timeout=1)
    assert not listener.alive(timeout=1)
    assert allowed.alive()
    assert ssh.alive()


def all_is_acknowledged(node: Node) -> None:
    """Wait for the delayed acknowledgements: nobody has anything to say again."""
    for ns in ("node", "pod1", "pod2"):
        wait_for(lambda ns=ns: "unacked:" not in node.run("ss -tino state established", ns=ns).stdout, what="ACKs")


def test_a_flow_whose_server_repeats_itself_after_the_repair_is_dead_as_well(unshielded: Daemon) -> None:
    """Were it deleted, conntrack would take the server's repetition for the beginning of a flow of the server's own."""
    node, stranger, address = unshielded.node, layout.STRANGER.ipv4, layout.NODE.ipv4
    serve(node, "node", tcp=[8200])
    at_rest(unshielded)
    since = last_time(unshielded)
    unshielded.signal(signal.SIGSTOP)
    for table, chain in (("nat", "PREROUTING"), ("mangle", "PREROUTING"), ("mangle", "INPUT")):
        for rule in [text for text in node.chain(table, chain) if "nodewalld:" in text]:
            node.run(f"iptables -w -t {table} -D {chain} {rule}")
    flow = Connection(node, "client", source=stranger, to=(address, 8200))
    deaf = "INPUT -p tcp --sport 8200 -j DROP"
    node.run(f"iptables -w -A {deaf}", ns="client")
    assert not flow.alive(timeout=0.3)  # the answer is on its way, and will be sent again
    unshielded.signal(signal.SIGCONT)
    wait_events(unshielded, bool, "repair", since=since)
    wait_in_force(unshielded)
    node.run(f"iptables -w -D {deaf}", ns="client")
    assert not flow.alive(timeout=3)


# --- side by side


def test_two_daemons_in_two_nodes_do_not_disturb_each_other(laboratory: None, backend: BackendName) -> None:
    with Node(backend) as one, Node(backend) as other:
        for node in (one, other):
            node.load(CAPTURE)
        with Daemon(one, CONFIG) as first, Daemon(other, CONFIG.replace(str(NODEPORT), "31003")) as second:
            first.wait_ready()
            second.wait_ready()
            moved, untouched = generation(other), rules(other)
            one.run("iptables -w -t mangle -F; ip6tables -w -t mangle -F")
            wait_in_force(first)
            assert events(first, "repair")
            assert events(second, "repair") == []
            assert generation(other) == moved
            assert rules(other) == untouched
            assert in_force(second)


def test_two_daemons_in_two_namespaces_of_one_node_share_the_xtables_lock_in_peace(node: Node) -> None:
    with Daemon(node, CONFIG) as first, Daemon(node, CONFIG, name="second", ns="client") as second:
        first.wait_ready()
        second.wait_ready()
        for n, (mine, theirs) in enumerate([(first, second), (second, first)]):
            quiet = len(events(theirs, "repair"))
            for _ in range(5):
                node.run("iptables -w -t mangle -F PREROUTING", ns=mine.ns)
            wait_events(mine, bool, "repair")
            wait_in_force(mine)
            assert len(events(theirs, "repair")) == quiet, n
            assert in_force(theirs)


def test_a_second_daemon_with_the_same_runtime_folder_is_refused(guarded: Daemon) -> None:
    node = guarded.node
    before = rules(node)
    folders = ["--config", guarded.config_directory, "--state-dir", node.directory / "other"]
    command = [node.python(), "-m", "nodewalld.commands.daemon", *folders, "--runtime-dir", guarded.runtime_directory]
    for more in ([], ["--once"]):
        result = node.run([*map(str, command), *more], check=False)
        assert result.returncode == 1
        assert "already running" in result.stderr
        assert "Traceback" not in result.stderr
    assert ask(guarded, "status")["state"] == "enforcing"
    assert rules(node) == before


# --- taking it all out


def test_remove_takes_out_all_of_ours_and_nothing_else(guarded: Daemon) -> None:
    node = guarded.node
    foreign = node.snapshot()
    assert guarded.ctl("status").returncode == 0
    assert ours(node)
    result = guarded.ctl("remove")
    assert result.returncode == 0, result.stderr
    assert ours(node) == []
    assert node.snapshot() == foreign
    status = guarded.ctl("status")
    assert (status.returncode, "idle" in status.stdout) == (3, True)
    # Nothing brings it back to work but a reload.
    moved = generation(node)
    node.run("iptables -w -t mangle -N FOREIGN; iptables -w -t mangle -X FOREIGN")
    node.run("ip link add veth9 type veth peer name veth10; ip link del veth9")
    idle_since = time.monotonic()
    wait_for(lambda: time.monotonic() > idle_since + 1.2)  # the look that legacy takes every second
    assert ours(node) == []
    if node.backend == "nft":
        assert generation(node) == moved + 2
    assert guarded.ctl("status").returncode == 3
    assert guarded.reload().returncode == 0
    assert guarded.ctl("status").returncode == 0
    assert in_force(guarded)
    assert node.snapshot() == foreign
    guarded.stop()
    status = guarded.ctl("status")
    assert (status.returncode, "not running" in status.stderr) == (4, True)


def test_remove_needs_no_daemon_nor_its_state(guarded: Daemon) -> None:
    node = guarded.node
    foreign = node.snapshot()
    guarded.kill9()
    assert guarded.ctl("remove").returncode == 0
    assert ours(node) == []
    assert node.snapshot() == foreign
    guarded.start()
    guarded.wait_ready()
    guarded.kill9()
    for file in guarded.state_directory.iterdir():
        file.unlink()
    assert guarded.ctl("remove").returncode == 0
    left = ours(node)
    assert [line for line in left if "NODEWALL" in line or "nodewalld:" in line] == []
    assert node.snapshot() == foreign


def test_remove_does_not_claim_what_it_could_not_do(laboratory: None) -> None:
    with Node("nft") as node, Daemon(node, CONFIG) as daemon:
        daemon.wait_ready()
        node.run(["nft", "add rule ip6 mangle PREROUTING ct mark 0x5 accept"])
        result = daemon.ctl("remove")
        # IPv4 is out; what ip6tables can't even read any more is still in force, and that is said.
        assert ours_in(node, "ip") == []
        assert ours_in(node, "ip6")
        assert result.returncode == 1
        assert "incompatible" in result.stderr


def ours_in(node: Node, family: str) -> list[str]:
    """What nft shows of ours in one family, also where iptables-save shows nothing."""
    listed = "".join(node.run(f"nft list table {family} {table}", check=False).stdout for table in TABLES)
    return [line for line in listed.splitlines() if "NODEWALL" in line]


def test_a_set_that_somebody_made_by_hand_is_told_of_and_never_taken(node: Node) -> None:
    node.run("ipset create friends hash:ip; ipset add friends 192.0.2.77")
    by_hand = sets(node)
    with Daemon(node, CONFIG) as daemon:
        daemon.wait_ready()
        status = ask(daemon, "status")
        assert status["state"] == "degraded"
        assert "set friends exists already as hash:ip" in " ".join(status["reasons"])
        assert daemon.reload(CONFIG.replace("friends", "colleagues")).returncode == 0
        assert "add friends 192.0.2.77" in sets(node)
        assert ask(daemon, "status")["reasons"] == []
        result = daemon.reload(CONFIG)
        assert result.returncode == 1
        assert "set friends exists already as hash:ip" in result.stderr
        assert daemon.ctl("remove").returncode == 0
        assert sets(node) == by_hand
