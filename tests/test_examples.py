"""Every shipped example does to real packets what docs/examples.md says, and what the seeds' readers type by hand.

Each example is put in force as it is shipped, on the node that it is made for. "By hand" is typed from the page too.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packets import REFUSED, TIMEOUT, Guarded, dial, verdicts
from pages import EXAMPLES, NODEWALLD, PAGE, PLACES, ROOT, SOURCES, Row, compared, section, sections
from stacks import CONTAINER, build

from lab.layout import FAMILIES, NODE, STRANGER
from lab.node import BackendName, Node
from lab.traffic import Connection, Verdict

pytestmark = pytest.mark.kernel

STACKS = {
    "block-nodeport": "kubeadm",
    "limit-nodeport": "kubeadm",
    "protect-pods": "seed 002",
    "zones": "seed 003",
    "any-rule": "kubeadm",
    "kubeadm-calico": "calico",
    "k3s-rke2": "k3s",
    "docker-host": "docker",
    "docker-ufw": "ufw",
    "kube-proxy-ipvs": "ipvs",
    "kube-proxy-nftables": "nftables",
}
SEEDS = ["block-nodeport", "limit-nodeport", "protect-pods", "zones", "any-rule"]
"""The examples whose recipe is typed by hand as well: seeds 000 to 004."""
CLOSED, OPENED = "Closed here:", "Open here:"
"""How a note begins: what nodewalld closes and the hand does not, and the other way round."""


@pytest.fixture(params=STACKS)
def example(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def node(laboratory: None, backend: BackendName, example: str) -> Iterator[Node]:
    with build(STACKS[example], backend) as made:
        yield made


def text_of(example: str) -> str:
    return (EXAMPLES / f"{example}.toml").read_text()


def ended(node: Node, rows: list[Row]) -> list[tuple[Verdict, Verdict]]:
    """How each attempt ends, in IPv4 and in IPv6; all are made at once."""
    probes = {f"{number} {family}": row.probe(family) for number, row in enumerate(rows) for family in FAMILIES}
    seen = verdicts(node, probes)
    return [(seen[f"{number} ipv4"], seen[f"{number} ipv6"]) for number in range(len(rows))]


def test_no_example_is_untested() -> None:
    shipped = {path.stem for path in EXAMPLES.iterdir()}
    assert shipped == set(STACKS)
    assert shipped == set(sections())
    assert all(path.suffix == ".toml" for path in EXAMPLES.iterdir())


def test_packets_end_as_the_page_says(node: Node, example: str) -> None:
    page = section(example)
    wrong = []
    for state in page.states[:-1]:
        if state in page.typed:
            node.run("set -e\n" + page.typed[state])
        wrong.append(compared(page.rows, state, ended(node, page.rows)))
    assert not any(wrong), "\n".join(filter(None, wrong))


def test_packets_end_as_the_page_says_under_nodewalld(node: Node, example: str) -> None:
    page = section(example)
    assert page.states[-1] == NODEWALLD
    guarded = Guarded(node)
    guarded.enforce(text_of(example))
    guarded.nothing_to_do()
    wrong = compared(page.rows, NODEWALLD, ended(node, page.rows))
    assert not wrong, wrong


@pytest.mark.parametrize("example", STACKS)
def test_the_page_says_where_nodewalld_differs_from_the_hand(example: str) -> None:
    """At least as closed, and open where it is open, but for what a note explains; each note says in which way."""
    page = section(example)
    assert ("by hand" in page.states) == (example in SEEDS)
    assert set(page.typed) == set(page.states[1:-1])
    assert {row.note for row in page.rows} - {""} == set(page.notes)
    for row in page.rows:
        if example not in SEEDS:
            continue
        opened = [[end == Verdict.OPEN for end in row.ends[state]] for state in ("by hand", NODEWALLD)]
        pairs = set(zip(*opened, strict=True)) - {(True, True), (False, False)}
        told = page.notes.get(row.note, "")
        needed = {CLOSED: {(True, False)}, OPENED: {(False, True)}}.get(told[: told.find(":") + 1], set())
        assert pairs == needed, f"{row.source} -> {row.to}: {row.ends}, note {row.note or 'missing'}: {told}"


@pytest.mark.parametrize("example", STACKS)
def test_an_example_changes_something_and_says_what_it_is_for(example: str) -> None:
    page = section(example)
    first = page.states[0]
    assert any(row.ends[first] != row.ends[NODEWALLD] for row in page.rows)
    assert any(row.ends[first] == row.ends[NODEWALLD] == ("open", "open") for row in page.rows)
    assert {row.to.split("/")[1][:3] for row in page.rows} == {"tcp", "udp"}
    lines = text_of(example).splitlines()
    head = "\n".join(lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))])
    for word in ("# For whom: ", "# It does:  ", "# Edit:     "):
        assert word in head


@pytest.mark.parametrize("example", STACKS)
def test_an_example_is_good(example: str, tmp_path: Path) -> None:
    (tmp_path / "nodewalld.toml").write_text(text_of(example))
    command = [sys.executable, "-m", "nodewalld.commands.ctl", "check", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_links_each_example_and_names_everybody_with_the_addresses_that_are_used() -> None:
    text = PAGE.read_text()
    for example in STACKS:
        assert f"../etc/examples/{example}.toml" in text
    told = dict(re.findall(r"^\| ([A-Za-z ]+) \| ([0-9a-f.:, ]+) \|", text, re.MULTILINE))
    used = {**SOURCES, **PLACES, "container": CONTAINER}
    for who in set(used) - {"loopback", "mapped server"}:
        assert set(used[who]) <= set(told.pop(who).split(", ")), who
    assert not told


@pytest.mark.parametrize("way", ["by hand", NODEWALLD])
def test_a_connection_that_is_open_ends_only_under_nodewalld(laboratory: None, backend: BackendName, way: str) -> None:
    """Seed 001's rule is in nat, which sees only the first packet of a flow."""
    page = section("limit-nodeport")
    with build("kubeadm", backend) as node:
        flow = Connection(node, "client", to=(NODE.ipv4, 30001), source=STRANGER.ipv4)
        assert flow.alive()
        if way == "by hand":
            node.run(page.typed[way])
            assert flow.alive()
        else:
            Guarded(node).enforce(text_of("limit-nodeport"))
            assert not flow.alive(timeout=0.5)


@pytest.mark.parametrize("first", ["kube-proxy", NODEWALLD])
def test_a_redirect_closes_the_port_whoever_was_first(laboratory: None, backend: BackendName, first: str) -> None:
    """kube-proxy's nftables mode has nat's own priority, where the order is that of coming."""
    with build("nftables", backend) as node:
        Guarded(node).enforce('[[port]]\nname = "web"\nports = [31002]\naction = "redirect"\n')
        if first == NODEWALLD:
            table = node.run("nft list table ip kube-proxy && nft list table ip6 kube-proxy").stdout
            node.run(["nft", "-f", "-"], stdin=f"delete table ip kube-proxy\ndelete table ip6 kube-proxy\n{table}")
        probes = {family: dial(STRANGER, family, NODE, 31002) for family in FAMILIES}
        assert set(verdicts(node, probes).values()) == {REFUSED if first == "kube-proxy" else TIMEOUT}


def test_every_rule_of_any_rule_sees_packets(laboratory: None, backend: BackendName) -> None:
    page = section("any-rule")
    with build("kubeadm", backend) as node:
        guarded = Guarded(node)
        guarded.enforce(text_of("any-rule"))
        ended(node, page.rows)
        counted = [guarded.counted(family) for family in FAMILIES]
        seen = {name for each in counted for name, packets in each.items() if packets and name.startswith("rule/")}
        assert len(seen) == text_of("any-rule").count("\n[[rule]]\n"), seen
