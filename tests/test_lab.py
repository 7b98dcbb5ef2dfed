"""The lab tells the truth: what it says of packets is what the kernel did with them."""

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from packets import iptables

from lab import layout
from lab.flood import Flood
from lab.layout import FAMILIES
from lab.node import BackendName, Node
from lab.saved import foreign, sets_of
from lab.traffic import (
    Connection,
    Probe,
    Protocol,
    Verdict,
    connect,
    connect_all,
    notrack,
    serve,
    serve_cluster,
    unserve,
)
from lab.waiting import LabError, wait_for

pytestmark = pytest.mark.kernel

NODEPORT = 31002
PROTOCOLS: tuple[Protocol, ...] = ("tcp", "udp", "sctp")
SOURCES = (
    layout.STRANGER,
    layout.STRANGER_2,
    layout.ALLOWED,
    layout.ALLOWED_2,
    layout.CLUSTER_NODE,
    layout.CLUSTER_NODE_2,
    layout.NEIGHBOUR,
    layout.REMOTE_POD,
)


def namespaces_in_use() -> set[str]:
    """Every network namespace that some process of this machine is in."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found.add(str((process / "ns/net").readlink()))
        except OSError:
            continue
    return found


# --- the kube-proxy capture works as it is


def test_a_node_port_leads_to_the_pods(kube_node: Node, family: str) -> None:
    serve_cluster(kube_node)
    dialled = (layout.NODE.of(family), NODEPORT)
    answers = [connect(kube_node, "client", source=layout.STRANGER.of(family), to=dialled) for _ in range(30)]
    assert {answer.verdict for answer in answers} == {Verdict.OPEN}
    assert {answer.server for answer in answers} == {"pod1", "pod2"}
    assert {(answer.port, answer.peer) for answer in answers} == {(8080, layout.PODS_GATEWAY.of(family))}


def test_all_that_the_capture_serves_is_reached(kube_node: Node, family: str) -> None:
    serve_cluster(kube_node)
    stranger = layout.STRANGER.of(family)

    def reach(ns: str, to: layout.Address, port: int, source: str = "") -> tuple[str, str]:
        answer = connect(kube_node, ns, source=source, to=(to.of(family), port))
        return answer.server.rstrip("12"), answer.peer

    assert reach("client", layout.NODE, 30001, stranger) == ("pod", stranger)
    assert reach("client", layout.CLUSTER_ADDRESS, NODEPORT, stranger)[0] == "pod"
    assert reach("node", layout.NODE, NODEPORT)[0] == "pod"
    assert reach("node", layout.WEB_SERVICE, 80)[0] == "pod"
    assert reach("pod1", layout.WEB_SERVICE, 80)[0] == "pod"
    assert reach("pod1", layout.KUBERNETES_SERVICE, 443) == ("node", layout.POD1.of(family))
    assert reach("client", layout.POD1, 8080, layout.REMOTE_POD.of(family))[0] == "pod"


def test_filter_input_does_not_shut_a_node_port_but_mangle_does(kube_node: Node, family: str) -> None:
    serve_cluster(kube_node)
    probe = Probe("client", (layout.NODE.of(family), NODEPORT), layout.STRANGER.of(family))
    iptables(kube_node, family, f"-I INPUT -p tcp --dport {NODEPORT} -j DROP")
    assert connect_all(kube_node, [probe])[0].open
    iptables(kube_node, family, f"-t mangle -I PREROUTING -p tcp --dport {NODEPORT} -j DROP")
    assert connect_all(kube_node, [probe])[0].verdict is Verdict.TIMEOUT


# --- paths and verdicts


def test_transit_traffic_goes_through_the_node(node: Node, family: str) -> None:
    serve(node, "beyond", tcp=[NODEPORT], udp=[NODEPORT], sctp=[NODEPORT])
    stranger = layout.STRANGER.of(family)
    probes = [
        Probe("client", (layout.BEYOND.of(family), NODEPORT), stranger, protocol)
        for protocol in ("tcp", "udp", "sctp", "icmp")
    ]
    answers = connect_all(node, probes)
    assert [answer.verdict for answer in answers] == [Verdict.OPEN] * 4
    assert {answer.peer for answer in answers[:3]} == {stranger}
    iptables(node, family, "-P FORWARD DROP")
    assert {answer.verdict for answer in connect_all(node, probes)} == {Verdict.TIMEOUT}


def test_the_node_sees_the_source_that_was_asked_for(node: Node, family: str) -> None:
    serve(node, "node", tcp=[22], udp=[22], sctp=[22])
    for party in SOURCES:
        address = party.of(family)
        for protocol in PROTOCOLS:
            answer = connect_all(node, [Probe("client", (layout.NODE.of(family), 22), address, protocol)])[0]
            assert (answer.server, answer.port, answer.peer) == ("node", 22, address), protocol


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_verdict_is_the_kernels(node: Node, family: str, protocol: Protocol) -> None:
    serve(node, "node", tcp=[7000], udp=[7000], sctp=[7000])

    def verdict(rule: str = "", *, port: int = 7000) -> Verdict:
        if rule:
            iptables(node, family, f"-I INPUT -p {protocol} --dport {port} {rule}")
        probe = Probe("client", (layout.NODE.of(family), port), layout.STRANGER.of(family), protocol)
        answer = connect_all(node, [probe])[0]
        if rule:
            iptables(node, family, f"-D INPUT -p {protocol} --dport {port} {rule}")
        return answer.verdict

    assert verdict() is Verdict.OPEN
    assert verdict(port=7001) is Verdict.REFUSED
    assert verdict("-j DROP") is Verdict.TIMEOUT
    prohibited = "icmp-host-unreachable" if family == "ipv4" else "icmp6-addr-unreachable"
    assert verdict(f"-j REJECT --reject-with {prohibited}") is Verdict.UNREACHABLE
    port = "icmp-port-unreachable" if family == "ipv4" else "icmp6-port-unreachable"
    assert verdict(f"-j REJECT --reject-with {port}") is Verdict.REFUSED
    assert verdict() is Verdict.OPEN


def test_rejects_are_never_rationed(node: Node, family: str) -> None:
    iptables(node, family, "-I INPUT -p udp --dport 7000 -j REJECT")
    probe = Probe("client", (layout.NODE.of(family), 7000), layout.STRANGER.of(family), "udp")
    assert {answer.verdict for answer in connect_all(node, [probe] * 100)} == {Verdict.REFUSED}


def test_what_the_own_output_refuses_is_forbidden(node: Node, family: str) -> None:
    serve(node, "node", udp=[7000])
    iptables(node, family, "-I OUTPUT -p udp --dport 7000 -j DROP")
    answer = connect(node, "node", to=(layout.LOOPBACK.of(family), 7000), protocol="udp")
    assert (answer.verdict, answer.error) == (Verdict.FORBIDDEN, "EPERM")


def test_groups_are_answered(node: Node, family: str) -> None:
    serve(node, "node", udp=[NODEPORT])
    for group in (layout.MULTICAST, layout.BROADCAST_OR_ANYCAST):
        probe = Probe("client", (group.of(family), NODEPORT), layout.STRANGER.of(family), "udp")
        assert connect_all(node, [probe])[0].open, group
        iptables(node, family, f"-I INPUT -d {group.of(family)} -j DROP")
        assert connect_all(node, [probe])[0].verdict is Verdict.TIMEOUT, group


def test_untracked_flows_are_open_but_have_no_conntrack_entry(node: Node, family: str) -> None:
    serve(node, "node", tcp=[2379, 2380])
    iptables(node, family, "-A INPUT -m conntrack --ctstate NEW -j ACCEPT")  # switches tracking on
    notrack(node, port=2379)
    for port in (2379, 2380):
        target = (layout.NODE.of(family), port)
        assert connect(node, "client", source=layout.STRANGER.of(family), to=target).open
    entries = node.run(["conntrack", "-L", "-f", family]).stdout
    assert "dport=2380" in entries
    assert "dport=2379" not in entries


def test_a_listener_can_be_taken_away(node: Node) -> None:
    target = (layout.NODE.ipv4, 7000)
    serve(node, "node", tcp=[7000])
    assert connect(node, "client", to=target).open
    unserve(node, "node", tcp=[7000])
    assert connect(node, "client", to=target).verdict is Verdict.REFUSED


def test_an_open_door_answers_in_milliseconds(kube_node: Node) -> None:
    serve_cluster(kube_node)
    probe = Probe("client", (layout.NODE.ipv4, NODEPORT), layout.STRANGER.ipv4)
    connect_all(kube_node, [probe])
    started = time.monotonic()
    for _ in range(50):
        connect_all(kube_node, [probe])
    assert (time.monotonic() - started) / 50 < 0.02


def test_an_established_connection_lives_and_dies_with_the_rules(node: Node, family: str) -> None:
    serve(node, "node", tcp=[22])
    with_ssh = Connection(node, "client", source=layout.ALLOWED.of(family), to=(layout.NODE.of(family), 22))
    assert with_ssh.alive()
    iptables(node, family, "-I INPUT -p tcp --dport 22 --syn -j DROP")
    assert with_ssh.alive()
    assert not connect(node, "client", to=(layout.NODE.of(family), 22)).open
    iptables(node, family, "-I INPUT -p tcp --dport 22 -j DROP")
    assert not with_ssh.alive(timeout=0.3)
    iptables(node, family, "-D INPUT -p tcp --dport 22 -j DROP")
    assert with_ssh.alive(timeout=10)  # TCP has repeated what was lost
    with_ssh.close()


# --- rules


@pytest.mark.parametrize(
    "capture",
    [
        "kp126-{backend}-3svc",
        "kp126+felix3264-insert-{backend}-3svc",
        "felix3264-insert-hep-{backend}",
        "docker-20.10-{backend}-container-published",
        "docker-20.10-{backend}-ip6tables-container-published",
        "firewalld-1.3.3-fbiptables-{backend}-after-start",
        "docker-20.10+firewalld-1.3.3-fbiptables-nft-started",
    ],
)
def test_a_capture_is_in_force_as_it_was_saved(node: Node, captures: Path, capture: str) -> None:
    node.load(captures / capture)
    name = capture.format(backend=node.backend)
    for family in FAMILIES:
        wanted = foreign(next(captures.glob(f"{name}.v{family[-1]}.*")).read_text())
        if wanted:
            assert foreign(node.rules(family)) == wanted


def test_felix_and_its_workloads_work_on_point_to_point_links(
    laboratory: None, backend: BackendName, captures: Path, family: str
) -> None:
    with Node(backend, pod_links=("caliabc00000000", "caliabc00001eef")) as node:
        node.load(captures / "kp126+felix3264-insert-{backend}-3svc")
        serve_cluster(node)
        target = (layout.NODE.of(family), NODEPORT)
        seen = {connect(node, "client", source=layout.STRANGER.of(family), to=target).server for _ in range(20)}
        assert seen == {"pod1", "pod2"}


def test_dockers_published_port_works_with_an_attached_container(node: Node, captures: Path) -> None:
    node.load(captures / "docker-20.10-{backend}-container-published")
    node.attach("web", "docker0", node=["172.17.0.1/16"], host=["172.17.0.2/16"])
    serve(node, "web", tcp=[80])
    iptables(node, "ipv4", "-I INPUT -p tcp --dport 8080 -j DROP")
    answer = connect(node, "client", source=layout.STRANGER.ipv4, to=(layout.NODE.ipv4, 8080))
    assert (answer.server, answer.port, answer.peer) == ("web", 80, layout.STRANGER.ipv4)


def test_the_uplink_has_the_name_that_was_asked_for(laboratory: None, backend: BackendName) -> None:
    with Node(backend, uplink="ens18") as node:
        serve(node, "pod1", tcp=[8080])
        node.run("ipset create cluster_nodes iphash; ipset add cluster_nodes 172.18.10.2")
        node.run("iptables -I FORWARD -i ens18 -m set ! --match-set cluster_nodes src -j REJECT")
        pod = (layout.POD1.ipv4, 8080)
        assert connect(node, "client", source=layout.CLUSTER_NODE.ipv4, to=pod).open
        assert connect(node, "client", source=layout.NEIGHBOUR.ipv4, to=pod).verdict is Verdict.REFUSED
        assert connect(node, "pod2", to=pod).open


def test_each_node_has_the_backend_that_was_asked_for(node: Node) -> None:
    wanted = {"nft": "nf_tables", "legacy": "legacy"}[node.backend]
    for tool in ("iptables", "ip6tables", "iptables-save", "ip6tables-restore"):
        assert wanted in node.run([tool, "-V"]).stdout
        assert wanted in node.run([f"/usr/sbin/{tool}", "-V"]).stdout


def test_a_snapshot_leaves_out_what_is_ours_and_keeps_the_rest(kube_node: Node) -> None:
    before = kube_node.snapshot()
    assert "-A FORWARD -m comment" in before
    for tool in ("iptables", "ip6tables"):
        kube_node.run(
            f"""set -e
            {tool} -w -t mangle -N NODEWALL-PREROUTING
            {tool} -w -t mangle -A NODEWALL-PREROUTING -p tcp --dport 31002 -j DROP
            {tool} -w -t mangle -I PREROUTING -m comment --comment "nodewalld:early" -j NODEWALL-PREROUTING
            {tool} -w -t security -A INPUT -m comment --comment "nodewalld:x y" -j DROP"""
        )
    assert kube_node.snapshot() == before
    kube_node.run("iptables -w -I FORWARD -j ACCEPT")
    assert kube_node.snapshot() != before
    kube_node.run("iptables -w -D FORWARD -j ACCEPT")
    assert kube_node.snapshot() == before


def test_sets_named_by_rules_are_made_for_their_family() -> None:
    rules = "-A x -m set --match-set a src -j y\n-A x -m set ! --match-set b src,dst -j y\n"
    assert sets_of(rules, "ipv6") == ("create a hash:net family inet6\ncreate b hash:net,port family inet6\n")


# --- commands


def test_a_command_that_fails_says_what_it_printed(node: Node) -> None:
    with pytest.raises(LabError, match=r"(?s)exited 3.*sorry"):
        node.run("echo sorry >&2; exit 3")
    assert node.run("exit 3", check=False).returncode == 3
    assert node.run(["cat"], stdin="text").stdout == "text"


def test_a_command_that_hangs_is_killed(node: Node) -> None:
    started = time.monotonic()
    with pytest.raises(LabError, match=r"took more than 0\.2 s"):
        node.run(["sleep", "1000"], timeout=0.2)
    assert time.monotonic() - started < 5
    wait_for(lambda: "1000" not in node.run("cat /proc/[0-9]*/cmdline", check=False).stdout)


def test_waiting_in_vain_is_an_error_that_says_for_what() -> None:
    with pytest.raises(LabError, match=r"waited 0.02 s in vain for the moon; last seen: \[\]"):
        wait_for(list, timeout=0.02, what="the moon")


# --- nothing is left


def test_close_leaves_no_process_no_namespace_and_no_folder(kube_node: Node) -> None:
    with Node(kube_node.backend) as node:
        serve_cluster(node)
        Flood(node, "client", to=(layout.NODE.ipv4, 7000)).start()
        node.popen(["sleep", "1000"], ns="pod1")
        # Its own: others make nodes at the same time.
        made = set(node.run("stat -Lc 'net:[%i]' /proc/1/ns/net /run/netns/*").stdout.split())
        directory, pid = node.directory, node.pid
        assert len(made) >= 2
        assert str(Path(f"/proc/{pid}/ns/net").readlink()) in made
    assert not Path(f"/proc/{pid}").exists()
    assert not namespaces_in_use() & made
    assert not directory.exists()
    node.close()
    assert not Path("/run/netns/client").exists()


def test_a_node_dies_with_the_process_that_built_it(laboratory: None, tmp_path: Path) -> None:
    script = (
        "import sys, time; from lab.node import Node; from lab.traffic import serve_cluster\n"
        "node = Node(); serve_cluster(node); node.popen(['sleep', '1000'], ns='pod1')\n"
        "print(node.pid, node.directory, flush=True); time.sleep(1000)"
    )
    root = Path(__file__).resolve().parent.parent
    builder = subprocess.Popen([sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, text=True)
    assert builder.stdout is not None
    with builder.stdout:
        pid, directory = builder.stdout.readline().split()
    descriptor = os.pidfd_open(int(pid))
    try:
        builder.send_signal(signal.SIGKILL)
        builder.wait(10)
        assert select.select([descriptor], [], [], 10)[0], "the node outlives its builder"
    finally:
        os.close(descriptor)
        subprocess.run(["rm", "-rf", directory], check=True)


def test_two_nodes_do_not_see_each_other(laboratory: None) -> None:
    with Node("nft") as one, Node("nft") as other:
        one.run("iptables -A INPUT -p tcp --dport 7000 -j DROP")
        assert "7000" not in other.rules()
        assert one.run("hostname; ls /run/netns").stdout == "node\nbeyond\nclient\npod1\npod2\n"
        serve(one, "node", tcp=[7001])
        assert connect(other, "client", to=(layout.NODE.ipv4, 7001)).verdict is Verdict.REFUSED


def test_a_sysctl_of_the_whole_machine_is_out_of_reach(node: Node) -> None:
    with pytest.raises(LabError, match="whole machine"):
        node.sysctl("vm.overcommit_memory", "1")
    assert node.run("echo 1 > /proc/sys/vm/overcommit_memory", check=False).returncode != 0
    node.sysctl("net.ipv4.conf.all.route_localnet", "1")
    assert node.run("cat /proc/sys/net/ipv4/conf/all/route_localnet").stdout == "1\n"
