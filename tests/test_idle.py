"""Silence costs nothing: on an unchanged node no process is started and next to no processor time is used."""

import contextlib
import time
from collections.abc import Iterator

import pytest
from entries import DOCKER_USER, FRIENDS, RELAY, VAULT
from live import WriteLog, ask, at_rest, events

from lab.daemon import Daemon
from lab.node import TOOLS, Node
from lab.waiting import wait_for

pytestmark = pytest.mark.kernel

CONFIG = f"""
[daemon]
resync = "1s"
{FRIENDS}{VAULT}{RELAY}
[[port]]
name = "kubelet"
ports = [10250]
action = "reject"

[[forward]]
name = "transit"
in = "@default-route"
ports = [31002]
protocol = "tcp"
action = "reject"
position = {{ after = ["KUBE-PROXY-FIREWALL"], before = ["KUBE-FORWARD"] }}
{DOCKER_USER}"""
CPU_MAX = 0.01


def next_pid(node: Node) -> int:
    """The pid that this question itself was given: pids are handed out in order, to threads as well."""
    return int(node.run(["sh", "-c", "echo $$"]).stdout)


@contextlib.contextmanager
def at_work(node: Node) -> Iterator[Daemon]:
    with Daemon(node, CONFIG, watchdog=2) as daemon:
        daemon.wait_ready()
        assert ask(daemon, "status")["reasons"] == []
        at_rest(daemon)
        settled = time.monotonic()
        wait_for(lambda: time.monotonic() > settled + 2)  # what it looks at anew after its own first writes
        yield daemon


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_minute_of_silence_starts_no_process_and_costs_next_to_nothing(laboratory: None, captures) -> None:
    seconds = 60.0
    with Node("nft") as one, Node("legacy") as other:
        for node in (one, other):
            node.load(captures / "kp126-{backend}-3svc")
        with at_work(one) as first, at_work(other) as second:
            both = (first, second)
            before = [(next_pid(d.node), d.cpu_seconds()) for d in both]
            begun = time.monotonic()
            wait_for(lambda: time.monotonic() > begun + seconds, timeout=seconds + 5)
            took = time.monotonic() - begun
            after = [(next_pid(d.node), d.cpu_seconds()) for d in both]
            for daemon, (pid, cpu), (later_pid, later_cpu) in zip(both, before, after, strict=True):
                backend = daemon.node.backend
                assert later_pid - pid == 1, f"{later_pid - pid - 1} processes were started ({backend})"
                assert (later_cpu - cpu) / took < CPU_MAX, backend
                assert events(daemon, "repair", "degraded") == []
                assert ask(daemon, "status")["state"] == "enforcing"


def test_foreign_writes_elsewhere_start_no_process(kube_node: Node) -> None:
    """On nft a chain that is none of ours is not even read; on legacy the whole table is one, and one look tells."""
    with at_work(kube_node) as daemon:
        if kube_node.backend == "legacy":
            # The table's fingerprint moves with every rule in it: only tables that hold nothing of ours are silent.
            lines = ["iptables -w -t raw -A OUTPUT -p tcp --dport 9", "iptables -w -t raw -D OUTPUT -p tcp --dport 9"]
        else:
            lines = [
                f"{tool} -w -t {table} {what}"
                for tool in TOOLS.values()
                for table in ("mangle", "nat", "filter")
                for what in ("-N NOISE", "-A NOISE -j RETURN", "-I NOISE -p tcp", "-F NOISE", "-X NOISE")
            ]
        kube_node.run("\n".join(lines))  # the tables of ip6tables-nft that were not there yet are now
        at_rest(daemon)
        before = next_pid(kube_node)
        for _ in range(3):
            kube_node.run(["sh", "-ec", "\n".join(lines)])
        written = time.monotonic()
        wait_for(lambda: time.monotonic() > written + 1.5)  # and a resync
        own = 3 * (1 + len(lines))
        assert next_pid(kube_node) - before == 1 + own
        assert events(daemon, "repair") == []


def test_foreign_writes_beside_ours_cost_reads_and_no_write(kube_node: Node) -> None:
    log = WriteLog(kube_node)
    with Daemon(kube_node, CONFIG, env=log.env) as daemon:
        daemon.wait_ready()
        written = len(log)
        for tool in TOOLS.values():
            for _ in range(5):
                kube_node.run(f"{tool} -w -A FORWARD -p tcp --dport 9; {tool} -w -D FORWARD -p tcp --dport 9")
        at_rest(daemon)
        assert len(log) == written
        assert events(daemon, "repair") == []
