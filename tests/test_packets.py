"""[[port]] keeps its promise packet by packet, whatever the action, the destination and the way in."""

import signal
from collections.abc import Iterator
from typing import cast

import pytest
from captured import CAPTURES
from packets import (
    FORBIDDEN,
    OPEN,
    REFUSED,
    SHUT,
    TIMEOUT,
    Guarded,
    answer_to,
    both,
    dial,
    dial_from,
    eventually,
    expect,
    iptables,
)

from lab.layout import (
    ALLOWED,
    ALLOWED_2,
    BEYOND,
    CLUSTER_ADDRESS,
    CLUSTER_NODE,
    FAMILIES,
    LOOPBACK,
    NODE,
    POD1,
    REMOTE_POD,
    STRANGER,
    STRANGER_2,
    Address,
)
from lab.node import BackendName, Node
from lab.traffic import Connection, Probe, Protocol, Verdict, serve, serve_cluster

pytestmark = pytest.mark.kernel

EXTERNAL = Address("198.51.100.200", "2001:db8:b::200")  # of a Service, held by no interface
SERVICE = Address("10.43.0.99", "fd43::99")  # on kube-ipvs0
ACTIONS = {"drop": 1, "reject": 2, "redirect": 3}
PROTOCOLS: dict[str, tuple[Protocol, ...]] = {
    "drop": ("tcp", "udp", "sctp"),
    "reject": ("tcp", "udp", "sctp"),
    "redirect": ("tcp", "udp"),
}
NODEPORT = 31002

# For every action n: 700n a listener, 710n a hand-written hostPort, 720n an address of a Service, 730n anybody's
# port, 740n a port of "beyond" only, 750n and 751n judged for the node itself, 760n counted only.
_PORTS = """
[[port]]
name = "{action}"
ports = [700{n}, 710{n}]
protocol = {protocols}
allow = {allow}
deny = {deny}
action = "{action}"

[[port]]
name = "{action}-any"
ports = [730{n}]
protocol = {protocols}
allow = {allow}
deny = {deny}
action = "{action}"
destination = "any"

[[port]]
name = "{action}-list"
ports = [720{n}, 740{n}]
protocol = {protocols}
allow = {allow}
deny = {deny}
action = "{action}"
destination = {destination}

[[port]]
name = "{action}-own"
ports = [750{n}]
protocol = ["tcp", "udp"]
allow = ["127.0.0.0/8", "::1", "@friends"]
action = "{action}"
from_node = true

[[port]]
name = "{action}-nobody"
ports = [751{n}]
protocol = ["tcp", "udp"]
action = "{action}"
from_node = true

[[port]]
name = "{action}-trial"
ports = [760{n}]
protocol = ["tcp", "udp"]
action = "{action}"
enforce = false
"""


def _everything() -> str:
    allow = '["10.90.0.0/24", "fd90::/64", "@friends"]'
    deny = both(ALLOWED_2).replace("]", ', "@foes"]')
    parts = [
        f"[set.friends]\nentries = {both(STRANGER_2, CLUSTER_NODE, REMOTE_POD)}\n",
        f"[set.foes]\nentries = {both(REMOTE_POD)}\n",
    ]
    for action, n in ACTIONS.items():
        protocols = list(PROTOCOLS[action])
        parts.append(
            _PORTS.format(
                action=action, n=n, protocols=protocols, allow=allow, deny=deny, destination=both(EXTERNAL, BEYOND)
            )
        )
    return "\n".join(parts)


EVERYTHING = _everything()
SOURCES = {
    STRANGER: False,
    STRANGER_2: True,  # by the set
    CLUSTER_NODE: True,  # by the set
    ALLOWED: True,  # by the network
    ALLOWED_2: False,  # denied, out of the network
    REMOTE_POD: False,  # denied by a set, out of another set
}


@pytest.fixture(scope="module")
def node(laboratory: None, backend: BackendName) -> Iterator[Node]:
    """Kube-proxy's rules, and DNAT rules as CNI portmap and Services with external addresses have them."""
    with Node(backend) as made:
        made.load(CAPTURES / "kp126-{backend}-3svc")
        serve_cluster(made)
        ports = [base + n for base in (7000, 7300, 7400, 7500, 7510, 7600) for n in ACTIONS.values()]
        serve(made, "node", tcp=ports, udp=ports, sctp=[7001, 7002, 7301, 7302, 7401, 7402])
        serve(made, "beyond", tcp=ports, udp=ports, sctp=[7301, 7302, 7401, 7402])
        for family in FAMILIES:
            pod = POD1.ipv4 if family == "ipv4" else f"[{POD1.ipv6}]"
            for protocol, port in (("tcp", 8080), ("udp", 53)):
                to = f"-p {protocol} -m multiport --dports {{}} -j DNAT --to-destination {pod}:{port}"
                iptables(
                    made,
                    family,
                    "-t nat -A PREROUTING -m addrtype --dst-type LOCAL " + to.format("7101,7102,7103"),
                    f"-t nat -A PREROUTING -d {EXTERNAL.of(family)} " + to.format("7201,7202,7203"),
                )
        yield made


def matrix(family: str) -> dict[str, tuple[Probe, Verdict]]:
    """Every action, protocol, destination and source, with what must become of it."""
    table: dict[str, tuple[Probe, Verdict]] = {}
    ways = (
        ("listener", NODE, 7000),
        ("listener by the second address", CLUSTER_ADDRESS, 7000),
        ("hostPort", NODE, 7100),
        ("external address", EXTERNAL, 7200),
        ("any, here", NODE, 7300),
        ("any, elsewhere", BEYOND, 7300),
        ("listed, elsewhere", BEYOND, 7400),
    )
    for action, n in ACTIONS.items():
        for protocol in PROTOCOLS[action]:
            for way, to, base in ways:
                if protocol == "sctp" and base in {7100, 7200}:
                    continue
                for source, allowed in SOURCES.items():
                    name = f"{action} {protocol} {way} from {source.of(family)}"
                    wanted = OPEN if allowed else SHUT[action]
                    table[name] = (dial(source, family, to, base + n, protocol), wanted)
            unlisted = f"{action} {protocol} not listed, here"
            table[unlisted] = (dial(STRANGER, family, NODE, 7400 + n, protocol), OPEN)
            table[f"{action} {protocol} in transit"] = (dial(STRANGER, family, BEYOND, 7600 + n, "udp"), OPEN)
            if protocol != "sctp":
                table[f"{action} {protocol} by the node"] = (dial_from("node", family, NODE, 7000 + n, protocol), OPEN)
    return table


def test_every_action_shuts_a_port_for_those_who_may_not(guarded: Guarded, family: str) -> None:
    guarded.enforce(EVERYTHING)
    guarded.nothing_to_do()
    expect(guarded.node, matrix(family))


def test_the_second_judgement_holds_where_a_neighbour_accepts_above_the_first(guarded: Guarded, family: str) -> None:
    guarded.enforce(EVERYTHING)
    node = guarded.node
    iptables(
        node,
        family,
        "-t mangle -N cali-everything",
        "-t mangle -A cali-everything -j ACCEPT",
        "-t mangle -I PREROUTING -j cali-everything",
    )
    try:
        guarded.nothing_to_do()
        expect(node, matrix(family))
        assert node.chain("mangle", "PREROUTING", family)[0] == "-j cali-everything"
    finally:
        iptables(node, family, "-t mangle -D PREROUTING -j cali-everything")
        iptables(node, family, "-t mangle -F cali-everything", "-t mangle -X cali-everything")


def test_from_node_judges_the_node_itself(guarded: Guarded, family: str) -> None:
    guarded.enforce(EVERYTHING)
    table = {}
    for action, n in ACTIONS.items():
        # tcp hears nothing of its own dropped SYN; for udp, sendmsg itself fails (rejected ones are EPERM as well).
        for protocol, shut in (("tcp", SHUT[action]), ("udp", REFUSED if action == "redirect" else FORBIDDEN)):
            for to, base, wanted in (
                (NODE, 7500, shut),
                (LOOPBACK, 7500, OPEN),
                (NODE, 7510, shut),
                (LOOPBACK, 7510, shut),
                (NODE, 7000, OPEN),
                (LOOPBACK, 7000, OPEN),
                (BEYOND, 7500, OPEN),
            ):
                name = f"{action} {protocol} {to.of(family)}:{base + n}"
                table[name] = (dial_from("node", family, to, base + n, cast("Protocol", protocol)), wanted)
    expect(guarded.node, table)


def test_what_is_not_enforced_is_counted_and_let_through(guarded: Guarded, family: str) -> None:
    guarded.enforce(EVERYTHING)
    before = guarded.counted(family)
    expect(guarded.node, {a: (dial(STRANGER, family, NODE, 7600 + n), OPEN) for a, n in ACTIONS.items()})
    after = guarded.counted(family)
    assert [a for a in ACTIONS if after[f"port/{a}-trial"] <= before[f"port/{a}-trial"]] == []


def test_an_open_connection_is_judged_as_a_new_one_is(guarded: Guarded, family: str) -> None:
    guarded.enforce("")

    def session(source: Address, port: int) -> Connection:
        return Connection(guarded.node, "client", source=source.of(family), to=(NODE.of(family), port))

    strangers = {action: session(STRANGER, 7000 + n) for action, n in ACTIONS.items()}
    friends = {action: session(ALLOWED, 7000 + n) for action, n in ACTIONS.items()}
    own = {a: Connection(guarded.node, "node", to=(NODE.of(family), 7510 + n)) for a, n in ACTIONS.items()}
    guarded.enforce(EVERYTHING)
    assert [action for action in ACTIONS if strangers[action].alive(timeout=0.3)] == []
    assert [action for action in ACTIONS if own[action].alive(timeout=0.3)] == []
    assert [action for action in ACTIONS if not friends[action].alive()] == []


# --- backstops: what stands behind reject and redirect


def test_a_displaced_reject_is_a_drop(guarded: Guarded, family: str) -> None:
    guarded.enforce(EVERYTHING)
    node = guarded.node
    probes = {
        "listener, tcp": dial(STRANGER, family, NODE, 7002),
        "listener, udp": dial(STRANGER, family, NODE, 7002, "udp"),
        "hostPort": dial(STRANGER, family, NODE, 7102),
        "transit": dial(STRANGER, family, BEYOND, 7302),
        "own": dial_from("node", family, NODE, 7512),
    }
    expect(node, {name: (probe, REFUSED) for name, probe in probes.items()})
    with guarded.killed():
        hooks = ("INPUT", "FORWARD", "OUTPUT")
        iptables(node, family, *(f"-I {hook} -j ACCEPT" for hook in hooks))
        expect(node, {name: (probe, TIMEOUT) for name, probe in probes.items()})
        expect(node, {"allowed": (dial(ALLOWED, family, NODE, 7002), OPEN)})
    expect(node, {name: (probe, REFUSED) for name, probe in probes.items()})
    iptables(node, family, *(f"-D {hook} -j ACCEPT" for hook in hooks))


def test_a_redirect_without_nat_is_a_drop(guarded: Guarded, family: str) -> None:
    guarded.enforce(EVERYTHING)
    node = guarded.node
    probes = {
        "listener, tcp": dial(STRANGER, family, NODE, 7003),
        "listener, udp": dial(STRANGER, family, NODE, 7003, "udp"),
        "hostPort": dial(STRANGER, family, NODE, 7103),
        "external": dial(STRANGER, family, EXTERNAL, 7203),
        "transit": dial(STRANGER, family, BEYOND, 7303),
    }
    expect(node, {name: (probe, REFUSED) for name, probe in probes.items()})
    with guarded.killed():
        ours = next(rule for rule in node.chain("nat", "PREROUTING", family) if "NODEWALL" in rule)
        iptables(node, family, f"-t nat -D PREROUTING {ours}")
        expect(node, {name: (probe, TIMEOUT) for name, probe in probes.items()})
        expect(node, {"allowed": (dial(ALLOWED, family, NODE, 7103), OPEN)})
    expect(node, {name: (probe, REFUSED) for name, probe in probes.items()})


# --- NodePorts of kube-proxy


NODEPORT_TEXT = """
[[port]]
name = "vault"
ports = [{port}]
allow = {allow}
action = "{action}"
from_node = {from_node}
"""


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("from_node", ["false", "true"])
def test_a_node_port_is_open_for_the_allowed_only(guarded: Guarded, action: str, from_node: str) -> None:
    text = NODEPORT_TEXT.format(port=NODEPORT, allow=both(ALLOWED), action=action, from_node=from_node)
    guarded.enforce(text)
    for family in FAMILIES:
        expect(
            guarded.node,
            {
                "stranger": (dial(STRANGER, family, NODE, NODEPORT), SHUT[action]),
                "stranger, second address": (dial(STRANGER, family, CLUSTER_ADDRESS, NODEPORT), SHUT[action]),
                "allowed": (dial(ALLOWED, family, NODE, NODEPORT), OPEN),
                "node": (dial_from("node", family, NODE, NODEPORT), OPEN if from_node == "false" else SHUT[action]),
                "transit": (dial(STRANGER, family, BEYOND, NODEPORT), OPEN),
                "transit of a pod": (dial_from("pod1", family, BEYOND, NODEPORT), OPEN),
                "transit of the node": (dial_from("node", family, BEYOND, NODEPORT), OPEN),
            },
        )
        # Not necessarily refused: with br_netfilter the kernel sends a pod's reset past nat, from another address.
        assert answer_to(guarded.node, dial_from("pod1", family, NODE, NODEPORT)).verdict is not OPEN
    expect(guarded.node, {"udp of the same number": (dial(STRANGER, "ipv4", NODE, NODEPORT, "udp"), OPEN)})


def test_the_node_itself_is_allowed_by_its_own_address(guarded: Guarded, family: str) -> None:
    guarded.enforce(NODEPORT_TEXT.format(port=NODEPORT, allow=both(NODE), action="drop", from_node="true"))
    expect(
        guarded.node,
        {
            "node": (dial_from("node", family, NODE, NODEPORT), OPEN),
            "stranger": (dial(STRANGER, family, NODE, NODEPORT), TIMEOUT),
        },
    )


# --- the way back in


FAILSAFE = '[[port]]\nname = "low"\nports = ["1-1024"]\nprotocol = ["tcp", "udp"]\naction = "{action}"\n'


def test_an_open_ssh_session_survives_everything(laboratory: None, backend: BackendName) -> None:
    with Node(backend) as node:
        serve(node, "node", tcp=[22])
        sessions = {
            family: Connection(node, "client", source=STRANGER.of(family), to=(NODE.of(family), 22))
            for family in FAMILIES
        }

        def alive(when: str) -> None:
            assert [family for family in FAMILIES if not sessions[family].alive()] == [], when

        guarded = Guarded(node)
        for action in ACTIONS:
            guarded.enforce(FAILSAFE.format(action=action))
            alive(f"the failsafe beside {action}")
        guarded.enforce("[failsafe]\nports = []\n" + FAILSAFE.format(action="reject").replace("1-1024", "23-1024"))
        alive("no failsafe, and nothing guarded")
        config = FAILSAFE.format(action="reject")
        guarded.enforce(config)
        daemon = guarded.daemon
        for family in FAMILIES:
            for table in ("filter", "mangle", "nat", "security"):
                iptables(node, family, f"-t {table} -F")
                alive(f"{table} flushed")
        guarded.settled()
        daemon.signal(signal.SIGHUP)
        alive("SIGHUP")
        with guarded.killed():
            alive("killed")
        alive("started again")
        expect(node, {f: (dial(STRANGER, f, NODE, 23), REFUSED) for f in FAMILIES})


# --- addresses of Services


def test_addresses_on_kube_ipvs0_are_left_alone(guarded: Guarded, family: str) -> None:
    guarded.enforce(EVERYTHING)
    node = guarded.node
    length = 32 if family == "ipv4" else 128
    probes = {action: dial(STRANGER, family, SERVICE, 7000 + n) for action, n in ACTIONS.items()}
    node.run("ip link add kube-ipvs0 type veth peer name ipvs-peer && ip link set ipvs-peer up")
    node.run("ip link set kube-ipvs0 up")
    try:
        nodad = "" if family == "ipv4" else "nodad"
        node.run(f"ip addr add {SERVICE.of(family)}/{length} dev kube-ipvs0 {nodad}")
        for probe in probes.values():
            eventually(node, probe, OPEN)
        expect(node, {a: (dial(STRANGER, family, NODE, 7000 + n), SHUT[a]) for a, n in ACTIONS.items()})
    finally:
        node.run("ip link del kube-ipvs0")
    node.run(f"ip addr add {SERVICE.of(family)}/{length} dev {node.uplink}")
    try:
        for action, probe in probes.items():
            eventually(node, probe, SHUT[action])
    finally:
        node.run(f"ip addr del {SERVICE.of(family)}/{length} dev {node.uplink}")
