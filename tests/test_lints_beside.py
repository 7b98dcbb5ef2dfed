"""What lints say of things beside iptables is read from the real kernel, and packets do what they tell."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from packets import OPEN, REFUSED, TIMEOUT, Guarded, both, dial, expect
from stacks import build

from lab.daemon import Daemon
from lab.layout import BEYOND, FAMILIES, NODE, STRANGER
from lab.node import BackendName, Node
from lab.traffic import serve
from nodewalld.core.lints import NOTES

pytestmark = pytest.mark.kernel

PROGRAMS = Path(__file__).with_name("bpf_programs.py")
ACCEPT = f'[[forward]]\nname = "office"\nout = "eth1"\nsource = {both(STRANGER)}\naction = "accept"\n'
NODE_PORT = '[[port]]\nname = "vault"\nports = [31002]\naction = "{action}"\n'
POLICY = "table inet filter {\n chain forward { type filter hook forward priority 10; policy drop; }\n}\n"
RULE = '[[rule]]\nname = "no-telnet"\ntable = "filter"\nchain = "DOCKER-USER"\nrule = "-p tcp --dport 23 -j DROP"\n'


def said(daemon: Daemon) -> dict[str, str]:
    return {one["code"]: one["message"] for one in json.loads(daemon.ctl("check", "--json").stdout)["warnings"]}


def codes(daemon: Daemon) -> set[str]:
    return set(said(daemon)) - NOTES


@pytest.fixture
def nft_node(laboratory: None) -> Iterator[Node]:
    with Node("nft") as made:
        yield made


@pytest.fixture
def head(node: Node) -> str:
    return f'[daemon]\nbackend = "{node.backend}"\n'


def test_an_accept_opens_nothing_that_a_chain_of_nftables_refuses(node: Node) -> None:
    serve(node, "beyond", tcp=[80])
    guarded = Guarded(node)
    guarded.enforce(ACCEPT)
    assert codes(guarded.daemon) == set()
    probes = {family: dial(STRANGER, family, BEYOND, 80) for family in FAMILIES}
    expect(node, {family: (probe, OPEN) for family, probe in probes.items()})
    node.run(["nft", "-f", "-"], stdin=POLICY)
    assert said(guarded.daemon)["accept-overruled"].startswith("opens nothing that chain forward of table inet filter")
    expect(node, {family: (probe, TIMEOUT) for family, probe in probes.items()})


def test_node_ports_behind_ciliums_programs_are_told(nft_node: Node) -> None:
    node, daemon = nft_node, Daemon(nft_node, NODE_PORT.format(action="drop"), start=False)
    command = [node.python(), str(PROGRAMS), "eth0:tcx:cil_from_netdev"]
    loader = node.popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, log="programs")
    assert loader.stdout is not None
    assert loader.stdout.readline() == "ready\n", node.logs["programs"].read_text()
    assert codes(daemon) == {"nodeport-by-bpf"}


def test_a_chain_of_the_other_backend_is_told(node: Node, head: str) -> None:
    daemon = Daemon(node, head + RULE, start=False)
    other: BackendName = "legacy" if node.backend == "nft" else "nft"
    node.run(f"iptables-{other} -w -N DOCKER-USER; iptables-{other} -w -I FORWARD -j DOCKER-USER")
    assert codes(daemon) == {"other-backend"}
    node.run(f"iptables-{node.backend} -w -N DOCKER-USER")
    assert codes(daemon) == set()


@pytest.fixture
def kube_nftables(laboratory: None) -> Iterator[Node]:
    with build("nftables", "nft") as made:
        yield made


def test_a_redirect_loses_its_answer_when_kube_proxys_own_chain_is_made_anew(kube_nftables: Node) -> None:
    guarded = Guarded(kube_nftables)
    probes = {family: dial(STRANGER, family, NODE, 31002) for family in FAMILIES}
    ends = {"redirect": (REFUSED, TIMEOUT, {"redirect-order"}), "reject": (REFUSED, REFUSED, set())}
    for action, (before, after, warned) in ends.items():
        guarded.enforce(NODE_PORT.format(action=action))
        assert codes(guarded.daemon) == warned
        expect(kube_nftables, {family: (probe, before) for family, probe in probes.items()})
        restart_kube_proxy(kube_nftables)
        expect(kube_nftables, {family: (probe, after) for family, probe in probes.items()})


def restart_kube_proxy(node: Node) -> None:
    """It takes its tables away and makes them anew."""
    for family in ("ip", "ip6"):
        text = node.run(["nft", "list", "table", family, "kube-proxy"]).stdout
        node.run(["nft", "-f", "-"], stdin=f"delete table {family} kube-proxy\n{text}")
