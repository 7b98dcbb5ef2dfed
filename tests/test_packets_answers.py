"""What a refusal says, to its sender and to the log: a reset, the right ICMP error, silence; one line, not too many.

No kernel shows a namespace what LOG has written. So the log is heard through twins: with the daemon dead, each LOG rule
of ours becomes the NFLOG rule of the same matches and prefix, where it stood.
"""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator

import pytest
from packets import OPEN, Guarded, both, dial, expect

from lab.layout import BEYOND, FAMILIES, NODE, POD1, POD2, STRANGER, Address
from lab.node import TOOLS, BackendName, Node
from lab.traffic import Protocol, connect_all, serve
from lab.wire import ICMP, ICMPV6, TCP, UDP, Exchange, Packet, exchange

pytestmark = pytest.mark.kernel

LOAD_BALANCER = Address("198.51.100.200", "2001:db8:b::200")  # of a Service, held by no interface
PORT_UNREACHABLE = {"ipv4": (ICMP, (3, 3)), "ipv6": (ICMPV6, (1, 4))}
KINDS = {"port": "port", "zone": "zone", "transit": "forward", "placed": "forward"}
REFUSALS = """
[failsafe]
ports = []

[[port]]
name     = "port"
ports    = [7001, 7101]
protocol = ["tcp", "udp", "sctp"]
action   = "{action}"
log      = {log}
enforce  = {enforce}

[[forward]]
name   = "transit"
in     = "eth0"
out    = "eth1"
action = "{action}"
log    = {log}
enforce = {enforce}

[[forward]]
name     = "placed"
in       = "eth0"
destination = {pod}
action   = "{action}"
position = "first"
log      = {log}
enforce  = {enforce}

[zone.zone]
interfaces = ["eth0"]
ports      = ["7001/tcp", "7001/udp", "7001/sctp", "7101/tcp", "7101/udp"]
target     = "{action}"
log        = {log}
enforce    = {enforce}
"""


@pytest.fixture(scope="module")
def node(laboratory: None, backend: BackendName) -> Iterator[Node]:
    """A node whose ports 7101 and 7102 lead to a pod, and those of an address of a load balancer."""
    with Node(backend) as made:
        serve(made, "node", tcp=[7001, 7002], udp=[7001, 7002])
        for ns in ("beyond", "pod1", "pod2"):
            serve(made, ns, tcp=[7003, 7004], udp=[7003, 7004])
        for family, tool in TOOLS.items():
            pod = POD1.ipv4 if family == "ipv4" else f"[{POD1.ipv6}]"
            for protocol in ("tcp", "udp"):
                to = f"-p {protocol} -m multiport --dports 7101,7102 -j DNAT --to-destination {pod}:7003"
                made.run(f"{tool} -t nat -A PREROUTING -m addrtype --dst-type LOCAL {to}")
                made.run(f"{tool} -t nat -A PREROUTING -d {LOAD_BALANCER.of(family)} {to}")
        yield made


def config(action: str, *, log: str = "false", enforce: str = "true") -> str:
    return REFUSALS.format(action=action, pod=both(POD2), log=log, enforce=enforce)


def attempts(family: str) -> dict[str, tuple[Packet, str]]:
    """A packet for every kind of entry and every way, and the entry that it concerns."""
    found = {}
    for name, to, protocol, port, entry in (
        ("listener", NODE, TCP, 7001, "port"),
        ("listener, udp", NODE, UDP, 7001, "port"),
        ("hostPort", NODE, TCP, 7101, "port"),
        ("hostPort, udp", NODE, UDP, 7101, "port"),
        ("zone", NODE, TCP, 7002, "zone"),
        ("zone, udp", NODE, UDP, 7002, "zone"),
        ("hostPort in a zone", NODE, TCP, 7102, "zone"),
        ("hostPort in a zone, udp", NODE, UDP, 7102, "zone"),
        ("load balancer in a zone", LOAD_BALANCER, TCP, 7102, "zone"),
        ("load balancer in a zone, udp", LOAD_BALANCER, UDP, 7102, "zone"),
        ("transit", BEYOND, TCP, 7003, "transit"),
        ("transit, udp", BEYOND, UDP, 7003, "transit"),
        ("transit, at a position", POD2, TCP, 7004, "placed"),
        ("transit, at a position, udp", POD2, UDP, 7004, "placed"),
    ):
        found[name] = Packet("client", to.of(family), protocol, "aa", port, STRANGER.of(family), 0), entry
    return found


def answer(seen: Exchange, family: str, packet: Packet) -> set[str]:
    """What the sender was told about one packet."""
    protocol, port_unreachable = PORT_UNREACHABLE[family]
    what = (packet.protocol, packet.port)
    told = {"reset" for a in seen.at("client", TCP) if a.reset and what == (TCP, int.from_bytes(a.content[:2]))}
    quoted, carries, header = (8, 9, 20) if family == "ipv4" else (8, 6, 40)
    for error in seen.at("client", protocol):
        about, dialled = error.content[quoted:], error.content[quoted + header + 2 : quoted + header + 4]
        if len(dialled) == 2 and what == (about[carries], int.from_bytes(dialled)):
            told.add("unreachable" if error.icmp == port_unreachable else f"ICMP {error.icmp}")
    return told


@pytest.mark.parametrize("action", ["drop", "reject"])
def test_a_refusal_answers_as_its_action_says(guarded: Guarded, family: str, action: str) -> None:
    guarded.enforce(config(action))
    packets = {name: packet for name, (packet, _) in attempts(family).items()}
    seen = exchange(guarded.node, list(packets.values()), fence=NODE.of(family))
    said = {name: answer(seen, family, packet) for name, packet in packets.items()}
    by_protocol = {TCP: {"reset"}, UDP: {"unreachable"}}
    assert said == {n: by_protocol[p.protocol] if action == "reject" else set() for n, p in packets.items()}


# --- the log


@contextlib.contextmanager
def heard(guarded: Guarded) -> Iterator[None]:
    """With the daemon dead, and NFLOG in the place of every LOG, in the shield as well."""
    with guarded.killed():
        shield = guarded.node.run("nft list table inet nodewalld", check=False).stdout
        if "log prefix" in shield:
            shield = re.sub(r'log prefix ("[^"]*")', r"log prefix \1 group 0", re.sub(r"\n\tflags \w*\n", "\n", shield))
            guarded.node.run("nft -f -", stdin=f"delete table inet nodewalld\n{shield}")
        for tool in ("iptables", "ip6tables"):
            rules = guarded.node.run(f"{tool}-save").stdout
            assert "-j LOG --log-prefix" in rules
            rules = rules.replace("-j LOG --log-prefix", "-j NFLOG --nflog-prefix")
            guarded.node.run(f"{tool}-restore", stdin=rules)
        yield


def counts(guarded: Guarded, family: str) -> Counter[str]:
    """How many packets each entry on trial would have refused."""
    found: Counter[str] = Counter()
    for row in json.loads(guarded.daemon.ctl("show", "--json").stdout)["rules"]:
        would = row["chain"].startswith(("NODEWALL-x-", "NODEWALL-zx-", "NODEWALL-f-"))
        if row["family"] == family and would and " -j " not in row["rule"]:
            found[row["entry"]] += row["packets"]
    return found


@pytest.mark.parametrize("enforce", ["true", "false"])
@pytest.mark.parametrize("action", ["drop", "reject"])
def test_each_refused_packet_is_logged_once_by_the_name_of_its_entry(
    guarded: Guarded, action: str, enforce: str
) -> None:
    guarded.enforce(config(action, log="true", enforce=enforce))
    with heard(guarded):
        for family in FAMILIES:
            sent = [(packet, entry) for packet, entry in attempts(family).values() if packet.protocol == UDP]
            seen = exchange(guarded.node, [packet for packet, _ in sent], fence=NODE.of(family))
            assert Counter(seen.logged) == Counter(f"nodewall:{entry} " for _, entry in sent)


def test_the_log_is_not_flooded(guarded: Guarded) -> None:
    guarded.enforce(config("drop", log="true"))
    with heard(guarded):
        for family in FAMILIES:
            packet = attempts(family)["listener, udp"][0]
            seen = exchange(guarded.node, [packet] * 200, fence=NODE.of(family))
            assert 10 <= len(seen.logged) <= 11 + 5 * seen.seconds


def test_a_trial_counts_each_packet_once_and_refuses_none(guarded: Guarded, family: str) -> None:
    guarded.enforce(config("reject", enforce="false"))
    tried = attempts(family)
    sent = [(packet, entry) for packet, entry in tried.values() if packet.protocol == UDP]
    before = counts(guarded, family)
    exchange(guarded.node, [packet for packet, _ in sent], fence=NODE.of(family))
    assert counts(guarded, family) - before == Counter(f"{KINDS[entry]}/{entry}" for _, entry in sent)
    probes = {
        n: dial(STRANGER, family, p.to, p.port, "tcp" if p.protocol == TCP else "udp") for n, (p, _) in tried.items()
    }
    expect(guarded.node, {name: (probe, OPEN) for name, probe in probes.items()})


def test_a_rule_on_trial_counts_and_does_nothing(guarded: Guarded, family: str) -> None:
    rule = '[[rule]]\nname = "text"\ntable = "mangle"\nchain = "PREROUTING"\nrule = "-p udp --dport 7001 -j DROP"\n'
    guarded.enforce(rule + "enforce = false\n")
    before = guarded.counted(family)["rule/text"]
    exchange(guarded.node, [attempts(family)["listener, udp"][0]] * 3, fence=NODE.of(family))
    assert guarded.counted(family)["rule/text"] == before + 3
    expect(guarded.node, {"udp": (dial(STRANGER, family, NODE, 7001, "udp"), OPEN)})


def test_a_redirect_goes_to_the_port_that_it_names_and_is_logged_once(guarded: Guarded) -> None:
    port = '[[port]]\nname = "turned"\nports = [7001, 7101]\nprotocol = ["tcp", "udp"]\naction = "redirect:7002"\n'
    guarded.enforce(port + "log = true\n")
    ways: list[tuple[int, Protocol]] = [(7001, "tcp"), (7001, "udp"), (7101, "tcp"), (7101, "udp")]
    probes = [dial(STRANGER, family, NODE, number, protocol) for family in FAMILIES for number, protocol in ways]
    assert [(a.server, a.port) for a in connect_all(guarded.node, probes)] == [("node", 7002)] * 8
    with heard(guarded):
        for family in FAMILIES:
            sent = [packet for packet, entry in attempts(family).values() if (packet.protocol, entry) == (UDP, "port")]
            assert list(exchange(guarded.node, sent, fence=NODE.of(family)).logged) == ["nodewall:turned "] * 2
