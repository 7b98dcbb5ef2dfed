"""The recipes of the seeds, and guarded ports, hold in a crowd: kube-proxy, Docker and Calico on one node."""

from collections.abc import Iterator

import pytest
from captured import CAPTURES, add_capture
from packets import (
    OPEN,
    REFUSED,
    SHUT,
    TIMEOUT,
    Guarded,
    answer_to,
    both,
    dial,
    dial_from,
    expect,
    iptables,
    slot,
    verdicts,
)

from lab.layout import (
    ALLOWED,
    BEYOND,
    BROADCAST_OR_ANYCAST,
    CLUSTER_NODE,
    CLUSTER_NODE_2,
    FAMILIES,
    KUBERNETES_SERVICE,
    LOOPBACK,
    MULTICAST,
    NEIGHBOUR,
    NODE,
    POD1,
    REMOTE_POD,
    STRANGER,
    Address,
)
from lab.node import BackendName, Node
from lab.traffic import Probe, Verdict, notrack, serve, serve_cluster
from lab.waiting import wait_for

pytestmark = pytest.mark.kernel

CONTAINER = Address("172.17.0.2", "fd00:d0c::242:ac11:2")  # of Docker's captures, published as 8080
NODE_TO_PODS = {"ipv4": "-s 10.42.0.0/16 -j ACCEPT", "ipv6": "-s fd42::/48 -j ACCEPT"}
PODS_TO_NODE = {"ipv4": "-d 10.42.0.0/16 -j ACCEPT", "ipv6": "-d fd42::/48 -j ACCEPT"}

SEED_000 = '[[port]]\nname = "vault"\nports = [31002]\nfrom_node = true\n'
SEED_000_TEXT = (
    '[[rule]]\nname = "local-vault"\ntable = "mangle"\nchain = "OUTPUT"\nrule = "-p tcp --dport 31002 -j DROP"\n'
)
SEED_001 = f"""
[[port]]
name = "relay"
ports = [30001]
allow = {both(ALLOWED, CLUSTER_NODE)}
action = "redirect"
"""
SEED_002 = f"""
[set.cluster_nodes]
entries = ["172.18.10.1", "172.18.10.2", "172.18.10.3", "fd00:18::1", "fd00:18::2", "fd00:18::3"]

[[forward]]
name = "pods-from-nodes"
in = "ens18"
source = "!@cluster_nodes"
action = "reject"

[forward.position]
after = [{{ rule = "{NODE_TO_PODS["ipv4"]}" }}, {{ rule = "{NODE_TO_PODS["ipv6"]}" }}]
before = [{{ rule = "{PODS_TO_NODE["ipv4"]}" }}, {{ rule = "{PODS_TO_NODE["ipv6"]}" }}]
"""


@pytest.fixture(scope="module")
def node(laboratory: None, backend: BackendName) -> Iterator[Node]:
    """Docker with a published container, then kube-proxy, then the rules of seed 002's node for pods."""
    with Node(backend, uplink="ens18") as made:
        made.attach(
            "web",
            "docker0",
            node=["172.17.0.1/16", "fd00:d0c::1/64"],
            host=[f"{CONTAINER.ipv4}/16", f"{CONTAINER.ipv6}/64"],
        )
        made.load(CAPTURES / "docker-20.10-{backend}-container-published.v4.rules")
        made.load(CAPTURES / "docker-20.10-{backend}-ip6tables-container-published.v6.rules")
        add_capture(made, "kp126-{backend}-3svc")
        serve_cluster(made)
        serve(made, "web", tcp=[80])
        serve(made, "client", tcp=[7999])
        for family in FAMILIES:
            pods = (NODE_TO_PODS[family], PODS_TO_NODE[family])
            iptables(made, family, "-P FORWARD DROP", *(f"-A FORWARD {rule}" for rule in pods))
        yield made


# --- the recipes


def stands_between(node: Node, family: str) -> bool:
    """Whether the rule of seed 002 is where the seed puts it."""
    rules = node.chain("filter", "FORWARD", family)
    return rules.index(NODE_TO_PODS[family]) < slot(rules, "NODEWALL-FORWARD-") < rules.index(PODS_TO_NODE[family])


def pods_from_nodes(family: str) -> dict[str, tuple[Probe, Verdict]]:
    """What the rule of seed 002 lets through, and what not."""
    return {
        "a pod of another node": (dial(REMOTE_POD, family, POD1, 8080), OPEN),
        "a node of the cluster": (dial(CLUSTER_NODE_2, family, POD1, 8080), OPEN),
        "a neighbour": (dial(NEIGHBOUR, family, POD1, 8080), REFUSED),
        "a neighbour, udp": (dial(NEIGHBOUR, family, POD1, 53, "udp"), REFUSED),
        "a neighbour's ping": (dial(NEIGHBOUR, family, POD1, 0, "icmp"), REFUSED),
        "a stranger": (dial(STRANGER, family, POD1, 8080), REFUSED),
        "replies to pods": (dial_from("pod1", family, NEIGHBOUR, 7999), OPEN),
        "a published container": (dial(NEIGHBOUR, family, NODE, 8080), OPEN),
    }


@pytest.mark.parametrize("vault", [SEED_000, SEED_000_TEXT], ids=["port", "rule"])
def test_the_recipes_of_the_seeds_come_into_force(guarded: Guarded, vault: str) -> None:
    guarded.enforce(vault + SEED_001 + SEED_002)
    guarded.nothing_to_do()
    node = guarded.node
    for family in FAMILIES:
        assert stands_between(node, family)
        relay = {
            "seed 001, an allowed node": (dial(CLUSTER_NODE, family, NODE, 30001), OPEN),
            "seed 001, a stranger": (dial(STRANGER, family, NODE, 30001), REFUSED),
        }
        stranger = (dial(STRANGER, family, NODE, 31002), TIMEOUT if vault is SEED_000 else OPEN)
        own = (dial_from("node", family, NODE, 31002), TIMEOUT)
        expect(node, {"seed 000": stranger, "seed 000, by the node": own} | relay | pods_from_nodes(family))


def test_the_rule_of_seed_002_stays_between_when_numbers_change(guarded: Guarded, family: str) -> None:
    daemon, node = guarded.enforce(SEED_000 + SEED_001 + SEED_002), guarded.node
    repairs = daemon.status()["repairs"]
    foreign = ["-i lo -j ACCEPT", "-o lo -j ACCEPT", "-p tcp -m tcp --dport 1 -j DROP"]
    before = slot(node.chain("filter", "FORWARD", family), "NODEWALL-FORWARD-")
    for rule in foreign:
        iptables(node, family, f"-I FORWARD {rule}")
    try:
        guarded.nothing_to_do()
        assert slot(node.chain("filter", "FORWARD", family), "NODEWALL-FORWARD-") == before + 3
        assert stands_between(node, family)
        expect(node, pods_from_nodes(family))
        assert daemon.status()["repairs"] == repairs
    finally:
        for rule in foreign:
            iptables(node, family, f"-D FORWARD {rule}")
    guarded.nothing_to_do()
    assert daemon.status()["repairs"] == repairs


def test_the_rule_of_seed_002_follows_its_neighbours(guarded: Guarded, family: str) -> None:
    guarded.enforce(SEED_000 + SEED_001 + SEED_002)
    node = guarded.node
    around = (NODE_TO_PODS[family], PODS_TO_NODE[family])
    foreign = node.snapshot()
    iptables(node, family, *(f"-D FORWARD {rule}" for rule in around), *(f"-I FORWARD {r}" for r in reversed(around)))
    wait_for(lambda: stands_between(node, family), what="the rule to be between the two at the top")
    guarded.nothing_to_do()
    iptables(node, family, *(f"-D FORWARD {rule}" for rule in around), *(f"-A FORWARD {rule}" for rule in around))
    wait_for(lambda: stands_between(node, family), what="the rule to be between the two at the end")
    guarded.nothing_to_do()
    expect(node, pods_from_nodes(family))
    assert node.snapshot() == foreign


# --- Docker


@pytest.mark.parametrize("action", ["drop", "reject", "redirect"])
def test_a_published_port_obeys(guarded: Guarded, action: str) -> None:
    guarded.enforce(f'[[port]]\nname = "web"\nports = [8080]\nallow = {both(ALLOWED)}\naction = "{action}"\n')
    for family in FAMILIES:
        expect(
            guarded.node,
            {
                "stranger": (dial(STRANGER, family, NODE, 8080), SHUT[action]),
                "allowed": (dial(ALLOWED, family, NODE, 8080), OPEN),
                "container to container": (dial_from("pod1", family, POD1, 8080), OPEN),
                "node": (dial_from("node", family, NODE, 8080), OPEN),
                "out of the container": (dial_from("web", family, BEYOND, 31002), OPEN),
            },
        )
        # Not necessarily refused: with br_netfilter the kernel sends a pod's reset past nat, from another address.
        assert answer_to(guarded.node, dial_from("pod1", family, NODE, 8080)).verdict is not OPEN
        iptables(guarded.node, family, "-I FORWARD -j ACCEPT")
        expect(guarded.node, {"below an ACCEPT": (dial(STRANGER, family, NODE, 8080), SHUT[action])})
        iptables(guarded.node, family, "-D FORWARD -j ACCEPT")


DOCKER_USER = f"""
[set.friends]
entries = {both(ALLOWED)}

[[jump]]
name = "docker-user"
table = "filter"
from = "FORWARD"
to = "DOCKER-USER"

[[rule]]
name = "friends"
table = "filter"
chain = "DOCKER-USER"
rule = "-m set --match-set friends src -j RETURN"
position = "first"

[[rule]]
name = "nobody-else"
table = "filter"
chain = "DOCKER-USER"
rule = "-i ens18 -o docker0 -p tcp -j DROP"
"""


def test_rules_in_docker_user_mean_there_what_they_say(guarded: Guarded, family: str) -> None:
    guarded.enforce(DOCKER_USER)
    guarded.nothing_to_do()
    node = guarded.node
    rules = node.chain("filter", "DOCKER-USER", family)
    name = "friends" if family == "ipv4" else "friends-v6"
    assert rules[0].startswith(f"-m set --match-set {name} src ") or f"--match-set {name} src" in rules[0]
    assert rules[0].endswith("-j RETURN")
    expect(
        node,
        {
            "allowed": (dial(ALLOWED, family, NODE, 8080), OPEN),
            "stranger": (dial(STRANGER, family, NODE, 8080), TIMEOUT),
            "out of the container": (dial_from("web", family, BEYOND, 31002), OPEN),
        },
    )


def test_docker_user_is_reached_exactly_once(guarded: Guarded, family: str) -> None:
    guarded.enforce(DOCKER_USER)
    node = guarded.node
    jump = "-j DOCKER-USER"

    def at_the_top_once() -> bool:
        rules = node.chain("filter", "FORWARD", family)
        return rules.count(jump) == 1 and rules[0] == jump

    assert at_the_top_once()
    rest = [rule for rule in node.chain("filter", "FORWARD", family) if rule != jump]
    for trouble in (
        [f"-A FORWARD {jump}"],
        [f"-I FORWARD {jump}"],
        [f"-A FORWARD {jump}", f"-I FORWARD 3 {jump}", f"-I FORWARD {jump}"],
        [f"-D FORWARD {jump}"],
        [f"-D FORWARD {jump}", f"-A FORWARD {jump}"],
    ):
        iptables(node, family, *trouble)
        wait_for(at_the_top_once, what=f"one jump after {trouble}")
        guarded.nothing_to_do()
    assert [rule for rule in node.chain("filter", "FORWARD", family) if rule != jump] == rest


def test_docker_user_is_made_where_it_is_missing(laboratory: None, backend: BackendName) -> None:
    with Node(backend) as node:
        Guarded(node).enforce(DOCKER_USER)
        for family in FAMILIES:
            assert node.chain("filter", "FORWARD", family) == ["-j DOCKER-USER"]
            assert len(node.chain("filter", "DOCKER-USER", family)) == 2


@pytest.mark.parametrize("name", ["KUBE-LATER", "CNI-LATER"])
def test_a_chain_of_kubernetes_is_never_made_but_waited_for(guarded: Guarded, name: str) -> None:
    daemon, node = guarded.enforce(""), guarded.node
    daemon.reload(f'[[jump]]\nname = "later"\ntable = "filter"\nfrom = "FORWARD"\nto = "{name}"\n')
    status = daemon.wait_status(state="degraded")
    assert [reason for reason in status["reasons"] if name in reason]
    assert [family for family in FAMILIES if f":{name} " in node.rules(family)] == []
    for family in FAMILIES:
        iptables(node, family, f"-N {name}")
    daemon.wait_status(state="enforcing")
    assert [node.chain("filter", "FORWARD", family).count(f"-j {name}") for family in FAMILIES] == [1, 1]
    daemon.reload("")
    for family in FAMILIES:
        iptables(node, family, f"-D FORWARD -j {name}", f"-X {name}")


# --- Calico host endpoints


HOST_ENDPOINT = f"""
[[port]]
name = "etcd"
ports = [2379]
allow = {both(ALLOWED)}

[[port]]
name = "api"
ports = [6443]
allow = {both(ALLOWED)}
action = "reject"

[[port]]
name = "https"
ports = [443]

[[port]]
name = "untracked"
ports = [2380]
protocol = ["tcp", "udp"]
allow = {both(ALLOWED)}

[[port]]
name = "beacon"
ports = [31002]
protocol = ["udp"]
allow = {both(ALLOWED)}

[[port]]
name = "beacon-rejected"
ports = [31003]
protocol = ["udp"]
allow = {both(ALLOWED)}
action = "reject"

[[port]]
name = "beacon-redirected"
ports = [31004]
protocol = ["udp"]
allow = {both(ALLOWED)}
action = "redirect"
"""


@pytest.fixture(scope="module")
def calico_node(laboratory: None, backend: BackendName) -> Iterator[Node]:
    """Felix with a host endpoint on eth0, which accepts 2379 and 6443 in mangle; kube-proxy; 2380 untracked."""
    with Node(backend) as made:
        made.load(CAPTURES / "felix3264-insert-hep-{backend}")
        add_capture(made, "kp126-{backend}-3svc")
        serve_cluster(made)
        serve(made, "node", tcp=[443], udp=[2380, 31003, 31004])
        notrack(made, port=2380)
        notrack(made, port=2380, protocol="udp")
        yield made


@pytest.fixture(scope="module")
def calico(calico_node: Node) -> Guarded:
    return Guarded(calico_node)


def test_calicos_failsafe_opens_no_guarded_port(calico: Guarded, family: str) -> None:
    node = calico.node
    table = {
        "etcd, stranger": (dial(STRANGER, family, NODE, 2379), TIMEOUT),
        "etcd, allowed": (dial(ALLOWED, family, NODE, 2379), OPEN),
        # Felix's filter INPUT accepts it above our reject, which yields: the backstop drops what is marked.
        "api, stranger": (dial(STRANGER, family, NODE, 6443), TIMEOUT),
        "api, allowed": (dial(ALLOWED, family, NODE, 6443), OPEN),
        "https, stranger": (dial(STRANGER, family, NODE, 443), TIMEOUT),
        "https, a pod": (dial_from("pod1", family, NODE, 443), TIMEOUT),
        "a pod's call to the Service of the api": (dial_from("pod1", family, KUBERNETES_SERVICE, 443), OPEN),
        "the node's call to the Service of the api": (dial_from("node", family, KUBERNETES_SERVICE, 443), OPEN),
        "etcd by loopback": (dial_from("node", family, LOOPBACK, 2379), OPEN),
        "etcd by the node's address": (dial_from("node", family, NODE, 2379), OPEN),
        "ssh, stranger": (dial(STRANGER, family, NODE, 22), OPEN),
    }
    if not calico.daemon.running:
        expect(node, {name: (probe, OPEN) for name, (probe, _) in table.items()})
    calico.enforce(HOST_ENDPOINT)
    calico.nothing_to_do()
    rules = node.chain("mangle", "PREROUTING", family)
    assert rules[0].endswith("-j cali-PREROUTING")
    assert rules[1].endswith("-j NODEWALL-PREROUTING")
    expect(node, table)


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_an_untracked_flow_is_judged(calico: Guarded, family: str, protocol: str) -> None:
    calico.enforce(HOST_ENDPOINT)
    expect(
        calico.node,
        {
            "stranger": (dial(STRANGER, family, NODE, 2380, protocol), TIMEOUT),  # type: ignore[arg-type]
            "allowed": (dial(ALLOWED, family, NODE, 2380, protocol), OPEN),  # type: ignore[arg-type]
        },
    )
    flows = calico.node.run(["conntrack", "-L", "-f", family]).stdout
    assert "dport=2379" in flows
    assert "dport=2380" not in flows


def test_every_address_that_reaches_the_node_is_judged(calico: Guarded, family: str) -> None:
    calico.enforce(HOST_ENDPOINT)
    dialled = [(g, p) for g in (NODE, MULTICAST, BROADCAST_OR_ANYCAST) for p in (31002, 31003, 31004)]

    def opened(source: Address) -> set[str]:
        probes = {f"{group} {port}": dial(source, family, group, port, "udp") for group, port in dialled}
        return {name for name, verdict in verdicts(calico.node, probes).items() if verdict is OPEN}

    assert opened(STRANGER) == set()
    assert len(opened(ALLOWED)) == len(dialled)


def test_calicos_pods_reach_the_api_while_its_service_port_is_guarded(laboratory: None, backend: BackendName) -> None:
    vault = f'[[port]]\nname = "vault"\nports = [31002]\nallow = {both(ALLOWED)}\naction = "reject"\n'
    with Node(backend, pod_links=("caliabc00000000", "caliabc00001eef")) as node:
        node.load(CAPTURES / "kp126+felix3264-insert-{backend}-3svc")
        serve_cluster(node)
        serve(node, "node", tcp=[443])
        for family in FAMILIES:  # the captured Felix lets no pod call its own node: as if set to Return
            last = len(node.chain("filter", "cali-wl-to-host", family))
            iptables(node, family, f"-D cali-wl-to-host {last}")
        guarded = Guarded(node)
        guarded.enforce('[[port]]\nname = "https"\nports = [443, 6443]\n' + vault)
        guarded.nothing_to_do()
        for family in FAMILIES:
            expect(
                node,
                {
                    "the Service of the api": (dial_from("pod1", family, KUBERNETES_SERVICE, 443), OPEN),
                    "https of the node": (dial_from("pod1", family, NODE, 443), TIMEOUT),
                    "a pod of another node": (dial(REMOTE_POD, family, POD1, 8080), OPEN),
                    "NodePort, a pod": (dial_from("pod1", family, NODE, 31002), REFUSED),
                    "NodePort, a stranger": (dial(STRANGER, family, NODE, 31002), REFUSED),
                    "NodePort, allowed": (dial(ALLOWED, family, NODE, 31002), OPEN),
                },
            )


def test_the_node_itself_is_refused_unless_loopback_is_listed(calico: Guarded, family: str) -> None:
    etcd = '[[port]]\nname = "etcd"\nports = [2379]\nfrom_node = true\nallow = {allow}\n'
    nobody, here = (dial_from("node", family, to, 2379) for to in (LOOPBACK, NODE))
    calico.enforce(etcd.format(allow="[]"))
    expect(calico.node, {"loopback": (nobody, TIMEOUT), "own address": (here, TIMEOUT)})
    calico.enforce(etcd.format(allow='["127.0.0.0/8", "::1"]'))
    expect(calico.node, {"loopback": (nobody, OPEN), "own address": (here, TIMEOUT)})
    calico.enforce(etcd.format(allow=both(NODE)))
    expect(calico.node, {"loopback": (nobody, TIMEOUT), "own address": (here, OPEN)})
