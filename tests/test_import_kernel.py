"""Rules by hand, imported and enforced on a node without them, stand again where they stood; on real kernels."""

import ipaddress
import json
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import pytest

from lab.daemon import Daemon
from lab.layout import FAMILIES
from lab.node import Node
from nodewalld.configuration.load import recall
from nodewalld.core.config import Sources
from nodewalld.core.ruletext import Rule, join
from nodewalld.core.words import Family, Table
from nodewalld.importing.account import Account, account
from nodewalld.importing.dump import Dump, read_dump
from nodewalld.importing.writing import render
from nodewalld.kernel.firewall import parse_chains

pytestmark = pytest.mark.kernel

SHARED = {"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING", "DOCKER-USER"}


def with_rules_at_every_slot(text: str, family: Family) -> str:
    """The dump with one hand-made rule above, between and below all rules of the chains that are shared."""
    host = ipaddress.ip_address("192.0.2.1" if family is Family.IPV4 else "2001:db8::1")
    numbers = count()
    lines: list[str] = []
    chains: set[str] = set()

    def own(chain: str) -> str:
        verdict = "ACCEPT" if "*nat" in lines[max(i for i, x in enumerate(lines) if x[0] == "*") :] else "DROP"
        return f"-A {chain} -s {host + next(numbers)}/{host.max_prefixlen} -j {verdict}"

    for line in text.splitlines():
        chain = line.split(" ")[1] if line.startswith("-A ") else ""
        if line == "COMMIT":
            lines += [own(name) for name in sorted(chains)]
            chains = set()
        if chain in SHARED:
            chains.add(chain)
            lines.append(own(chain))
        if line and not line.startswith("#"):
            lines.append(line)
    return "\n".join(lines) + "\n"


def without(text: str, found: Account) -> str:
    """The dump without the lines that were carried over."""
    carried = {line.number for line in found.carried}
    return "\n".join(line for number, line in enumerate(text.splitlines(), 1) if number not in carried) + "\n"


def orders(saved: str) -> Iterator[tuple[Table, str, list[str]]]:
    """Each chain of others, with what stands in ours in place of the jumps there, and without our tags."""
    for part in f"\n{saved}".split("\n*")[1:]:
        chains = parse_chains(part)
        for name, rules in chains.items():
            if not name.startswith("NODEWALL-"):
                yield Table(part.split()[0]), name, list(_flat(rules, chains))


def _flat(rules: Sequence[Rule], chains: dict[str, tuple[Rule, ...]]) -> Iterator[str]:
    for rule in rules:
        if rule.target.startswith("NODEWALL-"):
            yield from _flat(chains[rule.target], chains)
        else:
            yield join(rule.bare)


def expected(dump: Dump, told: set[str]) -> Iterator[tuple[Table, str, list[str]]]:
    for table, chains in dump.chains.items():
        for name, lines in chains.items():
            texts = [join(line.rule.bare) for line in lines if line.rule]
            yield table, name, [text for text in texts if text not in told]


@pytest.mark.parametrize(
    "capture", ["kp126+felix3264-insert-{}-3svc", "felix3264-insert-hep-{}", "docker-20.10-{}-foreign-before-restart"]
)
@pytest.mark.parametrize("everywhere", [True, False], ids=["a rule at every slot", "as captured"])
def test_the_dumps_order_is_there_again(node: Node, captures: Path, capture: str, everywhere: bool) -> None:
    toml, compared = f'[daemon]\nbackend = "{node.backend}"\n', []
    for family in FAMILIES:
        for path in captures.glob(f"{capture.format(node.backend)}.v{family[-1]}.*"):
            text = "\n".join(line for line in path.read_text().splitlines() if "NODEWALL" not in line) + "\n"
            text = with_rules_at_every_slot(text, Family(family)) if everywhere else text
            dump = read_dump(text.encode(), path.name, Family(family))
            found = account([dump])
            bare = node.directory / f"bare.v{family[-1]}.save"
            bare.write_text(without(text, found))
            node.load(bare)
            toml += render(found, path.name)
            noted = [line for entry in found.entries if entry.note for line in entry.lines]
            told = {join(line.rule.bare) for line in noted if line.rule}
            assert all("insists on the top" in entry.note for entry in found.entries if entry.note)
            compared.append((family, dump, told))
    daemon = Daemon(node, toml, args=["--once"])
    assert daemon.wait() == 0, daemon.log_text()
    for family, dump, told in compared:
        there = {(t, c): [x for x in texts if x not in told] for t, c, texts in orders(node.rules(family))}
        for table, chain, texts in expected(dump, told):
            assert there[table, chain] == texts, (family, table, chain)


def test_iptables_takes_all_that_was_imported(node: Node, captures: Path) -> None:
    daemon, tried = Daemon(node, "", start=False), 0
    for path in sorted([*captures.glob("*.rules"), *captures.parents[2].glob("shared/captures/threads/*.rules")]):
        text = path.read_bytes()
        found = account([read_dump(text, path.name)]) if b"\n*" in text else None
        if found and found.entries:
            daemon.configure(f'[daemon]\nbackend = "{node.backend}"\n{render(found, path.name)}')
            value = json.loads(daemon.ctl("check", "--json").stdout)
            assert (value["errors"], value["tried"]) == ([], True), path.name
            tried += 1
    assert tried >= 6


def test_what_is_live_is_read_in_both_families_with_its_sets(node: Node, captures: Path) -> None:
    node.load(captures / "kp126-{backend}-3svc")
    node.run(["ipset", "restore"], stdin="create office hash:ip\nadd office 192.0.2.7\ncreate nets hash:net\n")
    node.run(["ipset", "restore"], stdin="add nets 198.51.100.0/24\n")
    for tool in ("iptables", "ip6tables"):
        node.run([tool, "-A", "INPUT", "-p", "tcp", "--dport", "23", "-j", "DROP"])
    for name in ("office", "nets"):
        node.run(f"iptables -I FORWARD 2 -m set --match-set {name} src -j DROP")
    before = node.snapshot()
    daemon = Daemon(node, "", start=False)
    result = daemon.ctl("import")
    assert result.returncode == 0, result.stderr
    assert node.snapshot() == before
    config = recall(Sources("/etc", {"/etc/nodewalld.toml": result.stdout}))
    assert [(rule.chain, len(rule.families)) for rule in config.rules] == [("INPUT", 2), ("FORWARD", 1), ("FORWARD", 1)]
    assert {entry.name: [str(n) for n in entry.networks] for entry in config.sets} == {
        "office_nw": ["192.0.2.7/32"],
        "nets": ["198.51.100.0/24"],
    }
    assert "set office: its content goes to the new set office_nw" in result.stderr
    daemon.configure(result.stdout)
    assert "3 rules, 2 sets" in daemon.ctl("check").stdout
    daemon.args = ["--once"]
    daemon.start()
    assert daemon.wait() == 0, daemon.log_text()
