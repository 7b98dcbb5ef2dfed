"""[failsafe] is the way back in: above every port and zone, for those it names, and no more than that."""

from collections.abc import Iterator

import pytest
from packets import OPEN, SHUT, TIMEOUT, Guarded, both, dial, expect, iptables

from lab.layout import ALLOWED, ALLOWED_2, BEYOND, FAMILIES, NODE, POD1, STRANGER
from lab.node import BackendName, Node
from lab.traffic import serve

pytestmark = pytest.mark.kernel

EVERYTHING = """
[set.admins]
entries = {admins}

[failsafe]
ports = ["22/tcp", "2200-2202/tcp", "53/udp"]
from  = {sources}

[[port]]
name = "all"
ports = ["1-65000"]
protocol = ["tcp", "udp"]
action = "{action}"

[[port]]
name = "anywhere"
ports = ["1-65000"]
protocol = ["tcp", "udp"]
action = "{action}"
destination = "any"

[zone.all]
interfaces = ["eth0"]
target = "{zone}"
"""


@pytest.fixture(scope="module")
def node(laboratory: None, backend: BackendName) -> Iterator[Node]:
    """A node whose ports 2202 and 2203 lead to a pod."""
    with Node(backend) as made:
        serve(made, "node", tcp=[22, 23, 2201], udp=[53, 54])
        for ns in ("beyond", "pod1"):
            serve(made, ns, tcp=[22])
        for family in FAMILIES:
            pod = POD1.ipv4 if family == "ipv4" else f"[{POD1.ipv6}]"
            to = f"-p tcp -m multiport --dports 2202,2203 -j DNAT --to-destination {pod}:22"
            iptables(made, family, f"-t nat -A PREROUTING -m addrtype --dst-type LOCAL {to}")
        yield made


@pytest.mark.parametrize("action", SHUT)
@pytest.mark.parametrize("narrowed", [False, True], ids=["any", "narrowed"])
def test_no_port_and_no_zone_shuts_it_for_those_it_names(
    guarded: Guarded, family: str, action: str, narrowed: bool
) -> None:
    zone = "drop" if action == "redirect" else action
    sources = both(ALLOWED).replace("]", ', "@admins"]') if narrowed else '["any"]'
    text = EVERYTHING.format(admins=both(ALLOWED_2), sources=sources, action=action, zone=zone)
    guarded.enforce(text)
    guarded.nothing_to_do()
    # In the zone's eyes a redirected port is as shut as any: what is dialled counts.
    shut = TIMEOUT if action == "redirect" else SHUT[action]
    table = {}
    parties = (("named", ALLOWED, True), ("of a set", ALLOWED_2, True), ("stranger", STRANGER, False))
    for who, source, named in parties:
        denied = shut if narrowed and not named else OPEN
        table |= {
            f"{who}, ssh": (dial(source, family, NODE, 22), denied),
            f"{who}, a range": (dial(source, family, NODE, 2201), denied),
            f"{who}, udp": (dial(source, family, NODE, 53, "udp"), denied),
            f"{who}, what leads to a pod": (dial(source, family, NODE, 2202), denied),
            f"{who}, another port": (dial(source, family, NODE, 23), shut),
            f"{who}, another udp port": (dial(source, family, NODE, 54, "udp"), shut),
            f"{who}, another that leads to a pod": (dial(source, family, NODE, 2203), shut),
        }
    expect(guarded.node, table)


def test_it_opens_nothing_that_others_refuse(guarded: Guarded, family: str) -> None:
    """RETURN, never ACCEPT; and it says nothing about what is routed."""
    text = EVERYTHING.format(admins=both(ALLOWED_2), sources='["any"]', action="drop", zone="drop")
    guarded.enforce(text + '[[forward]]\nname = "all"\nin = "eth0"\nout = "eth1"\naction = "drop"\n')
    node = guarded.node
    ssh = dial(STRANGER, family, NODE, 22)
    expect(node, {"ssh": (ssh, OPEN), "routed": (dial(STRANGER, family, BEYOND, 22), TIMEOUT)})
    for table, chain in (("mangle", "PREROUTING"), ("mangle", "INPUT"), ("filter", "INPUT")):
        rule = f"{chain} -p tcp --dport 22 -j DROP"
        iptables(node, family, f"-t {table} -A {rule}")
        try:
            expect(node, {f"dropped in {table} {chain}": (ssh, TIMEOUT)})
        finally:
            iptables(node, family, f"-t {table} -D {rule}")


def test_what_a_port_or_a_zone_allows_is_not_accepted_but_goes_on(guarded: Guarded, family: str) -> None:
    guarded.enforce(
        f'[[port]]\nname = "open"\nports = [2201, 2203]\nallow = {both(ALLOWED)}\n'
        '[zone.all]\ninterfaces = ["eth0"]\nports = ["2201/tcp", "2203/tcp"]\ntarget = "drop"\n'
    )
    node = guarded.node
    ways = {"listener": dial(ALLOWED, family, NODE, 2201), "to a pod": dial(ALLOWED, family, NODE, 2203)}
    expect(node, {name: (probe, OPEN) for name, probe in ways.items()})
    for chain, shut in (("PREROUTING", set(ways)), ("INPUT", {"listener"}), ("FORWARD", {"to a pod"})):
        rule = f"{chain} -s {ALLOWED.of(family)} -j DROP"
        iptables(node, family, f"-t mangle -A {rule}")
        try:
            expect(node, {n: (probe, TIMEOUT if n in shut else OPEN) for n, probe in ways.items()})
        finally:
            iptables(node, family, f"-t mangle -D {rule}")
