"""[[forward]] decides about routed packets: whoever else accepts, wherever the default route leads."""

import subprocess
from collections.abc import Iterator
from dataclasses import replace

import pytest
from packets import (
    OPEN,
    REFUSED,
    TIMEOUT,
    Guarded,
    answer_to,
    both,
    dial,
    dial_from,
    eventually,
    expect,
    iptables,
    verdicts,
)

from lab.layout import ALLOWED, BEYOND, CLUSTER_NODE, NODE, POD1, STRANGER, STRANGER_2
from lab.node import BackendName, Node
from lab.traffic import Connection, Probe, Verdict, notrack, serve

pytestmark = pytest.mark.kernel

SHUT = {"drop": TIMEOUT, "reject": REFUSED}


@pytest.fixture(scope="module")
def node(laboratory: None, backend: BackendName) -> Iterator[Node]:
    with Node(backend) as made:
        for place in ("client", "node", "beyond", "pod1"):
            serve(made, place, tcp=[7001, 7002, 7003], udp=[7001, 7002], sctp=[7001])
        yield made


def back(family: str, port: int = 7001) -> Probe:
    """From beyond to the client's side, against the direction that the entries here are about."""
    return dial_from("beyond", family, ALLOWED, port)


@pytest.mark.parametrize("action", SHUT)
def test_a_refusal_without_position_holds_below_anybodys_accept(guarded: Guarded, family: str, action: str) -> None:
    guarded.enforce(f'[[forward]]\nname = "all"\nin = "eth0"\nout = "eth1"\naction = "{action}"\n')
    node = guarded.node
    shut = {
        "tcp": dial(STRANGER, family, BEYOND, 7001),
        "udp": dial(STRANGER, family, BEYOND, 7001, "udp"),
        "sctp": dial(STRANGER, family, BEYOND, 7001, "sctp"),
        "ping": dial(STRANGER, family, BEYOND, 0, "icmp"),
    }
    others = {
        "replies": (back(family), OPEN),
        "replies, udp": (dial_from("beyond", family, ALLOWED, 7001, "udp"), OPEN),
        "an answer by ICMP": (dial_from("beyond", family, ALLOWED, 7099, "udp"), REFUSED),
        "elsewhere": (dial(STRANGER, family, POD1, 7001), OPEN),
        "to the node": (dial(STRANGER, family, NODE, 7001), OPEN),
    }
    meant = {name: (probe, SHUT[action]) for name, probe in shut.items()} | others
    expect(node, meant)
    foreign = ["-I FORWARD -j ACCEPT", "-t mangle -I FORWARD -j ACCEPT"]
    iptables(node, family, *foreign)
    guarded.settled()
    expect(node, meant)
    # Where we yield, nobody answers for a reject any more: it is a drop, and no opening.
    silent = {name: (probe, TIMEOUT) for name, probe in shut.items()} | others
    iptables(node, family, "-N cali-all", "-A cali-all -j ACCEPT", "-I FORWARD -j cali-all")
    guarded.settled()
    assert node.chain("filter", "FORWARD", family)[0] == "-j cali-all"
    expect(node, silent)
    iptables(node, family, *(rule.replace("-I", "-D") for rule in foreign))
    iptables(node, family, "-D FORWARD -j cali-all", "-F cali-all", "-X cali-all")


_REPLIER = """
import socket, time
server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
server.bind(("::", 7098))
print("listening", flush=True)
_, peer = server.recvfrom(100)
server.connect(peer)
for _ in range(100):
    try:
        server.send(b"to a socket that is closed")
    except ConnectionRefusedError:
        print("refused", flush=True)
        break
    time.sleep(0.01)
else:
    print("silence", flush=True)
"""


def test_icmp_that_a_reply_causes_passes_where_icmp_is_refused(guarded: Guarded, family: str) -> None:
    entry = '[[forward]]\nname = "{0}"\nin = "eth0"\nprotocol = "{0}"\naction = "drop"\n'
    guarded.enforce(entry.format("icmp") + entry.format("ipv6-icmp"))
    node = guarded.node
    expect(node, {"ping": (dial(STRANGER, family, BEYOND, 0, "icmp"), TIMEOUT)})
    told_back(node, family)


def told_back(node: Node, family: str) -> None:
    """A reply to a socket that was closed meanwhile: the ICMP error about it reaches whoever replied."""
    replier = node.popen([node.python(), "-c", _REPLIER], ns="beyond", log="replier", stdout=subprocess.PIPE)
    assert replier.stdout
    assert replier.stdout.readline() == "listening\n"
    kind = "AF_INET" if family == "ipv4" else "AF_INET6"
    call = f"socket.socket(socket.{kind}, socket.SOCK_DGRAM).sendto(b'bye', ('{BEYOND.of(family)}', 7098))"
    node.run([node.python(), "-c", f"import socket; {call}"], ns="client")
    assert replier.stdout.readline() == "refused\n"


@pytest.mark.parametrize("action", SHUT)
def test_what_an_entry_names_and_nothing_else_is_refused(guarded: Guarded, family: str, action: str) -> None:
    guarded.enforce(f"""
[set.friends]
entries = {both(ALLOWED, CLUSTER_NODE)}

[[forward]]
name = "strangers"
in = ["eth0", "eth7"]
source = "!@friends"
destination = {both(BEYOND)}
protocol = "tcp"
ports = [7001, "7003-7005"]
action = "{action}"

[[forward]]
name = "one-source"
source = {both(STRANGER_2)}
protocol = "udp"
action = "{action}"

[[forward]]
name = "trial"
out = "eth1"
protocol = "tcp"
ports = [7002]
action = "{action}"
enforce = false
""")
    before = guarded.counted(family)
    expect(
        guarded.node,
        {
            "stranger": (dial(STRANGER, family, BEYOND, 7001), SHUT[action]),
            "stranger, in the range": (dial(STRANGER, family, BEYOND, 7003), SHUT[action]),
            "stranger, another port": (dial(STRANGER, family, BEYOND, 7002), OPEN),
            "stranger, another protocol": (dial(STRANGER, family, BEYOND, 7001, "udp"), OPEN),
            "stranger, another destination": (dial(STRANGER, family, POD1, 7001), OPEN),
            "friend": (dial(ALLOWED, family, BEYOND, 7001), OPEN),
            "friend, by the set": (dial(CLUSTER_NODE, family, BEYOND, 7003), OPEN),
            "by another interface": (dial_from("pod1", family, BEYOND, 7001), OPEN),
            "named source, udp": (dial(STRANGER_2, family, BEYOND, 7001, "udp"), SHUT[action]),
            "named source, udp to a pod": (dial(STRANGER_2, family, POD1, 7001, "udp"), SHUT[action]),
            "back": (back(family), OPEN),
        },
    )
    after = guarded.counted(family)
    assert after["forward/trial"] > before["forward/trial"]


def test_an_accept_opens_one_connection_both_ways_under_a_dropping_policy(guarded: Guarded, family: str) -> None:
    guarded.enforce(f"""
[[forward]]
name = "service"
in = "eth0"
out = "eth1"
source = {both(ALLOWED)}
protocol = "tcp"
ports = [7001, 7009]
action = "accept"
""")
    node = guarded.node
    iptables(node, family, "-P FORWARD DROP", "-A FORWARD -j DROP")
    try:
        expect(
            node,
            {
                "the service": (dial(ALLOWED, family, BEYOND, 7001), OPEN),
                "another port": (dial(ALLOWED, family, BEYOND, 7002), TIMEOUT),
                "another source": (dial(STRANGER, family, BEYOND, 7001), TIMEOUT),
                "another protocol": (dial(ALLOWED, family, BEYOND, 7001, "udp"), TIMEOUT),
                "against its direction": (back(family), TIMEOUT),
                "dressed as a reply": (replace(back(family), source_port=7009), TIMEOUT),
            },
        )
        session = Connection(node, "client", source=ALLOWED.of(family), to=(BEYOND.of(family), 7001))
        assert session.alive()
        iptables(node, family, "-I FORWARD -j DROP")
        eventually(node, dial(ALLOWED, family, BEYOND, 7001), OPEN)
        assert session.alive()
        iptables(node, family, "-D FORWARD -j DROP")
    finally:
        iptables(node, family, "-P FORWARD ACCEPT", "-D FORWARD -j DROP")


def test_the_default_route_is_followed(guarded: Guarded, family: str) -> None:
    daemon = guarded.enforce('[[forward]]\nname = "world"\nin = "@default-route"\naction = "drop"\n')
    node = guarded.node
    route = "ip -4 route" if family == "ipv4" else "ip -6 route"
    inwards = dial(STRANGER_2, family, POD1, 7001)
    across = dial_from("beyond", family, POD1, 7001)
    original = node.run(f"{route} show default").stdout.splitlines()[0].strip()
    answer = f"{STRANGER_2.of(family)} dev {node.uplink} " + original.partition(" dev ")[0].removeprefix("default ")
    expect(node, {"in by eth0": (inwards, TIMEOUT), "in by eth1": (across, OPEN)})
    node.run(f"{route} add {answer}")  # so that answers find their way without a default route
    try:
        node.run(f"{route} del {original} && {route} add default via {BEYOND.of(family)} dev eth1")
        eventually(node, across, TIMEOUT)
        eventually(node, inwards, OPEN)
        daemon.wait_status(state="enforcing")
        node.run(f"{route} del default")
        eventually(node, inwards, TIMEOUT)
        status = daemon.wait_status(state="degraded")
        assert [reason for reason in status["reasons"] if "default route" in reason]
        expect(node, {"in by eth1 as well": (across, TIMEOUT)})
    finally:
        node.run(f"{route} del default; {route} del {answer}; {route} add {original}", check=False)
    daemon.wait_status(state="enforcing")
    eventually(node, across, OPEN)
    expect(node, {"in by eth0": (inwards, TIMEOUT)})


def test_an_accept_by_the_default_route_is_not_written_without_one(guarded: Guarded, family: str) -> None:
    daemon = guarded.enforce('[[forward]]\nname = "world"\nin = "@default-route"\naction = "accept"\n')
    node = guarded.node
    route = "ip -4 route" if family == "ipv4" else "ip -6 route"
    original = node.run(f"{route} show default").stdout.splitlines()[0].strip()
    probe = dial(ALLOWED, family, BEYOND, 7001)
    iptables(node, family, "-P FORWARD DROP")
    try:
        expect(node, {"with a default route": (probe, OPEN)})
        node.run(f"{route} del {original}")
        eventually(node, probe, TIMEOUT)
        assert answer_to(node, dial(ALLOWED, family, NODE, 7001)).verdict is Verdict.OPEN
        node.run(f"{route} add {original}")
        eventually(node, probe, OPEN)
        daemon.wait_status(state="enforcing")
    finally:
        iptables(node, family, "-P FORWARD ACCEPT")


def test_several_default_routes_are_all_meant(guarded: Guarded, family: str) -> None:
    guarded.enforce('[[forward]]\nname = "world"\nin = "@default-route"\naction = "drop"\n')
    node = guarded.node
    route = "ip -4 route" if family == "ipv4" else "ip -6 route"
    other = "ipv6" if family == "ipv4" else "ipv4"
    across = dial_from("beyond", family, POD1, 7001)
    expect(node, {"by eth1": (across, OPEN)})
    node.run(f"{route} add default via {BEYOND.of(family)} dev eth1 metric 2000")
    try:
        eventually(node, across, TIMEOUT)
        expect(
            node,
            {
                "by eth0 as before": (dial(STRANGER, family, POD1, 7001), TIMEOUT),
                "the other family": (dial_from("beyond", other, POD1, 7001), OPEN),
                "by a pod": (dial_from("pod1", family, BEYOND, 7001), OPEN),
            },
        )
    finally:
        node.run(f"{route} del default via {BEYOND.of(family)} dev eth1 metric 2000")
    eventually(node, across, OPEN)


# Each entry about another interface, so that all can be in force at once: who is shut is in the table of the test.
INTERFACES = {
    'in = "eth+"': {"in", "across", "back"},
    'in = "!eth+"': {"pod"},
    'in = ["!eth1", "!cni0"]': {"in", "across"},
    'out = ["eth1", "lo"]': {"across", "pod"},
    'in = "eth+"\nout = "!cni0"': {"across"},
    'in = ["eth0", "eth1"]\nout = ["cni0", "eth7"]': {"in", "back"},
    'out = "@default-route"': set(),
    'in = "!@default-route"': {"pod", "back"},
}


@pytest.mark.parametrize("position", ["", 'position = "first"\n'], ids=["mangle", "filter"])
def test_interfaces_mean_what_they_say(guarded: Guarded, family: str, position: str) -> None:
    ways = {
        "in": dial(STRANGER, family, POD1, 7001),
        "across": dial(STRANGER, family, BEYOND, 7001),
        "pod": dial_from("pod1", family, BEYOND, 7001),
        "back": dial_from("beyond", family, POD1, 7001),
    }
    for interfaces, shut in INTERFACES.items():
        guarded.enforce(f'[[forward]]\nname = "x"\n{interfaces}\naction = "reject"\n{position}')
        seen = verdicts(guarded.node, ways)
        assert seen == {way: REFUSED if way in shut else OPEN for way in ways}, interfaces


def test_a_negated_destination_and_an_untracked_packet_are_judged(guarded: Guarded, family: str) -> None:
    guarded.enforce(
        f"[set.public]\nentries = {both(BEYOND)}\n"
        '[[forward]]\nname = "only"\nin = "eth0"\ndestination = "!@public"\naction = "drop"\n'
        f'[[forward]]\nname = "listed"\nin = "eth0"\ndestination = ["!198.51.100.0/24", "!2001:db8:b::/64"]\n'
        'protocol = "udp"\naction = "reject"\n'
        f'[[forward]]\nname = "untracked"\nin = "eth0"\ndestination = {both(BEYOND)}\nprotocol = "tcp"\n'
        'ports = [7003]\naction = "drop"\n'
    )
    node = guarded.node
    notrack(node, port=7003)
    expect(
        node,
        {
            "the set": (dial(STRANGER, family, BEYOND, 7001), OPEN),
            "another": (dial(STRANGER, family, POD1, 7001), TIMEOUT),
            "the set, udp": (dial(STRANGER, family, BEYOND, 7001, "udp"), OPEN),
            "untracked": (dial(STRANGER, family, BEYOND, 7003), TIMEOUT),
            "untracked, out": (dial_from("pod1", family, BEYOND, 7003), OPEN),
        },
    )


@pytest.mark.parametrize("action", SHUT)
def test_with_a_position_the_order_among_foreign_rules_is_the_meaning(
    guarded: Guarded, family: str, action: str
) -> None:
    entry = f'[[forward]]\nname = "x"\nin = "eth0"\nprotocol = "tcp"\nports = [7001, 7002]\naction = "{action}"\n'
    node = guarded.node
    accept = f"FORWARD -s {ALLOWED.of(family)} -j ACCEPT"
    iptables(node, family, f"-A {accept}")
    try:
        for position, friend in (("last", OPEN), ("first", SHUT[action])):
            guarded.enforce(entry + f'position = "{position}"\n')
            expect(
                node,
                {
                    f"{position}, accepted by others": (dial(ALLOWED, family, BEYOND, 7001), friend),
                    f"{position}, a stranger": (dial(STRANGER, family, BEYOND, 7002), SHUT[action]),
                    f"{position}, another port": (dial(STRANGER, family, BEYOND, 7003), OPEN),
                },
            )
        guarded.enforce(entry)
        expect(node, {"without, below an ACCEPT": (dial(ALLOWED, family, BEYOND, 7001), SHUT[action])})
    finally:
        iptables(node, family, f"-D {accept}")


@pytest.mark.parametrize("interfaces", ['in = "eth0"\nout = "eth1"\n', 'in = "!eth1"\n'], ids=["named", "negated"])
def test_icmp_about_what_is_accepted_passes_both_ways(guarded: Guarded, family: str, interfaces: str) -> None:
    guarded.enforce(
        f'[[forward]]\nname = "service"\n{interfaces}protocol = "udp"\nports = [7098, 7099]\naction = "accept"\n'
    )
    node = guarded.node
    iptables(node, family, "-P FORWARD DROP")
    try:
        told_back(node, family)
        expect(node, {"to the client": (dial(ALLOWED, family, BEYOND, 7099, "udp"), REFUSED)})
        expect(node, {"a ping": (dial(ALLOWED, family, BEYOND, 0, "icmp"), TIMEOUT)})
    finally:
        iptables(node, family, "-P FORWARD ACCEPT")
