"""`nodewallctl trace` shows what real packets meet, and leaves nothing behind, whatever dies."""

import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import seed000
from captured import add_capture
from live import asleep, events, ours, wait_in_force
from packets import dial

from lab.daemon import Daemon
from lab.layout import ALLOWED, FAMILIES, NODE, POD1, STRANGER
from lab.node import BackendName, Node
from lab.processes import inner_pid, kill_entered
from lab.traffic import Probe, connect_all, serve, serve_cluster
from lab.waiting import LabError, wait_for
from nodewalld.commands import ctl
from nodewalld.commands.trace import EXAMPLES
from nodewalld.core.tracing.traffic import RATE, Traffic
from nodewalld.core.words import Family

pytestmark = pytest.mark.kernel

MANUAL = Path(__file__).parents[1] / "docs/trace.md"
SEED = Path(__file__).with_name("seed-000.path").read_text().split()
NAME_OF_LOG = "trace"
# `nodewallctl` as it is on a kernel before 5.12, which knows no tables that die with their socket.
OLD_KERNEL = """
import sys
from nodewalld.commands.ctl import main
from nodewalld.kernel import trace
def refused(traffic):
    raise trace.NoOwner
trace.TraceTable = refused
sys.exit(main())
"""
CONFIG = """
[[port]]
name = "vault"
ports = [31002]
allow = ["10.90.0.0/24"]

[[rule]]
name = "first-of-all"
table = "raw"
chain = "PREROUTING"
rule = "-p udp --dport 4789 -j DROP"
position = "first"
"""


class Trace:
    """A running `nodewallctl trace`, from when it follows packets."""

    def __init__(self, node: Node, *argv: str, old_kernel: bool = False) -> None:
        self.node = node
        self._log = f"{NAME_OF_LOG}-{len(node.logs)}"
        code = ["-c", OLD_KERNEL] if old_kernel else ["-m", "nodewalld.commands.ctl"]
        command = [node.python(), *code, "trace", *argv]
        self.process = node.popen(command, log=self._log, stdout=subprocess.PIPE)
        wait_for(self._follows, what="nodewallctl trace to follow packets")

    def _follows(self) -> bool:
        if self.process.poll() is not None:
            raise LabError(f"trace has ended with {self.process.returncode}: {self.told}")
        return "Following" in self.told

    @property
    def told(self) -> str:
        """What it said to people beside its output."""
        return self.node.logs[self._log].read_text()

    @property
    def keeper(self) -> int:
        """The process that keeps its rule."""
        pid = inner_pid(self.process)
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def interrupt(self) -> None:
        kill_entered(self.process, signal.SIGINT)

    def line(self) -> str:
        """The next line of its output, while it runs."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, self.told
        return line.rstrip("\n")

    def end(self) -> str:
        """Its output, when it has ended as it should."""
        output, _ = self.process.communicate(timeout=30)
        assert self.process.returncode == 0, self.told
        return output

    def packets(self) -> list[dict[str, Any]]:
        """With --json: the packets that it has shown, when it has ended."""
        return [json.loads(line) for line in self.end().splitlines()]


def path(packet: dict[str, Any]) -> list[str]:
    """As the kernel's log writes it, with the numbers of rules."""
    steps = packet["steps"]
    return [":".join([s["table"], s["chain"], s["kind"], *([str(s["number"])] if s["number"] else [])]) for s in steps]


def everything(node: Node) -> list[str]:
    """Every rule and native table of both backends, and both families' loggers."""
    lines = [
        line
        for family in FAMILIES
        for backend in ("nft", "legacy")
        for line in node.rules(family, backend="nft" if backend == "nft" else "legacy").splitlines()
        if not line.startswith(("#", "*", ":", "COMMIT"))
    ]
    rest = node.run(
        "nft list tables | grep -v '^table ip6\\? '; grep -E '^ ?(2|10) ' /proc/net/netfilter/nf_log", check=False
    )
    return [*lines, *rest.stdout.splitlines()]


@pytest.fixture(scope="module", params=["nft", "legacy"])
def seed_node(laboratory: None, request: pytest.FixtureRequest) -> Iterator[Node]:
    """Seed 000's node in both families, with the pod that the NodePort leads to."""
    with Node("nft" if request.param == "nft" else "legacy") as node:
        for family in FAMILIES:
            seed000.put(node, family)
        serve(node, "pod1", tcp=[8200])
        yield node


def from_node(family: str) -> Probe:
    return Probe("node", (NODE.of(family), 31002))


@pytest.mark.parametrize("family", FAMILIES)
def test_seed_000_is_told_as_in_its_log_but_by_texts(seed_node: Node, family: str) -> None:
    before = everything(seed_node)
    trace = Trace(
        seed_node, "tcp", "--dport", "31002", "--to", NODE.of(family), "--from-node", "--count", "1", "--json"
    )
    assert connect_all(seed_node, [from_node(family)])[0].open
    (packet,) = trace.packets()
    # The log's numbers of policies and returns are those of the rules above them, plus one.
    in_the_log = [line if ":rule:" in line else line.rpartition(":")[0] for line in SEED]
    assert path(packet)[: len(in_the_log)] == in_the_log
    for step in packet["steps"]:
        if step["kind"] == "rule":
            assert step["sure"]
            assert (
                step["rule"]
                == seed_node.chain(step["table"], step["chain"], "ipv4" if family == "ipv4" else "ipv6")[
                    step["number"] - 1
                ]
            )
    changes = [step["packet"] for step in packet["steps"] if step["packet"]]
    assert (packet["destination"], packet["dport"]) == (NODE.of(family), 31002)
    assert [(change["destination"], change["dport"]) for change in changes] == [(POD1.of(family), 8200)]
    assert [step["mark"] for step in packet["steps"] if step["mark"] is not None][:1] == [0x4000]
    assert everything(seed_node) == before


def test_people_get_texts_in_80_columns_as_it_happens(seed_node: Node) -> None:
    trace = Trace(seed_node, "tcp", "--dport", "31000-31005", "--from-node", "--to", "10.90.0.0/24", "--for", "1h")
    connect_all(seed_node, [from_node("ipv4")])
    shown = []
    while not any(line.startswith("  =>") for line in shown):
        shown.append(trace.line())
    trace.interrupt()
    text = "\n".join([*shown, trace.end(), trace.told])
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert re.match(r"\d\d:\d\d:\d\d\.\d{3} IPv4 tcp 10\.90\.0\.1:\d+ -> 10\.90\.0\.1:31002 SYN", shown[0])
    flat = re.sub(r"\s+", " ", text)
    assert 'nat KUBE-SERVICES -m comment --comment "kubernetes service nodeports; NOTE: this must be the' in flat
    assert '-p tcp -m comment --comment "vault/vault:http" -m tcp -j DNAT --to-destination 10.42.0.2:8200' in flat
    assert re.search(r"now tcp 10\.90\.0\.1:\d+ -> 10\.42\.0\.2:8200", flat)
    assert re.search(r"packets? followed", trace.told)


def test_the_manual_shows_what_is_shown(seed_node: Node) -> None:
    """In both backends alike, but for the places where the kernel tells of interfaces."""
    trace = Trace(seed_node, "tcp", "--dport", "31002", "--to", NODE.ipv4, "--from-node", "--count", "1")
    connect_all(seed_node, [from_node("ipv4")])

    def plain(text: str) -> list[str]:
        text = re.sub(r"10\.90\.0\.1:\d+ -", "", re.sub(r"^[\d:.]+", "", text.strip()))
        return [line for line in text.splitlines() if not line.startswith("  now out")]

    documented = re.findall(r"```text\n(.*?)```", MANUAL.read_text(), re.DOTALL)[0]
    *steps, _ = plain(documented)
    assert plain(trace.end())[: len(steps)] == steps


def test_only_what_was_asked_for_is_followed(seed_node: Node) -> None:
    asked = ["udp", "--dport", "5000-5001", "--from", str(STRANGER.ipv4), "--in", f"{seed_node.uplink[:-1]}+", "--json"]
    trace = Trace(seed_node, *asked, "--count", "2")
    others = [dial(ALLOWED, "ipv4", NODE, 5000, "udp"), dial(STRANGER, "ipv6", NODE, 5000, "udp")]
    others += [dial(STRANGER, "ipv4", NODE, 5002, "udp"), dial(STRANGER, "ipv4", NODE, 5000)]
    connect_all(seed_node, others, timeout=0.2)
    connect_all(seed_node, [dial(STRANGER, "ipv4", NODE, port, "udp") for port in (5000, 5001)], timeout=0.2)
    packets = trace.packets()
    assert {(p["protocol"], p["source"], p["dport"], p["in"]) for p in packets} <= {
        ("udp", STRANGER.ipv4, port, seed_node.uplink) for port in (5000, 5001)
    }
    assert all(packet["outcome"] == "delivered to this node" for packet in packets)


def test_of_a_busy_port_only_some_packets_are_followed(seed_node: Node) -> None:
    trace = Trace(seed_node, "udp", "--dport", "6000-6199", "--for", "1s", "--json")
    connect_all(seed_node, [dial(STRANGER, "ipv4", NODE, 6000 + n, "udp") for n in range(200)], timeout=0.1)
    assert 0 < len(trace.packets()) <= 2 * RATE + 1
    assert "steps are missing" not in trace.told


def test_icmp_is_followed_in_both_families(seed_node: Node) -> None:
    trace = Trace(seed_node, "icmp", "--json", "--for", "1h")
    connect_all(seed_node, [dial(STRANGER, family, NODE, 0, "icmp") for family in FAMILIES])
    seen = set()
    while not {"icmp", "icmpv6"} <= seen:
        packet = json.loads(trace.line())
        seen |= {packet["protocol"]} if packet["detail"] == "echo request" else set()
    trace.interrupt()
    trace.end()


@pytest.fixture
def kube(laboratory: None, backend: BackendName) -> Iterator[Node]:
    with Node(backend) as node:
        add_capture(node, "kp126-{backend}-3svc")
        serve_cluster(node)
        yield node


def test_our_rules_bear_the_names_of_their_entries_and_are_not_disturbed(kube: Node) -> None:
    daemon = Daemon(kube, CONFIG).wait_ready()
    before = everything(kube)
    trace = Trace(kube, "tcp", "--dport", "31002", "--from", STRANGER.ipv4, "--count", "1", "--json")
    wait_in_force(daemon)
    connect_all(kube, [dial(STRANGER, "ipv4", NODE, 31002)], timeout=0.2)
    (packet,) = trace.packets()
    assert packet["verdict"] == "drop"
    assert packet["outcome"] == "dropped by port/vault, in the shield (ipv4-refuse-port/vault)"
    assert all(
        step["entry"] for step in packet["steps"] if step["chain"].startswith("NODEWALL") and step["kind"] == "rule"
    )
    assert all("nodewalld:" not in step["rule"] for step in packet["steps"])
    wait_in_force(daemon)
    assert everything(kube) == before
    assert events(daemon, "repair") == []


def test_nothing_is_left_after_kill_9_of_everything_and_a_restart(kube: Node) -> None:
    daemon = Daemon(kube, CONFIG).wait_ready()
    before = everything(kube)
    trace = Trace(kube, "tcp", "--dport", "31002", "--for", "1h", old_kernel=kube.backend == "nft")
    asleep(daemon)
    during = everything(kube)
    daemon.kill9()
    os.kill(trace.keeper, signal.SIGKILL)
    kill_entered(trace.process)
    trace.process.wait(10)
    left = [line for line in during if "inet nodewalld-trace-" not in line]  # that one goes with its socket
    assert everything(kube) == left != before
    assert any("nodewalld:trace/" in line for line in left)
    daemon.start()
    daemon.wait_ready()
    assert everything(kube) == before


def test_nothing_is_left_after_kill_9_of_the_command_and_its_job(kube: Node) -> None:
    """On nft the kernel ends it, at once and though nobody is left; else its keeper does."""
    before = everything(kube)
    trace = Trace(kube, "tcp", "--dport", "31002", "--for", "1h")
    during = everything(kube)
    assert during != before
    os.killpg(trace.process.pid, signal.SIGKILL)  # as a shell kills a job
    trace.process.wait(10)
    if kube.backend == "nft":
        assert any("table inet nodewalld-trace-" in line for line in during)
        assert not any("nodewalld:" in line for line in during)
        assert everything(kube) == before
    wait_for(lambda: everything(kube) == before, what="the keeper to take everything out")


def test_what_is_left_goes_with_the_next_trace_and_with_remove(kube: Node) -> None:
    before = everything(kube)
    command = ["remove"] if kube.backend == "nft" else ["trace", "tcp", "--for", "1s"]
    trace = Trace(kube, "tcp", "--for", "1h", old_kernel=kube.backend == "nft")
    os.kill(trace.keeper, signal.SIGKILL)
    kill_entered(trace.process)
    trace.process.wait(10)
    assert everything(kube) != before
    kube.run([kube.python(), "-m", "nodewalld.commands.ctl", *command, "--state-dir", "/run/state"])
    assert everything(kube) == before


def test_a_rule_that_nobody_takes_out_does_nothing_after_its_end(node: Node) -> None:
    now = datetime.now(UTC)
    for hours in (-1, 1):
        rule = Traffic("tcp", from_node=True).rule(Family.IPV4, f"{hours}/-", now + timedelta(hours=hours))
        node.run([f"iptables-{node.backend}", "-t", "raw", "-A", "OUTPUT", *rule])
    connect_all(node, [from_node("ipv4")], timeout=0.2)
    saved = node.run([f"iptables-{node.backend}-save", "-c", "-t", "raw"]).stdout
    packets = {
        word: int(count) for count, word in re.findall(r"^\[(\d+):.*nodewalld:trace/(\S+?)/", saved, re.MULTILINE)
    }
    assert packets["-1"] == 0 < packets["1"]


def test_a_daemon_leaves_a_trace_alone_that_is_under_way(kube: Node) -> None:
    daemon = Daemon(kube, CONFIG).wait_ready()
    argv = ["tcp", "--dport", "31002", "--from", STRANGER.ipv4, "--for", "1h", "--count", "1", "--json"]
    trace = Trace(kube, *argv, old_kernel=kube.backend == "nft")
    daemon.restart()
    wait_in_force(daemon)
    assert ours(kube)
    connect_all(kube, [dial(STRANGER, "ipv4", NODE, 31002)], timeout=0.2)
    assert len(trace.packets()) == 1
    assert events(daemon, "repair") == []
    assert not any("nodewalld:trace/" in line for line in everything(kube))


def test_a_kernel_without_owned_tables_shows_the_same_by_a_rule(laboratory: None) -> None:
    with Node("nft") as node:
        seed000.put(node)
        paths = []
        for old_kernel in (False, True):
            trace = Trace(node, "tcp", "--from-node", "--count", "1", "--json", old_kernel=old_kernel)
            connect_all(node, [from_node("ipv4")], timeout=0.2)
            paths.append(path(trace.packets()[0]))
        assert paths[0] == paths[1]


def test_both_backends_are_told_in_one_path(laboratory: None) -> None:
    """And tables that are not iptables' at all, in nft's words."""
    with Node("legacy") as node:
        node.run("iptables-legacy -t mangle -A PREROUTING -p tcp --dport 31002 -j MARK --set-mark 7")
        node.run("iptables-nft -A INPUT -p tcp --dport 31002 -j ACCEPT")
        node.run(
            ["nft", "-f", "-"],
            stdin="""
            table inet theirs { chain c { type filter hook input priority 10; tcp dport 31002 counter drop; }; }
        """,
        )
        trace = Trace(node, "tcp", "--dport", "31002", "--count", "1", "--json")
        connect_all(node, [dial(STRANGER, "ipv4", NODE, 31002)], timeout=0.2)
        (packet,) = trace.packets()
        rules = [(s["backend"], s["tables"], s["table"], s["chain"], s["rule"]) for s in packet["steps"] if s["rule"]]
        assert [rule[:4] for rule in rules] == [
            ("legacy", "ip", "mangle", "PREROUTING"),
            ("nft", "ip", "filter", "INPUT"),
            ("nft", "inet", "theirs", "c"),
        ]
        assert rules[-1][-1].startswith("tcp dport 31002 counter")
        assert packet["outcome"] == "dropped in theirs c"
        assert packet["steps"][0]["number"] is None
        people = Trace(node, "tcp", "--dport", "31002", "--count", "1")
        connect_all(node, [dial(STRANGER, "ipv4", NODE, 31002)], timeout=0.2)
        shown = people.end()
        assert "  mangle PREROUTING (legacy)\n" in shown
        assert "  inet theirs c (nft)\n" in shown


@pytest.mark.parametrize("before", ["NONE", "nfnetlink_log", "nf_log_ipv4"])
def test_the_logger_of_the_legacy_backend_is_put_back(laboratory: None, before: str) -> None:
    with Node("legacy") as node:
        node.run("iptables-legacy -A INPUT -p tcp")
        node.sysctl("net.netfilter.nf_log.2", before)
        trace = Trace(node, "tcp", "--from-node", "--for", "1h")
        assert "2 nfnetlink_log" in node.run("cat /proc/net/netfilter/nf_log").stdout
        other = node.run([node.python(), "-m", "nodewalld.commands.ctl", "trace", "tcp"], check=False)
        assert other.returncode == 1
        assert "NFLOG group 0 belongs to another program" in other.stderr
        trace.interrupt()
        trace.end()
        assert f"2 {before} " in node.run("cat /proc/net/netfilter/nf_log").stdout


def test_the_command_stands_in_for_a_keeper_that_was_killed(laboratory: None) -> None:
    with Node("legacy") as node:
        node.run("iptables-legacy -A INPUT -p tcp")
        before = everything(node)
        trace = Trace(node, "tcp", "--for", "1h")
        os.kill(trace.keeper, signal.SIGKILL)
        assert everything(node) != before
        trace.interrupt()
        trace.end()
        assert everything(node) == before


def test_the_examples_of_help_and_manual_run(laboratory: None) -> None:
    manual = re.findall(r"^# (nodewallctl trace [^#\n]*[^# \n])", MANUAL.read_text(), re.MULTILINE)
    assert manual
    with Node("nft", uplink="ens18") as node:
        node.run("iptables-nft -A INPUT -p tcp --dport 22 -j ACCEPT")
        nothing = Trace(node, "tcp", "--dport", "9", "--for", "1s")
        traces = [Trace(node, *example.split()[2:]) for example in dict.fromkeys((*EXAMPLES, *manual))]
        for trace in traces:
            trace.interrupt()
            trace.end()
        assert nothing.end() == ""
        assert "No such packet was seen." in nothing.told


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["icmp", "--dport", "1"], "--dport is for tcp, udp and sctp"),
        (["tcp", "--from-node", "--in", "eth0"], "--in is for packets that come in"),
        (["tcp", "--from", "192.0.2.1", "--to", "::1"], "--from and --to are of different families"),
        (["tcp", "--dport", "70000"], "'70000' is no port"),
        (["tcp", "--dport", "9-8"], "is an empty range"),
        (["tcp", "--from", "host"], "'host' is no address and no CIDR"),
        (["tcp", "--in", "-j"], "expected one argument"),
        (["tcp", "--in", "a b"], "'a b' is no name of an interface"),
        (["tcp", "--count", "0"], "'0' is not a number from 1 up"),
        (["tcp", "--for", "10"], "'10' is no time"),
        (["gre"], "invalid choice: 'gre'"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(argv: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        assert ctl.main(["trace", *argv]) == 2
    assert error in capsys.readouterr().err


def test_a_node_without_rules_is_told_so(laboratory: None) -> None:
    with Node("nft") as node:
        done = node.run([node.python(), "-m", "nodewalld.commands.ctl", "trace", "tcp"], check=False)
        assert done.returncode == 1
        assert "this node has no rules in any backend" in done.stderr
        assert everything(node) == [line for line in everything(node) if "nf_log" in line]
