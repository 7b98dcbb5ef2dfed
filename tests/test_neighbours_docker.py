"""A real dockerd, alone and beside a real firewalld: whatever they do, the rules of the seeds hold, by packets."""

import time
from collections.abc import Iterator

import pytest
from packets import OPEN, REFUSED, TIMEOUT, Guarded, dial, dial_from, expect
from test_packets_neighbours import NODE_TO_PODS, PODS_TO_NODE, SEED_002

from lab import programs
from lab.layout import CLUSTER_NODE_2, FAMILIES, NEIGHBOUR, NODE, POD1, STRANGER
from lab.node import BackendName, Node
from lab.traffic import Probe, Verdict, serve, serve_cluster
from lab.waiting import wait_for

pytestmark = [pytest.mark.kernel, pytest.mark.neighbours]

UPLINK = "ens18"
# 8080 and 8081 are published by a container; who is in no zone's sources is in the uplink's.
SEED_003 = f"""
[zone.trusted]
sources = ["172.18.10.0/24", "fd00:18::/64"]
target = "accept"

[zone.public]
interfaces = ["{UPLINK}"]
services = ["ssh"]
ports = ["8081/tcp"]
target = "drop"

[[jump]]
name = "docker-user"
table = "filter"
from = "FORWARD"
to = "DOCKER-USER"

[[rule]]
name = "published"
table = "filter"
chain = "DOCKER-USER"
rule = "-i {UPLINK} -p tcp -m conntrack --ctorigdstport 8081 -j DROP"
"""

ECHO, PACKETS = 7998, 20
# Each question is asked when the one before has been answered; the last argument says how many.
_ASK = """
import socket, sys
to, asked = (sys.argv[1], int(sys.argv[2])), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
asked.settimeout(10)
for _ in range(int(sys.argv[3])):
    asked.sendto(b"?", to)
    asked.recv(16)
"""


class Host:
    """A node with a container, pods, and nodewalld with the rules of both seeds."""

    def __init__(self, node: Node, *, firewalld: bool) -> None:
        self.node = node
        self._web = ""
        self.firewalld = programs.Firewalld(node, "iptables") if firewalld else None
        if self.firewalld:
            self.firewalld.start()
        self.docker = programs.Docker(node)
        self.docker.start()
        self.docker.run("web", "-p", "8080:80", "-p", "8081:81")
        serve_cluster(node)
        self.allow_pods()
        self.guarded = Guarded(node)
        self.guarded.enforce(SEED_002 + SEED_003)

    def allow_pods(self) -> None:
        """The rules of seed 002's node that its recipe stands between; whoever flushes takes them away."""
        for family, tool in zip(FAMILIES, ("iptables", "ip6tables"), strict=True):
            for rule in (PODS_TO_NODE[family], NODE_TO_PODS[family]):
                self.node.run(f"{tool} -w -I FORWARD {rule}")

    def reload(self) -> bool:
        """Have firewalld read its files again; whether it could (see docs/neighbours.md)."""
        assert self.firewalld is not None
        done = self.node.run(["firewall-cmd", "--reload"], check=False)
        assert done.returncode == 0 or "COMMAND_FAILED" in done.stderr, done.stderr
        return done.returncode == 0

    def settle(self) -> None:
        """Wait until dockerd, which hears of firewalld up to a second later, has put its rules back, and we ours."""
        last, since = "", time.monotonic()

        def quiet() -> bool:
            nonlocal last, since
            if (now := self.node.snapshot()) != last or ":81\n" not in now:
                last, since = now, time.monotonic()
            return time.monotonic() - since > (1.2 if self.firewalld else 0.1)

        wait_for(quiet, timeout=30.0, what="Docker's rules to stay as they are")
        self.guarded.settled()

    def holds(self) -> None:
        """Whether everything is as the seeds want it, now that all is over."""
        wait_for(lambda: self.docker("inspect", "-f", "{{.State.Running}}", "web") == "true\n", what="the container")
        name = "web-" + self.docker("inspect", "-f", "{{.State.Pid}}", "web").strip()
        if name != self._web:  # it was started anew
            self.docker.adopt("web", name)
            serve(self.node, name, tcp=[80, 81])
            self._web = name
        self.settle()
        probes: dict[str, tuple[Probe, Verdict]] = {
            "seed 003, the zone is round a published port": (dial(STRANGER, "ipv4", NODE, 8080), TIMEOUT),
            "seed 003, trusted": (dial(CLUSTER_NODE_2, "ipv4", NODE, 8080), OPEN),
            "seed 003, DOCKER-USER, whom the zone lets in": (dial(STRANGER, "ipv4", NODE, 8081), TIMEOUT),
            "seed 003, DOCKER-USER, trusted": (dial(CLUSTER_NODE_2, "ipv4", NODE, 8081), TIMEOUT),
            "out of the container": (dial_from(name, "ipv4", NEIGHBOUR, 7999), OPEN),
        }
        for family in FAMILIES:
            probes |= {
                f"seed 003, ssh, {family}": (dial(STRANGER, family, NODE, 22), OPEN),
                f"seed 003, etcd, {family}": (dial(STRANGER, family, NODE, 2379), TIMEOUT),
                f"seed 002, a node of the cluster, {family}": (dial(CLUSTER_NODE_2, family, POD1, 8080), OPEN),
                f"seed 002, a neighbour, {family}": (dial(NEIGHBOUR, family, POD1, 8080), REFUSED),
                f"seed 002, a stranger, {family}": (dial(STRANGER, family, POD1, 8080), REFUSED),
            }
        expect(self.node, probes)
        rules = self.node.chain("filter", "FORWARD")
        assert rules.count("-j DOCKER-USER") == 1
        foreign = [rule for rule in rules if "nodewalld:" not in rule]
        assert foreign[0] == "-j DOCKER-USER", rules
        published = [rule for rule in self.node.chain("filter", "DOCKER-USER") if "nodewalld:" in rule]
        assert len(published) == 1
        self._passes_docker_user_once(name)

    def _passes_docker_user_once(self, container: str) -> None:
        """Each packet out of the container, and each answer, all of which Docker accepts in FORWARD by itself."""
        counted = [
            (table, f"{chain} -p udp -m udp {end} {ECHO}")
            for table, chain in (("filter", "DOCKER-USER"), ("mangle", "POSTROUTING"))
            for end in ("--dport", "--sport")
        ]
        for table, rule in counted:
            self.node.run(f"iptables -w -t {table} -I {rule}")
        self.guarded.settled()
        self.node.run([self.node.python(), "-c", _ASK, NEIGHBOUR.ipv4, str(ECHO), str(PACKETS)], ns=container)
        seen = {(table, rule): self._packets(table, rule) for table, rule in counted}
        assert seen == dict.fromkeys(seen, PACKETS)
        for table, rule in counted:
            self.node.run(f"iptables -w -t {table} -D {rule}")

    def _packets(self, table: str, rule: str) -> int:
        """How many this rule has seen."""
        saved = self.node.run(f"iptables-save -c -t {table}").stdout.splitlines()
        (line,) = (line for line in saved if line.endswith(f" -A {rule}"))
        return int(line[1:].split(":")[0])


@pytest.fixture
def host(request: pytest.FixtureRequest, laboratory: None, backend: BackendName) -> Iterator[Host]:
    with Node(backend, uplink=UPLINK, programs=programs.tree()) as node:
        serve(node, "client", tcp=[7999], udp=[ECHO])
        yield Host(node, firewalld=request.param)


@pytest.mark.parametrize("host", [False], ids=["docker"], indirect=True)
def test_the_rules_of_the_seeds_hold_after_whatever_dockerd_does(host: Host) -> None:
    host.holds()
    host.docker.daemon.restart()
    host.holds()
    host.docker("network", "create", "more")
    host.holds()


@pytest.mark.parametrize("host", [True], ids=["docker and firewalld"], indirect=True)
def test_the_rules_of_the_seeds_hold_after_whatever_firewalld_does_with_docker_beside(host: Host) -> None:
    """A flush takes the anchors of seed 002: its rule stands as "early" would, and between them when they are back."""
    assert host.firewalld is not None
    wait_for(host.reload, what="a reload that does not fail of our being there", timeout=30.0)
    host.holds()
    host.firewalld.daemon.restart()
    host.holds()
    host.allow_pods()
    host.holds()
    host.docker.daemon.restart()
    host.holds()
    host.docker("network", "create", "more")
    host.holds()
