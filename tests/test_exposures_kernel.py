"""What `nodewallctl exposures` tells of each door is what a real stranger meets, and it reads well."""

import ipaddress
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from captured import CAPTURES, restore
from rulesets import ours, restore_input
from stacks import build
from test_exposures import printed
from worlds import NODE6, number, routes, world

from lab.daemon import Daemon
from lab.layout import ALLOWED, BEYOND, BEYOND_GATEWAY, FAMILIES, STRANGER, Address
from lab.node import BackendName, Node
from lab.traffic import Probe, Verdict, connect_all
from nodewalld.core.words import Family
from nodewalld.walk import TCP
from nodewalld.walk.doors import Listener
from nodewalld.walk.exposures import Answer, Exposure, exposures

DOCS = Path(__file__).resolve().parent.parent / "docs/exposures.md"

CONFIG = """
[[port]]
name = "vault"
ports = [31002, 8088]
allow = ["10.90.0.0/24", "fd90::/64"]

[[port]]
name = "web"
ports = [80]
allow = ["any"]

[[port]]
name = "etcd"
ports = [2379]
action = "reject"
allow = []

[[port]]
name = "balanced"
ports = [8443]
destination = ["198.18.0.10/32", "fd99::10/128"]
allow = []
"""
BALANCER = Address("198.18.0.10", "fd99::10")
# An address of a LoadBalancer, of which one port is guarded; and a foreign rule for one interface.
_BALANCED = """*nat
-I KUBE-SERVICES 1 -d {to} -p tcp -m comment --comment "shop/web:p loadbalancer IP" -m tcp --dport 8000 \
-j KUBE-EXT-XFKN4M7H6MSYKOEJ
-I KUBE-SERVICES 1 -d {to} -p tcp -m comment --comment "shop/web:tls external IP" -m tcp --dport 8443 \
-j KUBE-EXT-XFKN4M7H6MSYKOEJ
COMMIT
*mangle
-A PREROUTING -i eth1 -p tcp -m tcp --dport 443 -j DROP
COMMIT
"""
_VERDICTS = {
    Answer.REACHABLE: {Verdict.OPEN},
    Answer.DROPPED: {Verdict.TIMEOUT},
    Answer.REFUSED: {Verdict.REFUSED, Verdict.UNREACHABLE},
    Answer.CLOSED: {Verdict.REFUSED},
}


def told(node: Node, *words: str) -> list[dict[str, Any]]:
    done = node.run([node.python(), "-m", "nodewalld.commands.ctl", "exposures", "--json", *words])
    found: list[dict[str, Any]] = json.loads(done.stdout)["exposures"]
    return found


def differing(node: Node, found: list[dict[str, Any]], caller: Address, ns: str = "client") -> list[str]:
    """Where a real knock comes to something else than was told."""
    asked = [each for each in found if not ipaddress.ip_address(each["address"]).is_loopback]
    probes = [
        Probe(ns, (each["address"], each["ports"][0]), caller.of(each["family"]), each["protocol"]) for each in asked
    ]
    answers = connect_all(node, probes)
    return [
        f"{each['protocol']} {each['address']} {each['ports']}: told {each['answer']}, met {answer}"
        for each, answer in zip(asked, answers, strict=True)
        if answer.verdict not in _VERDICTS[Answer(each["answer"])]
    ]


def governing(found: list[dict[str, Any]]) -> Mapping[tuple[str, int, str], set[str]]:
    told_by: dict[tuple[str, int, str], set[str]] = {}
    for each in found:
        told_by.setdefault((each["protocol"], each["ports"][0], each["answer"]), set()).add(each["governed_by"])
    return told_by


@pytest.fixture(scope="module")
def node(laboratory: None, backend: BackendName) -> Iterator[Node]:
    """Docker, kube-proxy, portmap and listeners, of which nodewalld guards some."""
    with build("seed 003", backend) as made:
        for family in FAMILIES:
            restore(made, family, _BALANCED.format(to=BALANCER.of(family)))
        with Daemon(made, CONFIG) as daemon:
            daemon.wait_ready()
            yield made


def test_what_a_stranger_meets_is_what_was_told(node: Node) -> None:
    found = told(node)
    assert {each["interface"] for each in found} == {"ens18"}
    assert differing(node, found, STRANGER) == []
    known = governing(found)
    for (protocol, port, answer), by in {
        ("tcp", 31002, "dropped"): {"port/vault (shield)"},
        ("tcp", 8088, "dropped"): {"port/vault (shield)"},
        ("tcp", 30001, "reachable"): {"nothing"},
        ("udp", 31053, "reachable"): {"nothing"},
        ("udp", 5300, "reachable"): {"nothing"},
        ("tcp", 8080, "reachable"): {"nothing"},
        ("udp", 5354, "reachable"): {"nothing"},
        ("tcp", 8000, "reachable"): {"nothing"},
        ("tcp", 8443, "dropped"): {"port/balanced (shield)"},
        ("tcp", 80, "reachable"): {"port/web"},
        ("tcp", 22, "reachable"): {"failsafe"},
        ("tcp", 2379, "refused"): {"port/etcd"},
        ("tcp", 6443, "reachable"): {"nothing"},
        ("tcp", 443, "reachable"): {"nothing"},
        ("udp", 5353, "dropped"): {"the policy of filter FORWARD"},
    }.items():
        assert known[protocol, port, answer] == by, (protocol, port)
        if port != 5353:  # which only IPv4 publishes
            assert {each["family"] for each in found if each["ports"] == [port, port]} == set(FAMILIES)


def test_somebody_who_is_allowed_meets_other_answers_and_they_are_told_too(node: Node) -> None:
    for family in FAMILIES:
        found = told(node, "--from", ALLOWED.of(family), "--in", "ens18")
        assert {each["family"] for each in found} == {family}
        assert differing(node, found, ALLOWED) == []
        assert governing(found)["tcp", 31002, "reachable"] == {"port/vault"}


def test_by_another_interface_it_is_told_what_is_met_there(node: Node) -> None:
    found = told(node, "--from", BEYOND.ipv6, "--in", "eth1")
    assert {each["address"] for each in found} >= {BEYOND_GATEWAY.ipv6, BALANCER.ipv6}
    assert differing(node, found, BEYOND, "beyond") == []
    assert all(re.fullmatch(r"mangle PREROUTING \d", by) for by in governing(found)["tcp", 443, "dropped"])


@pytest.mark.parametrize(("stack", "stopped"), [("ufw", "filter"), ("nftables", "")])
def test_so_it_is_with_ufw_and_with_kube_proxy_on_nftables(laboratory: None, stack: str, stopped: str) -> None:
    with build(stack, "nft") as other:
        found = told(other)
        assert differing(other, found, STRANGER) == []
        kinds = {what["kind"] for each in found for what in each["what"] if each["answer"] == "reachable"}
        assert kinds >= ({"listener", "Docker"} if stack == "ufw" else {"listener", "NodePort"})
        refusals = [each["governed_by"] for each in found if each["answer"] in {"dropped", "refused"}]
        assert not stopped or (refusals and all(by.startswith((stopped, "the policy of")) for by in refusals)), refusals


def test_without_a_way_outside_it_asks_for_an_interface(laboratory: None) -> None:
    with Node("nft") as lonely:
        lonely.run("ip route del default; ip -6 route del default")
        done = lonely.run([lonely.python(), "-m", "nodewalld.commands.ctl", "exposures"], check=False)
        assert done.returncode == 1
        assert done.stderr == "nodewallctl: no interface of this node leads outside (name one: --in IFACE)\n"
        assert told(lonely, "--in", "eth0") == []


# --- how it looks -----------------------------------------------------------------------------------------------


def test_it_fits_80_columns_and_says_in_the_end_what_is_open(node: Node) -> None:
    done = node.run([node.python(), "-m", "nodewalld.commands.ctl", "exposures"])
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "What 203.0.113.9 or 2001:db8::9 reaches of this node by ens18:"
    assert "\x1b" not in done.stdout
    assert any(re.fullmatch(r"31002/tcp +\* +4 6 NodePort +dropped +port/vault", line) for line in lines)
    assert re.fullmatch(r"\d+ doors reachable, \d+ of them governed by nothing\.", lines[-1])


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ("--in nowhere", 1, "this node has no interface nowhere (it has"),
        ("--from 10.90.0.1", 2, "10.90.0.1 is this node's own, and no stranger"),
        ("--from here", 2, "'here' is no address"),
    ],
)
def test_what_can_not_be_meant_is_a_sentence(node: Node, words: str, status: int, said: str) -> None:
    done = node.run(f"{node.python()} -m nodewalld.commands.ctl exposures {words}", check=False)
    assert done.returncode == status
    assert said in done.stderr
    assert "Traceback" not in done.stderr


_DOCKER = """*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80
COMMIT
*filter
:DOCKER - [0:0]
-A FORWARD -o docker0 -j DOCKER
-A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT
COMMIT
"""
_PROGRAMS = {22: "sshd", 80: "nginx", 2379: "etcd", 6443: "kube-apiserver", 10250: "kubelet"}
_OUR_NODE = {"ens18": ("10.90.0.1/24",), "cni0": ("10.42.0.1/24",), "docker0": ("172.17.0.1/16",)}


def test_the_page_shows_what_is_printed(tmp_path: Path) -> None:
    """docs/exposures.md shows a node of kube-proxy and Docker; a run writes it anew with NODEWALLD_WRITE."""
    found: list[Exposure] = []
    compiled = ours(CONFIG.partition('[[port]]\nname = "balanced"')[0], tmp_path)
    for family, desired in compiled.items():
        text = (CAPTURES / f"kp126-nft-3svc.v{family.version}.save").read_text()
        text += re.sub(r"^-I (\S+) 1", r"-A \1", restore_input(desired), flags=re.MULTILINE)
        four = family is Family.IPV4
        node = routes(_OUR_NODE if four else NODE6, default="ens18")
        sockets = [Listener(family, TCP, None, port, name=name) for port, name in _PROGRAMS.items()]
        sockets.append(Listener(family, TCP, number("127.0.0.1" if four else "::1"), 10248, name="kubelet"))
        guarded = world(text + _DOCKER * four, family=family, routes=node)
        found += exposures(guarded, "ens18", sockets)
    page = DOCS.read_text()
    before, _, rest = page.partition("# nodewallctl exposures\n")
    _, _, after = rest.partition("```\n")
    wanted = f"{before}# nodewallctl exposures\n" + "\n".join(printed(found)) + f"\n```\n{after}"
    if os.environ.get("NODEWALLD_WRITE"):
        DOCS.write_text(wanted)
    assert page == wanted


def test_without_root_it_says_that_it_needs_it(node: Node) -> None:
    done = node.run(
        ["setpriv", "--reuid=65534", "--clear-groups", node.python(), "-m", "nodewalld.commands.ctl", "exposures"],
        check=False,
    )
    assert done.returncode == 1
    assert "root" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
