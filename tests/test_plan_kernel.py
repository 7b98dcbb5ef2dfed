"""The fake table and the real tools agree: one plan leaves the same rules in both, on either backend and family."""

import random

import pytest
from fake_table import FakeTable
from test_plan import ANCHORS, FOREIGN, desired, planned

from lab.node import Node
from nodewalld.core.config import Place, Position
from nodewalld.core.desired import DesiredTable
from nodewalld.core.observed import Learned, Observed
from nodewalld.core.plan import plan
from nodewalld.core.ruletext import split
from nodewalld.core.words import Backend, Family, Table
from nodewalld.kernel.firewall import parse_chains, tool

pytestmark = pytest.mark.kernel

WORLDS = 25
FOREIGN_CHAINS = ("cali-FORWARD", "KUBE-FORWARD", "DOCKER-USER", "DOCKER-ISOLATION-STAGE-1", "KUBE-ROUTER-FORWARD")


def random_world(dice: random.Random) -> tuple[DesiredTable, FakeTable]:
    """As the property tests make them, but from a seeded die."""
    positions = [Position(Place.FIRST), Position(), Position(Place.LAST)]
    positions += [
        Position(Place.BETWEEN, tuple(dice.sample(ANCHORS, 1)), tuple(dice.sample(ANCHORS, dice.randint(0, 2))))
        for _ in range(2)
    ]
    wanted = desired(*dict.fromkeys(dice.sample(positions, dice.randint(1, 4))))
    stale = '-m comment --comment "nodewalld:at/stale" -j ACCEPT'
    remains = [place.text for place in wanted.placements]
    rules = dice.choices([*FOREIGN, *remains, stale], k=dice.randint(0, 12))
    chains: dict[str, list[str]] = {"FORWARD": rules, **{name: [] for name in FOREIGN_CHAINS}}
    for chain in wanted.chains:
        lines = [line.text for line in chain.lines]
        chains[chain.name] = dice.choice([lines, lines[:1], [], [*lines, "-j ACCEPT"]])
    if dice.random() < 0.5:
        chains["NODEWALL-stale"] = ["-j DROP"]
    return wanted, FakeTable(Table.FILTER, chains)


def load(node: Node, restore: str, table: FakeTable) -> None:
    lines = [f":{name} - [0:0]" for name in table.chains if name not in table.table.builtin_chains]
    lines += [f"-A {name} {text}" for name, rules in table.chains.items() for text in rules]
    node.run([restore], stdin="\n".join((f"*{table.table}", *lines, "COMMIT", "")))


def words(chains: dict[str, list[str]]) -> dict[str, list[list[str]]]:
    """Rules as words, without `-m tcp`, which the tools add."""
    return {
        name: [[w for w in split(text) if w not in {"-m", "tcp", "comment"}] for text in rules]
        for name, rules in sorted(chains.items())
    }


@pytest.mark.parametrize("family", list(Family))
def test_a_plan_leaves_the_same_in_the_fake_and_in_the_kernel(node: Node, family: Family) -> None:
    dice = random.Random(f"{node.backend} {family}")
    backend = Backend(node.backend)
    restore, save = tool(family, backend, "restore"), tool(family, backend, "save")
    for number in range(WORLDS):
        wanted, table = random_world(dice)
        if family is Family.IPV6:
            table.chains = {n: [r.replace("10.42.0.0/16", "fd42::/64") for r in rs] for n, rs in table.chains.items()}
        load(node, restore, table)
        read = parse_chains(node.run([save, "-t", "filter"]).stdout)
        script = plan(family, Table.FILTER, wanted, Observed(read), Learned(), ("cali-*", "KUBE-ROUTER-*")).script
        node.run([restore, "--noflush"], stdin=script)
        table.commit(planned(wanted, table).script)
        after = {n: [r.text for r in rs] for n, rs in parse_chains(node.run([save, "-t", "filter"]).stdout).items()}
        assert words(after) == words(table.chains), f"world {number}: {script}"
