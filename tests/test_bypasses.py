"""What leads packets past our rules is listed by `status`: of the real kernel where it has the thing, else of bytes."""

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from live import ask, wait_in_force

from lab.daemon import Daemon
from lab.node import Node
from lab.waiting import wait_for
from nodewalld.core.bypasses import CALICO, CILIUM, BaseChain, Flowtable, Paths, Program, bypasses
from nodewalld.core.lifelines import Jump
from nodewalld.core.words import Backend, Family, Table
from nodewalld.kernel import paths as kernel_paths
from nodewalld.kernel.netlink import HEADER, attribute, nested, netfilter_body, text
from nodewalld.kernel.paths import observe_paths

PROGRAMS = Path(__file__).with_name("bpf_programs.py")
CONFIG = '[daemon]\nresync = "1s"\n[[port]]\nname = "vault"\nports = [31002]\n'

RULESET = """
table inet filter {
 chain forward { type filter hook forward priority 0; policy drop; }
 chain input { type filter hook input priority 10
  accept
 }
 chain output { type filter hook output priority -10
  ct state established accept
  counter log reject with icmpx type admin-prohibited
 }
 chain last { type filter hook postrouting priority 5
  counter drop
 }
 chain some { type filter hook postrouting priority 6
  tcp dport 7 drop
 }
}
table ip kube-proxy {
 chain nat-prerouting { type nat hook prerouting priority -100; }
}
table ip6 docker-bridges {
}
"""


def listed(daemon: Daemon) -> list[tuple[str, str]]:
    return [(each["kind"], each["what"]) for each in ask(daemon, "status")["bypasses"]]


def wait_listed(daemon: Daemon, *beginnings: tuple[str, str]) -> None:
    """Wait until just these are listed, in this order."""

    def fits() -> bool:
        found = listed(daemon)
        return len(found) == len(beginnings) and all(
            kind == wanted and what.startswith(words)
            for (kind, what), (wanted, words) in zip(found, beginnings, strict=True)
        )

    wait_for(fits, what=f"{beginnings}")


@pytest.mark.kernel
def test_status_lists_programs_of_tc_tcx_and_xdp_and_chains_of_nftables_that_refuse(laboratory: None) -> None:
    with Node("nft") as node, Daemon(node, CONFIG) as daemon:
        daemon.wait_ready()
        assert listed(daemon) == []
        places = ("eth0:xdp:cil_xdp_entry", "eth0:ingress:cil_from_netdev", "eth1:egress:cali_tc_preambl")
        command = [node.python(), str(PROGRAMS), *places, "eth1:tcx:stranger"]
        loader = node.popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, log="programs")
        assert loader.stdout is not None
        assert loader.stdout.readline() == "ready\n", node.logs["programs"].read_text()
        node.run("tc qdisc add dev cni0 clsact; tc filter add dev cni0 egress bpf da bytecode '1,6 0 0 4294967295,'")
        node.run(["nft", "-f", "-"], stdin=RULESET)
        wait_listed(
            daemon,
            ("bpf", "Cilium's programs cil_xdp_entry, cil_from_netdev on eth0 (XDP), eth0 (tc ingress): what they "),
            ("bpf", "BPF programs stranger on cni0 (tc egress), eth1 (tc ingress): "),
            ("bpf", "Calico's programs cali_tc_preambl on eth1 (tc egress): "),
            ("kube-proxy-nftables", "kube-proxy serves Services in nftables (table kube-proxy): "),
            ("docker-nftables", "Docker writes to nftables (table docker-bridges): DOCKER-USER is not asked there"),
            ("base-chain", "chain forward of table inet filter (hook forward, priority 0) refuses what it does not "),
            ("base-chain", "chain output of table inet filter (hook output, priority -10) refuses "),
            ("base-chain", "chain last of table inet filter (hook postrouting, priority 5) refuses "),
        )
        assert "  bypasses:   Cilium's programs" in daemon.ctl("status").stdout
        assert ask(daemon, "status")["state"] == "enforcing"


@pytest.mark.kernel
def test_a_switched_alternative_moves_no_rules_and_is_told_with_what_others_write_there(node: Node) -> None:
    other: str = {"nft": "legacy", "legacy": "nft"}[node.backend]
    with Daemon(node, CONFIG) as daemon:
        daemon.wait_ready()
        node.run(
            f"for f in iptables ip6tables; do for x in '' -save -restore; do "
            f"ln -sfn /usr/sbin/$f-{other}$x /etc/alternatives/$f$x; done; done"
        )
        node.run("iptables -w -A FORWARD -s 192.0.2.7 -j DROP; ip6tables -w -t nat -A OUTPUT -j ACCEPT")
        wait_listed(
            daemon,
            ("other-backend", f"{other} holds rules of others as well, in filter (ipv4), nat (ipv6): an accept in "),
            ("tool", f"`iptables` writes to {other} on this node, and our rules stand in {node.backend}"),
        )
        status = ask(daemon, "status")
        assert (status["state"], status["backend"]) == ("enforcing", node.backend)
        daemon.restart()  # used last: stays
        wait_in_force(daemon)
        assert ask(daemon, "status")["backend"] == node.backend
        assert "NODEWALL" not in node.rules(backend=other)


def test_ipvs_is_seen_by_the_services_that_it_has(tmp_path: Path) -> None:
    """As net/netfilter/ipvs/ip_vs_ctl.c prints it (ip_vs_info_seq_show); the kernels of the lab have none."""
    head = "IP Virtual Server version 1.2.1 (size=4096)\nProt LocalAddress:Port Scheduler Flags\n"
    head += "  -> RemoteAddress:Port Forward Weight ActiveConn InActConn\n"
    (tmp_path / "net").mkdir()
    file = tmp_path / "net/ip_vs"
    assert not observe_paths((), tmp_path).ipvs
    file.write_text(head)
    assert not observe_paths((), tmp_path).ipvs
    file.write_text(head + "TCP  0A2B0001:01BB rr  \n  -> 0A5A0001:192B      Masq    1      0          0         \n")
    paths = observe_paths((), tmp_path)
    assert paths.ipvs
    assert ("ipvs", "IPVS serves Services: their packets pass INPUT, and neither FORWARD nor DOCKER-USER") in told(
        paths
    )


class Answers:
    """A netlink socket with one answer, as the kernel would write it."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer

    def ask(self, *_: object) -> list[tuple[int, bytes]]:
        return [(0, self._answer)]


def test_a_flowtable_is_told_with_its_devices() -> None:
    """As nf_tables_fill_flowtable_info writes it (net/netfilter/nf_tables_api.c); the kernels of the lab have none."""
    devices = nested(3, text(1, "eth0"), text(1, "eth1"))
    hook = nested(3, attribute(1, struct.pack(">I", 0)), attribute(2, struct.pack(">i", -10)), devices)
    body = netfilter_body(1, text(1, "filter"), text(2, "fast"), hook)
    socket: Any = Answers(bytes(HEADER.size) + body)
    assert list(kernel_paths._flowtables(socket)) == [Flowtable("inet", "filter", "fast", ("eth0", "eth1"))]
    paths = Paths(flowtables=(Flowtable("inet", "filter", "fast", ("eth0", "eth1")),))
    [(kind, what)] = told(paths)
    assert kind == "flowtable"
    assert what.startswith("flowtable fast of table inet filter on eth0, eth1: a flow that it has taken over meets no ")


def told(paths: Paths, backend: Backend | None = Backend.NFT) -> list[tuple[str, str]]:
    return [(each.kind, each.what) for each in bypasses(paths, backend)]


@pytest.mark.parametrize(
    ("names", "owner"),
    [
        (("cil_from_netdev",), CILIUM),
        (("bpf_netdev_eth0.o:[from-netdev]",), CILIUM),
        (("bpf_host.o:[to-netdev]",), CILIUM),
        (("cali_tc_preambl",), CALICO),
        (("council_thing", "my_cali_x", ""), ""),
    ],
)
def test_whose_a_program_is_its_name_tells(names: tuple[str, ...], owner: str) -> None:
    programs = tuple(Program("eth0", "ingress", name) for name in names)
    assert {each.owner for each in programs} == {owner}
    assert Paths(programs=programs).ebpf == owner


def test_an_owner_whose_programs_can_not_be_seen_is_known_by_its_interface() -> None:
    """tcx and netkit programs want bpf(2), which the unit's sandbox forbids."""
    paths = Paths(interfaces=("lo", "cilium_host"))
    assert paths.ebpf == CILIUM
    assert told(paths)[0][1].startswith("Cilium is here: packets that its BPF programs redirect")
    assert Paths(interfaces=("bpfin.cali",)).ebpf == CALICO


def test_programs_of_xdp_alone_serve_no_nodeport() -> None:
    """Felix in iptables mode drops by XDP what policies with doNotTrack refuse."""
    assert Paths(programs=(Program("eth0", "xdp", "xdp_cali_ingres"),)).ebpf == ""


def test_while_no_rules_of_ours_stand_nothing_goes_past_them() -> None:
    assert told(Paths(ipvs=True), None) == []


def test_long_lists_are_cut() -> None:
    programs = tuple(Program(f"lxc{number}", "ingress", "cil_from_contai") for number in range(250))
    [(_, what)] = told(Paths(programs=programs))
    assert what.startswith("Cilium's programs cil_from_contai on lxc0 (tc ingress), lxc1 (tc ingress)")
    assert "lxc3 (tc ingress) and 246 more: " in what


def test_a_base_chain_sees_the_packets_of_its_families() -> None:
    assert BaseChain("inet", "t", "c", "forward", 0, refuses=True).families == (Family.IPV4, Family.IPV6)
    assert BaseChain("ip6", "t", "c", "forward", 0, refuses=True).families == (Family.IPV6,)


def test_our_own_jumps_are_no_rules_of_others() -> None:
    jumps = [
        Jump(Backend.LEGACY, Family.IPV4, Table.MANGLE, "PREROUTING", "NODEWALL-PREROUTING"),
        Jump(Backend.LEGACY, Family.IPV4, Table.FILTER, "FORWARD", "KUBE-FORWARD"),
    ]
    assert observe_paths(jumps).rules == {Backend.LEGACY: {(Family.IPV4, Table.FILTER)}}


def test_looking_without_rights_finds_what_may_be_seen_and_fails_at_nothing() -> None:
    done = subprocess.run(
        ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--", sys.executable, "-c", LOOK],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(Path(__file__).resolve().parent.parent), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


LOOK = "from nodewalld.kernel.paths import observe_paths; print('lo' in observe_paths(()).interfaces)"
