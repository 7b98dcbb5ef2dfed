"""`nodewallctl exposures`: each door is found, what is told of it is what a real stranger meets, and it reads well."""

import ipaddress
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from captured import CAPTURES, restore
from rulesets import ours, restore_input, services
from stacks import build
from worlds import NODE6, number, routes, world

from lab.daemon import Daemon
from lab.layout import ALLOWED, BEYOND, BEYOND_GATEWAY, FAMILIES, STRANGER, Address
from lab.node import BackendName, Node
from lab.traffic import Probe, Verdict, connect_all
from nodewalld.commands.exposures import as_json, tell
from nodewalld.commands.render import Paint
from nodewalld.core.words import Family
from nodewalld.kernel.facing import leading_outside, read_ipvs, read_socket
from nodewalld.kernel.process import ProgramError
from nodewalld.walk import SCTP, TCP, UDP
from nodewalld.walk.doors import Listener, doors
from nodewalld.walk.exposures import STRANGERS, Answer, Exposure, exposures

DOCS = Path(__file__).resolve().parent.parent / "docs/exposures.md"
NAMES = {TCP: "tcp", UDP: "udp", SCTP: "sctp"}


# --- which doors there are --------------------------------------------------------------------------------------


def listed(text: str) -> set[str]:
    found = doors(world(text))
    return {
        f"{door.kind} {door.name or '-'} {NAMES[door.protocol]}/{door.ports[0]}"
        + (f"-{door.ports[1]}" if door.ports[0] != door.ports[1] else "")
        + (f" at {ipaddress.ip_address(door.address)}" if door.address is not None else "")
        for door in found
    }


@pytest.mark.parametrize(
    ("capture", "wanted"),
    [
        ("kp126-nft-3svc.v4.save", {"NodePort shop/web:p tcp/31002", "NodePort shop/relay:p tcp/30001"}),
        (
            "docker-20.10-nft-container-published.v4.rules",
            {"Docker - tcp/8080", "Docker - tcp/9090 at 127.0.0.1", "Docker - udp/5353"},
        ),
        ("podman-4.3.1-netavark-nft-container-published.v4.rules", {"Podman bf9cb1df5af5 tcp/8085"}),
        ("cni-portmap-1.1.1-legacy-hostport.v4.rules", {"hostPort podA tcp/8088", "hostPort podA udp/5300"}),
        ("docker-20.10-nft-after-start.v4.rules", set()),
    ],
)
def test_the_doors_of_a_captured_ruleset(capture: str, wanted: set[str]) -> None:
    assert listed((CAPTURES / capture).read_text()) == wanted


BY_HAND = """*nat
:PREROUTING ACCEPT [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-EXT-TXN6CU7KHVXQVBDZ - [0:0]
:mine - [0:0]
:NODEWALL-PREROUTING - [0:0]
-A PREROUTING -j KUBE-SERVICES
-A PREROUTING -p tcp -m comment --comment nodewalld:port/vault -m tcp --dport 4446 -j REDIRECT --to-ports 1
-A PREROUTING -p tcp -j mine
-A PREROUTING -d 198.18.0.7/32 -j DNAT --to-destination 10.42.0.2
-A PREROUTING -p udp -m udp --dport 60000:61000 -j REDIRECT --to-ports 51820
-A PREROUTING -p tcp -m tcp ! --dport 22 -j LOG
-A PREROUTING -p 132 -m sctp --dport 7 -j DNAT --to-destination 10.42.0.2
-A mine -m multiport --dports 8443,9000:9001 -j DNAT --to-destination 10.42.0.2:443
-A KUBE-SERVICES -d 198.18.0.9/32 -p tcp -m comment --comment "kube-system/traefik:web external IP" -m tcp \
--dport 80 -j KUBE-EXT-TXN6CU7KHVXQVBDZ
-A KUBE-SERVICES -d 198.18.0.8/32 -p tcp -m comment --comment "kube-system/traefik:web loadbalancer IP" -m tcp \
--dport 80 -j KUBE-EXT-TXN6CU7KHVXQVBDZ
-A KUBE-SERVICES -d 10.43.0.9/32 -p tcp -m comment --comment "kube-system/traefik:web cluster IP" -m tcp \
--dport 80 -j KUBE-EXT-TXN6CU7KHVXQVBDZ
COMMIT
"""


def test_addresses_of_services_and_whatever_else_is_led_on_are_doors_and_ours_are_none() -> None:
    assert listed(BY_HAND) == {
        "LoadBalancer kube-system/traefik:web tcp/80 at 198.18.0.8",
        "external IP kube-system/traefik:web tcp/80 at 198.18.0.9",
        "DNAT PREROUTING 4 tcp/1-65535 at 198.18.0.7",
        "DNAT PREROUTING 4 udp/1-65535 at 198.18.0.7",
        "DNAT PREROUTING 5 udp/60000-61000",
        "DNAT PREROUTING 7 sctp/7",
        "DNAT mine 1 tcp/8443",
        "DNAT mine 1 tcp/9000-9001",
    }


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        (
            'tcp LISTEN 0 128 0.0.0.0:22 0.0.0.0:* users:(("sshd",pid=71,fd=3))',
            [Listener(Family.IPV4, TCP, None, 22, name="sshd")],
        ),
        ("udp UNCONN 0 0 127.0.0.53%lo:53 0.0.0.0:*", [Listener(Family.IPV4, UDP, number("127.0.0.53"), 53, "lo")]),
        ("udp UNCONN 0 0 [fe80::1]%eth0:546 [::]:*", [Listener(Family.IPV6, UDP, number("fe80::1"), 546, "eth0")]),
        (
            'tcp LISTEN 0 4096 *:10250 *:* users:(("kubelet",pid=9,fd=1),("kubelet",pid=9,fd=2),("k3s",pid=8,fd=2))',
            [Listener(family, TCP, None, 10250, name="kubelet, k3s") for family in Family],
        ),
        ("tcp LISTEN 0 4096 [::]:80 [::]:*", [Listener(Family.IPV6, TCP, None, 80)]),
        ("tcp LISTEN 0 50 [::ffff:10.90.0.1]:8080 *:*", [Listener(Family.IPV4, TCP, number("10.90.0.1"), 8080)]),
    ],
)
def test_a_line_of_ss_is_a_listener_in_its_families(line: str, wanted: list[Listener]) -> None:
    assert list(read_socket(line)) == wanted


def test_a_line_of_ss_that_is_not_understood_is_an_error_and_no_listener_less() -> None:
    with pytest.raises(ProgramError, match="not understood: tcp LISTEN"):
        list(read_socket("tcp LISTEN 0 4096 somewhere 0.0.0.0:*"))


def test_services_of_ipvs_are_listeners() -> None:
    text = (
        "IP Virtual Server version 1.2.1 (size=4096)\nProt LocalAddress:Port Scheduler Flags\n"
        "  -> RemoteAddress:Port Forward Weight ActiveConn InActConn\n"
        "TCP  0A5A0001:791A rr\n  -> 0A2A0002:1F90      Masq    1      0          0\n"
        "UDP  [fd90:0000:0000:0000:0000:0000:0000:0001]:0035 rr\n"
    )
    assert list(read_ipvs(text)) == [
        Listener(Family.IPV4, TCP, number("10.90.0.1"), 31002, kind="IPVS"),
        Listener(Family.IPV6, UDP, number("fd90::1"), 53, kind="IPVS"),
    ]


def test_outside_is_where_the_default_route_leads_and_what_has_no_pods_behind_it() -> None:
    kinds = {"lo": "", "eth0": "", "br0": "bridge", "cni0": "bridge", "wg0": "wireguard", "flannel.1": "vxlan"}
    known = routes({name: (f"10.{number}.0.1/24",) for number, name in enumerate(kinds)}, default="br0")
    links: list[dict[str, Any]] = [
        {"ifname": name, "linkinfo": {"info_kind": kind}} if kind else {"ifname": name} for name, kind in kinds.items()
    ]
    links += [{"ifname": "eth1", "master": "br0"}, {"ifname": "eth2"}, {}]  # eth2 has no address, the last is down
    assert leading_outside(links, world("", routes=known)) == ("br0", "eth0", "wg0")


# --- what they answer -------------------------------------------------------------------------------------------


def test_only_what_gets_through_to_a_listener_is_reachable_and_what_hangs_on_chance_depends() -> None:
    rules = (
        "*filter\n:INPUT DROP [0:0]\n-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT\n"
        "-A INPUT -p tcp -m tcp --dport 80 -m limit --limit 1/sec -j ACCEPT\n"
        "-A INPUT -p tcp -m tcp --dport 443 -j REJECT\n-A INPUT -p tcp -m tcp --dport 8081 -j ACCEPT\nCOMMIT\n"
        "*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p tcp -m tcp --dport 8080 -j REDIRECT --to-ports 8081\nCOMMIT\n"
    )
    sockets = [Listener(Family.IPV4, TCP, None, port) for port in (22, 80, 443, 25)]
    sockets.append(Listener(Family.IPV4, TCP, number("127.0.0.1"), 6379))
    told = {each.ports[0]: each for each in exposures(world(rules), "ens18", sockets)}
    assert {port: each.answer for port, each in told.items()} == {
        8080: Answer.CLOSED,
        22: Answer.REACHABLE,
        80: Answer.DEPENDS,
        443: Answer.REFUSED,
        25: Answer.DROPPED,
    }
    assert told[443].by == ("filter INPUT 3",)
    assert told[25].by == ("the policy of filter INPUT",)


def test_what_is_stopped_is_governed_by_the_entry_that_stops_it_and_what_passes_by_all_that_have_ruled() -> None:
    rules = """*mangle
:PREROUTING ACCEPT [0:0]
:a - [0:0]
:z - [0:0]
-A PREROUTING -m comment --comment nodewalld:at/early -j a
-A a -p tcp -m comment --comment nodewalld:port/web -m tcp --dport 80:81 -j z
-A a -p tcp -m comment --comment nodewalld:zone/pub -m tcp --dport 80 -j DROP
-A z -m comment --comment nodewalld:port/web -j RETURN
COMMIT
"""
    told = list(exposures(world(rules), "ens18", [Listener(Family.IPV4, TCP, None, port) for port in (80, 81, 82)]))
    assert [each.entries for each in told] == [("zone/pub",), ("port/web",), ()]


def test_what_listens_on_loopback_alone_is_no_door_unless_the_interface_routes_there() -> None:
    sockets = [Listener(Family.IPV4, TCP, number("127.0.0.1"), 10248)]
    assert list(exposures(world(""), "ens18", sockets)) == []
    open_, *_ = exposures(world("", localnet=frozenset({"ens18"})), "ens18", sockets)
    assert open_.answer is Answer.REACHABLE


@pytest.fixture(scope="module")
def crowd() -> list[Exposure]:
    """A cluster of 300 Services, none of which is guarded."""
    return list(exposures(world(services(300, Family.IPV4)), "ens18", ()))


class _Plain:
    @staticmethod
    def isatty() -> bool:
        return False

    @staticmethod
    def fileno() -> int:
        raise OSError


def printed(found: list[Exposure]) -> list[str]:
    return list(tell(found, STRANGERS, Paint(_Plain(), {})))  # type: ignore[arg-type]


def test_of_hundreds_of_services_the_ports_are_told_in_a_row_and_no_knock_is_missing_for_programs(
    crowd: list[Exposure],
) -> None:
    lines = printed(crowd)
    assert len(lines) == 5
    assert re.fullmatch(r"30000-30299/tcp +\* +4 +300 NodePorts +reachable nothing", lines[2])
    assert lines[-1] == "300 doors reachable, 300 of them governed by nothing."
    assert len({tuple(as_json(each, 0)["ports"]) for each in crowd}) == 300


def test_an_address_that_answers_otherwise_than_the_others_is_told_apart() -> None:
    rules = "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -d 10.90.0.1/32 -p tcp --dport 22 -j DROP\nCOMMIT\n"
    two = routes({"ens18": ("10.90.0.1/24", "172.18.10.1/24"), "cni0": ("10.42.0.1/24",)}, default="ens18")
    sockets = [
        Listener(Family.IPV4, TCP, None, 22, name="sshd"),
        Listener(Family.IPV4, TCP, None, 80, name="nginx"),
        Listener(Family.IPV4, TCP, number("10.42.0.1"), 53),
    ]
    lines = printed(list(exposures(world(rules, routes=two), "ens18", sockets)))
    assert [re.split(" +", line)[:5] for line in lines[2:6]] == [
        ["22/tcp", "172.18.10.1", "4", "sshd", "reachable"],
        ["53/tcp", "10.42.0.1", "4", "listener", "reachable"],
        ["80/tcp", "*", "4", "nginx", "reachable"],
        ["22/tcp", "10.90.0.1", "4", "sshd", "dropped"],
    ]


# --- and a real stranger ----------------------------------------------------------------------------------------

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


@pytest.fixture(scope="module", params=["nft", "legacy"])
def node(laboratory: None, request: pytest.FixtureRequest) -> Iterator[Node]:
    """Docker, kube-proxy, portmap and listeners, of which nodewalld guards some."""
    backend: BackendName = request.param
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
