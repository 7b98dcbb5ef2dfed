"""`nodewallctl exposures`: each door is found, and what is told of it follows from the rules."""

import ipaddress
import re
from typing import Any

import pytest
from captured import CAPTURES
from rulesets import services
from worlds import number, routes, world

from nodewalld.commands.exposures import as_json, tell
from nodewalld.commands.render import Paint
from nodewalld.core.words import Family
from nodewalld.kernel.facing import leading_outside, read_ipvs, read_socket
from nodewalld.kernel.process import ProgramError
from nodewalld.walk import SCTP, TCP, UDP
from nodewalld.walk.doors import Listener, doors
from nodewalld.walk.exposures import STRANGERS, Answer, Exposure, exposures

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
