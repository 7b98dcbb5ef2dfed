"""What `judge` foretells is what the kernel does: random rulesets inside real captures, random packets really sent.

Always the same ones; NODEWALLD_WALKS asks for more of them.
"""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from captured import CAPTURES
from rulesets import Noise, configuration, nft_table, ours, packets, restore_input, sets

from lab.layout import FAMILIES
from lab.node import TOOLS, BackendName, Node
from lab.saved import TABLES
from lab.waiting import wait_for
from nodewalld.core.words import Family

pytestmark = pytest.mark.kernel

WALKS = int(os.environ.get("NODEWALLD_WALKS", "12"))
PACKETS = 45
STEMS = (
    "kp126-{backend}-3svc",
    "kp126+felix3264-insert-{backend}-3svc",
    "felix3264-insert-hep-{backend}",
    "docker-20.10-{backend}-ip6tables-container-published",
    "firewalld-1.3.3-fbiptables-{backend}-after-start",
    "ufw-0.36.2-{backend}-after-allow",
    "cni-portmap-1.1.1-{backend}-hostport",
)
LINKS = {"client": "ens18", "pod1": "vethpod1", "pod2": "vethpod2", "beyond": "eth1", "web": "docker0"}
OTHER: dict[BackendName, BackendName] = {"nft": "legacy", "legacy": "nft"}


@pytest.fixture(scope="module", params=["nft", "legacy"])
def node(laboratory: None, request: pytest.FixtureRequest) -> Iterator[Node]:
    with Node(request.param, uplink="ens18") as made:
        made.attach(
            "web",
            "docker0",
            node=["172.17.0.1/16", "fd00:d0c::1/64"],
            host=["172.17.0.2/16", "fd00:d0c::242:ac11:2/64"],
        )
        acquaint(made)
        yield made


def acquaint(node: Node) -> None:
    """Let the node know its neighbours' hardware addresses for good: no packet waits for an answer, or is lost."""
    lines = []
    for ns, device in (("client", "ens18"), ("pod1", "cni0"), ("pod2", "cni0"), ("beyond", "eth1"), ("web", "docker0")):
        told = json.loads(node.run(["ip", "-j", "address", "show", "dev", "eth0"], ns=ns).stdout)[0]
        lines += [
            f"neigh replace {address['local']} lladdr {told['address']} dev {device} nud permanent"
            for address in told["addr_info"]
        ]
    node.run(["ip", "-batch", "-"], stdin="\n".join(lines) + "\n")


def clear(node: Node) -> None:
    """No rules and no sets, in either backend."""
    node.run(["nft", "flush", "ruleset"])
    for family in FAMILIES:
        names = node.run(
            f"cat /proc/net/{'ip' if family == 'ipv4' else 'ip6'}_tables_names", check=False
        ).stdout.split()
        for table in (name for name in TABLES if name in names):
            node.run([f"{TOOLS[family]}-legacy-restore", "-w"], stdin=f"*{table}\nCOMMIT\n")
            for chain in ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"):
                node.run([f"{TOOLS[family]}-legacy", "-w", "-t", table, "-P", chain, "ACCEPT"], check=False)
    wait_for(lambda: not node.run("ipset flush; ipset destroy", check=False).returncode, what="sets that no rule holds")


def prepare(node: Node, rng: random.Random) -> str:
    """One random ruleset in force; returns what it is made of."""
    clear(node)
    stem = rng.choice(STEMS)
    node.load(CAPTURES / stem)
    text = configuration(rng)
    desired = ours(text, node.directory / "etc")
    backend = rng.choice([node.backend, node.backend, OTHER[node.backend]])
    noisy = rng.choice([node.backend, node.backend, OTHER[node.backend]])
    for family in Family:
        node.run(["ipset", "restore"], stdin=sets(family, desired[family]))
        _restore(node, family, backend, restore_input(desired[family]))
        if rng.random() < 0.7:
            _restore(node, family, noisy, Noise(rng, family).text())
    if rng.random() < 0.5:
        table = nft_table(rng)
        node.run(["nft", "-f", "-"], stdin=table)
        text += f"\n{table}"
    node.sysctl("net.ipv4.conf.all.rp_filter", str(rng.choice([0, 0, 1, 2])))
    node.sysctl("net.ipv4.conf.all.route_localnet", str(rng.choice([0, 0, 1])))
    return f"{stem}\n{text}"


def _restore(node: Node, family: Family, backend: BackendName, text: str) -> None:
    done = node.run([f"{TOOLS[family]}-{backend}-restore", "-w", "--noflush"], stdin=text, check=False)
    assert not done.returncode, f"{done.stderr}\n{text}"


def walked(node: Node, wanted: dict[str, list[dict[str, object]]]) -> dict[str, Any]:
    """Walk these packets, send them, and tell what came of it."""
    script = [node.python(), str(Path(__file__).with_name("walked.py"))]
    done = node.run(script, stdin=json.dumps(wanted), env={"WALKED_LINKS": json.dumps(LINKS)})
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_is_foretold_is_what_happens(node: Node) -> None:
    totals = {"packets": 0, "decided": 0, "passed": 0}
    for seed in range(WALKS):
        rng = random.Random(f"{node.backend} {seed}")
        made_of = prepare(node, rng)
        first = 1 + seed * 2 * PACKETS
        wanted = {
            family.value: packets(rng, family, PACKETS, first + PACKETS * (family is Family.IPV6)) for family in Family
        }
        told = walked(node, wanted)
        for key in totals:
            totals[key] += told[key]
        if told["wrong"]:
            pytest.fail(f"seed {seed}: {json.dumps(told['wrong'][:3], indent=1)}\n{made_of}", pytrace=False)
    print(totals)
    assert totals["packets"] == WALKS * 2 * PACKETS
    assert totals["decided"] > totals["packets"] * 0.8
    assert totals["packets"] * 0.1 < totals["passed"] < totals["packets"] * 0.9
