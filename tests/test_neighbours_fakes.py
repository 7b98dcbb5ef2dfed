"""Who is played is played well: what the players leave behind is what the captures of their programs hold."""

from collections.abc import Iterator

import pytest
from captured import CAPTURES

from lab.layout import FAMILIES
from lab.node import BackendName, Node
from lab.rivals import Rival
from lab.waiting import wait_for

pytestmark = [pytest.mark.kernel, pytest.mark.neighbours]

CALICO = "kp126+felix3264-insert-{backend}-3svc"
PODS = ("caliabc00000000", "caliabc00001eef")
FOREIGN = "-p tcp -m tcp --dport 9 -j DROP"


@pytest.fixture
def calico(laboratory: None, backend: BackendName) -> Iterator[Node]:
    """A node as kube-proxy and Felix left it."""
    with Node(backend, pod_links=PODS) as node:
        node.load(CAPTURES / CALICO)
        yield node


def felix(node: Node, mode: str, **options: float) -> Rival:
    stem = str(CAPTURES / CALICO.format(backend=node.backend))
    return Rival(node, "felix", mode=mode, capture=stem, **options)


def top(node: Node, family: str) -> dict[str, list[str]]:
    """The rules in built-in chains, by table and chain."""
    found: dict[str, list[str]] = {}
    table = ""
    for line in node.rules(family).splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith("-A ") and line.split()[1].isupper() and "-" not in line.split()[1]:
            found.setdefault(f"{table} {line.split()[1]}", []).append(line)
    return found


def chains(node: Node, family: str) -> set[str]:
    """kube-proxy's chains that every cluster has."""
    lines = [line.split()[0] for line in node.rules(family).splitlines() if line.startswith(":KUBE-")]
    return {line for line in lines if not line.startswith((":KUBE-SVC-", ":KUBE-SEP-", ":KUBE-EXT-", ":KUBE-SVL-"))}


def test_kube_proxy_leaves_what_the_captured_one_left(node: Node) -> None:
    Rival(node, "kube-proxy").do("start")
    with Node(node.backend) as captured:
        captured.load(CAPTURES / "kp126-{backend}-3svc")
        for family in FAMILIES:
            assert top(node, family) == top(captured, family)
            assert chains(node, family) == chains(captured, family)
            for table, chain in (("filter", "KUBE-FORWARD"), ("nat", "KUBE-POSTROUTING"), ("nat", "KUBE-MARK-MASQ")):
                assert node.chain(table, chain, family) == captured.chain(table, chain, family)


def test_kube_proxy_looks_only_whether_its_jumps_are_there(node: Node) -> None:
    rival = Rival(node, "kube-proxy")
    rival.do("start")
    node.run(f"iptables -I FORWARD {FOREIGN}")
    node.run("iptables -D FORWARD -m comment --comment 'kubernetes forwarding rules' -j KUBE-FORWARD")
    before = node.chain("filter", "FORWARD")
    rival.do("sync")
    rules = node.chain("filter", "FORWARD")
    assert rules[0].endswith("-j KUBE-FORWARD")
    assert rules[1:] == before


def test_kube_proxy_begins_anew_when_the_canary_in_mangle_is_gone_and_not_when_another_is(node: Node) -> None:
    rival = Rival(node, "kube-proxy")
    rival.do("start")
    node.run("iptables -F; iptables -X")
    rival.do("tick")
    assert node.chain("filter", "FORWARD") == []
    node.run("iptables -t mangle -F; iptables -t mangle -X")
    rival.do("tick")
    assert len(node.chain("filter", "FORWARD")) == 4


def test_felix_writes_nothing_where_the_captured_one_has_been(calico: Node) -> None:
    rival = felix(calico, "Insert")
    rival.do("start")
    rival.do("refresh")
    assert rival.writes == 0


def test_felix_moves_its_jump_as_the_captured_transaction_does(calico: Node) -> None:
    """Deleted by value and inserted, in one restore; what it appended stays last."""
    rival = felix(calico, "Insert")
    before = {family: top(calico, family) for family in FAMILIES}
    told = (CAPTURES / f"felix-move-jump-{calico.backend}.txt").read_text().replace("--jump", "-j")
    lines = [line for line in told.splitlines() if not line.startswith("#")]
    table, chain = lines[0].removeprefix("*"), lines[1].split()[1]
    calico.run(f"iptables -t {table} -I {chain} -j ACCEPT")
    calico.run([f"iptables-{calico.backend}-restore", "--noflush"], stdin="\n".join(lines) + "\n")
    captured = calico.rules()
    calico.run(f"iptables -t {table} -D {chain} -j ACCEPT; iptables -t {table} -I {chain} -j ACCEPT")
    assert top(calico, "ipv4") != before["ipv4"]
    rival.do("refresh")
    assert rival.writes == 1
    assert without_times(calico.rules()) == without_times(captured)
    calico.run(f"iptables -t {table} -D {chain} -j ACCEPT")
    assert {family: top(calico, family) for family in FAMILIES} == before


def without_times(saved: str) -> list[str]:
    return [line for line in saved.splitlines() if not line.startswith(("#", ":"))]


def test_felix_looks_again_after_its_write_and_then_seldom(calico: Node) -> None:
    """A foreign rule on top is answered within its first look, without anybody asking."""
    rival = felix(calico, "Insert", clock=10.0)
    calico.run(f"iptables -I FORWARD {FOREIGN}")
    rival.do("refresh")
    assert rival.writes == 1
    calico.run(f"iptables -I FORWARD {FOREIGN}")
    wait_for(lambda: "cali-FORWARD" in calico.chain("filter", "FORWARD")[0], what="its second move")
    rival.do("rest")
    assert rival.writes == 2


def test_felix_in_append_mode_stays_last_and_leaves_the_top_alone(calico: Node) -> None:
    rival = felix(calico, "Append")
    rival.do("start")
    wrote = rival.writes
    calico.run(f"iptables -I FORWARD {FOREIGN}")
    rival.do("refresh")
    assert rival.writes == wrote
    calico.run(f"iptables -A FORWARD {FOREIGN}")
    rival.do("refresh")
    assert rival.writes == wrote + 1
    rules = calico.chain("filter", "FORWARD")
    assert rules[0] == FOREIGN
    assert [("cali:" in rule) for rule in rules[-4:]] == [False, True, True, True]


def test_kube_router_forces_number_one_and_writes_back_what_it_read(node: Node) -> None:
    rival = Rival(node, "kube-router")
    rival.do("start")
    node.run(f"iptables -I FORWARD {FOREIGN}; iptables -N MINE; iptables -A MINE -j RETURN")
    foreign = node.rules()
    rival.do("sync")
    rules = node.chain("filter", "FORWARD")
    assert rules[0].endswith("-j KUBE-ROUTER-FORWARD")
    assert rules[1] == FOREIGN
    assert "".join(rules).count("KUBE-ROUTER-FORWARD") == 1
    assert node.chain("filter", "MINE") == ["-j RETURN"]
    assert sorted(line for line in foreign.splitlines() if line.startswith("-A")) == sorted(
        line for line in node.rules().splitlines() if line.startswith("-A")
    )


def test_what_is_written_between_kube_routers_read_and_write_is_lost_and_what_was_deleted_rises(node: Node) -> None:
    rival = Rival(node, "kube-router", clock=0.05)  # a second between the two
    node.run(f"iptables -A FORWARD {FOREIGN}")
    process = node.popen(
        ["sh", "-c", "sleep 0.4; iptables -D FORWARD -p tcp --dport 9 -j DROP; iptables -A INPUT -j LOG"]
    )
    rival.do("sync")
    assert process.wait(10) == 0
    assert FOREIGN in node.chain("filter", "FORWARD")
    assert node.chain("filter", "INPUT")[1:] == []


def test_flannel_appends_all_again_when_one_of_its_rules_is_missing(node: Node) -> None:
    rival = Rival(node, "flannel", clock=20.0)
    rival.do("start")
    wrote = rival.writes
    node.run(f"iptables -A FORWARD {FOREIGN}")
    rival.do("tick")
    assert rival.writes == wrote
    node.run("iptables -D FORWARD -m comment --comment 'flanneld forward' -j FLANNEL-FWD")
    wait_for(lambda: node.chain("filter", "FORWARD")[-1].endswith("-j FLANNEL-FWD"), what="its rule")
    wait_for(lambda: len(node.chain("filter", "FLANNEL-FWD")) == 2, what="the rest")


def test_docker_28_deletes_its_jumps_and_inserts_them_on_top(node: Node) -> None:
    rival = Rival(node, "docker28")
    rival.do("start")
    node.run(f"iptables -I FORWARD {FOREIGN}; iptables -A DOCKER-USER {FOREIGN}")
    rival.do("network")
    assert node.chain("filter", "FORWARD") == ["-j DOCKER-USER", "-j DOCKER-FORWARD", FOREIGN]
    assert node.chain("filter", "DOCKER-USER") == [FOREIGN]
    assert node.chain("filter", "DOCKER-FORWARD")[:3] == ["-j DOCKER-CT", "-j DOCKER-INTERNAL", "-j DOCKER-BRIDGE"]
