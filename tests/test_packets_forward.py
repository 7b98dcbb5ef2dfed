"""[[forward]] decides about routed packets: whoever else accepts, wherever the default route leads."""

from collections.abc import Iterator
from typing import cast

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
)

from lab.node import (
    ALLOWED,
    BEYOND,
    CLUSTER_NODE,
    FAMILIES,
    NODE,
    POD1,
    STRANGER,
    STRANGER_2,
    BackendName,
    Node,
)
from lab.traffic import Connection, Probe, Verdict, serve

pytestmark = pytest.mark.kernel

SHUT = {"drop": TIMEOUT, "reject": REFUSED}


@pytest.fixture(scope="module", params=["nft", "legacy"])
def backend(request: pytest.FixtureRequest) -> BackendName:
    return cast("BackendName", request.param)


@pytest.fixture(scope="module")
def node(laboratory: None, backend: BackendName) -> Iterator[Node]:
    with Node(backend) as made:
        for place in ("client", "node", "beyond", "pod1"):
            serve(made, place, tcp=[7001, 7002, 7003], udp=[7001, 7002], sctp=[7001])
        yield made


@pytest.fixture(scope="module")
def guarded(node: Node) -> Guarded:
    return Guarded(node)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def back(family: str, port: int = 7001) -> Probe:
    """From beyond to the client's side, against the direction that the entries here are about."""
    return dial_from("beyond", family, ALLOWED, port)


@pytest.mark.parametrize("action", SHUT)
def test_a_refusal_without_position_holds_below_anybodys_accept(guarded: Guarded, family: str, action: str) -> None:
    daemon = guarded.enforce(f'[[forward]]\nname = "all"\nin = "eth0"\nout = "eth1"\naction = "{action}"\n')
    node = guarded.node
    foreign = ["-I FORWARD -j ACCEPT", "-t mangle -I FORWARD -j ACCEPT"]
    wanted = {
        "tcp": (dial(STRANGER, family, BEYOND, 7001), SHUT[action]),
        "udp": (dial(STRANGER, family, BEYOND, 7001, "udp"), SHUT[action]),
        "sctp": (dial(STRANGER, family, BEYOND, 7001, "sctp"), SHUT[action]),
        "ping": (dial(STRANGER, family, BEYOND, 0, "icmp"), SHUT[action]),
        "replies": (back(family), OPEN),
        "replies, udp": (dial_from("beyond", family, ALLOWED, 7001, "udp"), OPEN),
        "an answer by ICMP": (dial_from("beyond", family, ALLOWED, 7099, "udp"), REFUSED),
        "elsewhere": (dial(STRANGER, family, POD1, 7001), OPEN),
        "to the node": (dial(STRANGER, family, NODE, 7001), OPEN),
    }
    expect(node, wanted)
    iptables(node, family, *foreign)
    guarded.settled()
    daemon.kill9()
    expect(node, wanted)
    iptables(node, family, *(rule.replace("-I", "-D") for rule in foreign))


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
ports = [7001]
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
