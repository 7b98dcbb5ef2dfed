"""With iptables alone, the shield alone, or both: the same are let through, whatever the configuration says.

Each configuration meets one of the backends; NODEWALLD_WALKS asks for more of them.
"""

import os
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import pytest
from captured import CAPTURES
from live import ask
from packets import OPEN, TIMEOUT, dial, dial_from, iptables, verdicts
from pages import section
from shields import each_way, put
from stacks import build
from test_examples import STACKS, text_of
from test_packets import EVERYTHING, EXTERNAL, matrix
from test_random_configurations import written

from lab.daemon import Daemon
from lab.layout import (
    ALLOWED,
    ALLOWED_2,
    BEYOND,
    BROADCAST_OR_ANYCAST,
    CLUSTER_ADDRESS,
    CLUSTER_NODE,
    FAMILIES,
    LOOPBACK,
    MULTICAST,
    NODE,
    POD1,
    REMOTE_POD,
    STRANGER,
    STRANGER_2,
)
from lab.node import BackendName, Node
from lab.traffic import Probe, Protocol, Verdict, serve, serve_cluster

pytestmark = pytest.mark.kernel

CONFIGURATIONS, PROBES = int(os.environ.get("NODEWALLD_WALKS", "10")), 130
BACKENDS: tuple[BackendName, BackendName] = ("nft", "legacy")
PORTS = list(range(7001, 7009))
PROTOCOLS: tuple[Protocol, ...] = ("tcp", "udp")


def shared(name: str, values: Iterable[Any]) -> pytest.MarkDecorator:
    """Give the backends these values in turn."""
    return pytest.mark.parametrize(("backend", name), [(BACKENDS[n % 2], value) for n, value in enumerate(values)])


def three_ways(daemon: Daemon, text: str, probes: dict[str, Probe]) -> dict[str, dict[str, Verdict]]:
    """How each attempt ends with iptables alone, with the shield as well, and with the shield alone."""
    print(f"{daemon.node.backend}: {3 * len(probes)} packets")
    return {way: verdicts(daemon.node, probes) for way in each_way(daemon, text)}


def differences(found: dict[str, dict[str, Verdict]], *, whole: bool) -> list[str]:
    """What is not as it should be; `whole`: the shield carries all that iptables does, so it can be judged alone."""
    wrong = []
    for name in found["iptables"]:
        # Nobody may hold the address that was dialled: whether that is told in time is the neighbour cache's to say.
        ends = {way: TIMEOUT if each[name] is Verdict.UNREACHABLE else each[name] for way, each in found.items()}
        alone, iptables = ends["shield"] is OPEN, ends["iptables"] is OPEN
        if ends["both"] is not ends["iptables"] or (whole and alone != iptables):
            wrong.append(f"{name}: {ends}")
    return wrong


@contextmanager
def cluster(backend: BackendName) -> Iterator[Daemon]:
    """Kube-proxy's rules, a Service's external address, and listeners on all the ports that are asked for."""
    with Node(backend) as made:
        made.load(CAPTURES / "kp126-{backend}-3svc")
        serve_cluster(made)
        ports = PORTS + [base + n for base in (7300, 7400, 7500, 7510, 7600) for n in (1, 2, 3)]
        for ns in ("node", "beyond", "pod1"):
            serve(made, ns, tcp=ports, udp=ports)
        serve(made, "client", tcp=[7999], udp=[7999])
        for family, pod in (("ipv4", POD1.ipv4), ("ipv6", f"[{POD1.ipv6}]")):
            external, to = EXTERNAL.of(family), f"-j DNAT --to-destination {pod}"
            rules = [f"-d {external} -p tcp --dport 7001:7004 {to}"]
            for protocol, port in (("tcp", 8080), ("udp", 53)):
                rules += [f"-m addrtype --dst-type LOCAL -p {protocol} --dport 7101:7103 {to}:{port}"]
                rules += [f"-d {external} -p {protocol} --dport 7201:7203 {to}:{port}"]
            iptables(made, family, *(f"-t nat -A PREROUTING {rule}" for rule in rules))
        yield Daemon(made, "").wait_ready()


@pytest.fixture(scope="module")
def clusters(laboratory: None) -> Iterator[Callable[[BackendName], Daemon]]:
    """One for each backend, made when it is first asked for."""
    with ExitStack() as stack:
        yield cache(lambda backend: stack.enter_context(cluster(backend)))


@pytest.fixture
def daemon(clusters: Callable[[BackendName], Daemon], backend: BackendName) -> Daemon:
    return clusters(backend)


def _addresses(dice: random.Random) -> list[str]:
    known = [STRANGER, ALLOWED, ALLOWED_2, CLUSTER_NODE, REMOTE_POD]
    some = [dice.choice(known).of(family) for family in FAMILIES for _ in range(2)]
    return dice.sample([*some, "10.90.0.0/24", "fd90::/64", "@some", "@none", "203.0.113.0/29"], dice.randint(0, 4))


def _ports(dice: random.Random) -> list[Any]:
    spans = [f"{first}-{min(first + dice.randint(0, 3), 7008)}" for first in dice.sample(PORTS, 2)]
    return [*dice.sample(PORTS, 2), *spans[: dice.randint(0, 2)], *([31002] if dice.random() < 0.4 else [])]


def configuration(dice: random.Random) -> dict[str, Any]:
    """Ports that overlap, zones, and routed traffic, of all kinds that the shield knows."""
    some = [STRANGER_2.ipv4, STRANGER_2.ipv6, "172.18.0.0/16", "fd00:18::/32"]
    tree: dict[str, Any] = {
        "failsafe": {
            "ports": ["22/tcp", "7008/tcp"],
            "from": [ALLOWED.ipv4, "@some"] if dice.random() < 0.5 else ["any"],
        },
        "set": {"some": {"entries": some}, "none": {"entries": []}},
        "port": [],
        "forward": [],
        "zone": {},
    }
    for number in range(dice.randint(1, 4)):
        entry = {
            "name": f"p{number}",
            "ports": _ports(dice),
            "protocol": dice.choice([["tcp"], ["udp"], ["tcp", "udp"]]),
            "allow": _addresses(dice),
            "deny": _addresses(dice)[:1],
            "action": dice.choice(["drop", "drop", "reject", "redirect"]),
            "from_node": dice.random() < 0.4,
            "destination": dice.choice(["local", "local", "any", [BEYOND.ipv4, EXTERNAL.ipv4, EXTERNAL.ipv6]]),
            "enforce": dice.random() < 0.9,
        }
        tree["port"].append(entry)
    for number in range(dice.randint(0, 2)):
        tree["zone"][f"z{number}"] = {
            "sources": [[STRANGER.ipv4, STRANGER.ipv6], ["@some", "10.90.0.0/24", "fd90::/64"]][number],
            "interfaces": dice.choice([[], ["eth0"]]) if number == 0 else [],
            "ports": dice.sample(["7001/tcp", "7003-7005/udp", "31002/tcp", "7002-7006/tcp"], 2),
            "target": dice.choice(["drop", "reject", "accept"]),
        }
    for number in range(dice.randint(0, 2)):
        entry = {
            "name": f"f{number}",
            "source": dice.choice(["any", "!@some", STRANGER.ipv4, [STRANGER_2.ipv6, STRANGER.ipv6]]),
            "destination": dice.choice(["any", "any", BEYOND.ipv4, f"!{BEYOND.ipv6}"]),
            "in": dice.choice(["", "eth0", "!eth0", "eth+"]),
            "out": dice.choice(["", "eth1", "!eth1"]),
            "action": dice.choice(["drop", "reject"]),
        }
        if dice.random() < 0.6:
            entry |= {"protocol": dice.choice(["tcp", "udp"]), "ports": _ports(dice)}
        tree["forward"].append(entry)
    return tree


def attempts(dice: random.Random) -> dict[str, Probe]:
    """Attempts of all kinds, in both families."""
    found = {}
    for _ in range(PROBES):
        family, protocol = dice.choice(FAMILIES), dice.choice(["tcp", "udp"])
        port = 31002 if dice.random() < 0.15 else dice.choice(PORTS)
        to = dice.choice([NODE, NODE, CLUSTER_ADDRESS, EXTERNAL, BEYOND, POD1])
        source = dice.choice([STRANGER, STRANGER_2, ALLOWED, ALLOWED_2, CLUSTER_NODE, REMOTE_POD])
        if dice.random() < 0.15:
            ns, to = dice.choice(["node", "pod1"]), dice.choice([NODE, LOOPBACK, BEYOND])
            to = NODE if ns == "pod1" and to is LOOPBACK else to
            probe = dial_from(ns, family, to, port, protocol)
            found[f"{ns} to {to.of(family)} {port}/{protocol}"] = probe
        else:
            if protocol == "udp" and dice.random() < 0.1:
                to = dice.choice([MULTICAST, BROADCAST_OR_ANYCAST])
            found[f"{source.of(family)} to {to.of(family)} {port}/{protocol}"] = dial(
                source, family, to, port, protocol
            )
    return found


@shared("seed", range(CONFIGURATIONS))
def test_any_configuration_lets_the_same_through_in_iptables_and_in_the_shield(daemon: Daemon, seed: int) -> None:
    dice = random.Random(seed)
    text = written(configuration(dice))
    wrong = differences(three_ways(daemon, text, attempts(dice)), whole=True)
    assert not wrong, "\n".join([*wrong, text])


@shared("family", FAMILIES)
def test_every_action_and_destination_alike(daemon: Daemon, family: str) -> None:
    wrong = differences(three_ways(daemon, EVERYTHING, {n: p for n, (p, _) in matrix(family).items()}), whole=True)
    assert not wrong, "\n".join(wrong)


@shared("target", ["drop", "reject"])
def test_zones_alike_whichever_way_leads_here(daemon: Daemon, target: str) -> None:
    """By address, by NodePort, and by an address of a load balancer that no interface holds."""
    allowed = ["7001/tcp", "7201/tcp", "7003/udp", "7006/udp"]
    zone = {"z": {"interfaces": ["eth0"], "ports": allowed, "target": target}}
    text = written({"zone": zone, "port": [{"name": "alone", "ports": [7006], "protocol": ["udp"]}]})
    ways = [(NODE, port) for port in (7001, 7002, 7003, 31002)]
    ways += [(EXTERNAL, port) for port in (7001, 7002, 7201, 7202)] + [(BEYOND, 7002)]
    probes = {
        f"{to.of(family)} {port}/{protocol}": dial(STRANGER, family, to, port, protocol)
        for family in FAMILIES
        for protocol in PROTOCOLS
        for to, port in ways
    }
    groups = [(family, to, port) for family in FAMILIES for to in (MULTICAST, BROADCAST_OR_ANYCAST) for port in PORTS]
    probes |= {f"{to.of(f)} {port}/udp": dial(STRANGER, f, to, port, "udp") for f, to, port in groups}
    probes |= {f"to a stranger {f} {p}": dial_from("node", f, STRANGER, 7999, p) for f in FAMILIES for p in PROTOCOLS}
    found = three_ways(daemon, text, probes)
    wrong = differences(found, whole=True)
    assert not wrong, "\n".join(wrong)
    assert {end for name, end in found["shield"].items() if name.startswith("to a stranger")} == {OPEN}


@shared("example", STACKS)
def test_every_example_alike(laboratory: None, backend: BackendName, example: str) -> None:
    """On the stack it is made for; alone where the shield has all of it, not raw rules and places among others'."""
    rows, text = section(example).rows, text_of(example)
    with build(STACKS[example], backend) as node:
        daemon = Daemon(node, "").wait_ready()
        probes = {f"{number} {family}": row.probe(family) for number, row in enumerate(rows) for family in FAMILIES}
        found = three_ways(daemon, text, probes)
        put(daemon, text)
        status = ask(daemon, "status")["shield"]
        wrong = differences(found, whole=not status["iptables_only"])
        assert not wrong, "\n".join(wrong)
        assert status["state"] == ("empty" if example in {"any-rule", "protect-pods"} else "owned")
