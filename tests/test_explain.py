"""`nodewallctl explain` on real nodes: what it tells, how it looks, what it leaves alone."""

import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from captured import CAPTURES
from rulesets import ours, restore_input, services
from stacks import build

from lab.layout import FAMILIES
from lab.node import TOOLS, Node
from nodewalld.commands import ctl
from nodewalld.core.words import Family

pytestmark = pytest.mark.kernel

DOCS = Path(__file__).resolve().parent.parent / "docs/explain.md"
CONFIG = '[[port]]\nname = "vault"\nports = [31002]\nallow = ["10.90.0.0/24", "fd90::/64"]\n'


@pytest.fixture(scope="module", params=["nft", "legacy"])
def node(laboratory: None, request: pytest.FixtureRequest) -> Iterator[Node]:
    """kube-proxy's node, on which somebody has followed the first advice that is found: DROP in INPUT."""
    with Node(request.param, uplink="ens18") as made:
        made.load(CAPTURES / "kp126-{backend}-3svc")
        for family in FAMILIES:
            made.run(f"{TOOLS[family]} -I INPUT -p tcp --dport 31002 -j DROP")
        yield made


def explain(node: Node, words: str, *, status: int, check: bool = True) -> str:
    """What it prints; the words are a shell's."""
    argv = [node.python(), "-m", "nodewalld.commands.ctl", "explain", *shlex.split(words)]
    done = node.run(argv, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if not check or not done.stderr else done.stdout + done.stderr


def unwrapped(text: str) -> str:
    return " ".join(text.split())


STORY = {
    "ipv4": ('203.0.113.9 "->" :31002', "10.42.0.2:8080"),
    "ipv6": ('2001:db8:c::9 "->" "[fd90::1]:31002"', "[fd42::2]:8080"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_tells_why_a_drop_in_input_does_not_shut_a_nodeport(node: Node, family: str) -> None:
    where, pod = STORY[family]
    told = unwrapped(explain(node, f"tcp {where} --in ens18", status=0))
    assert (
        "A DROP in filter INPUT (INPUT 1: -p tcp -m tcp --dport 31002 -j DROP) can't see this packet: KUBE-SEP-" in told
    )
    assert f" has rewritten it to {pod} in nat PREROUTING (or KUBE-SEP-" in told
    assert "It gets through, in one of these ways: forwarded to" in told


def test_from_the_node_itself_the_way_is_over_output(node: Node) -> None:
    """Seed 000's own test was `curl localhost:31002`, and its trace is this way."""
    told = explain(node, 'tcp --from-node "->" 10.90.0.1:31002', status=0)
    nat = told[told.index("nat OUTPUT") :]
    chains = ["KUBE-SERVICES ", "KUBE-NODEPORTS ", "KUBE-EXT-", "KUBE-MARK-MASQ 1", "KUBE-SVC-", "KUBE-SEP-"]
    assert [nat.index(f"\n  {chain}") for chain in chains] == sorted(nat.index(f"\n  {chain}") for chain in chains)
    assert "mark 0x0 -> 0x4000" in told
    assert "to 10.90.0.1:31002 -> 10.42.0.2:8080" in told


def test_ours_are_named_by_their_entry_and_stop_it(node: Node) -> None:
    for family in Family:
        text = restore_input(ours(CONFIG, node.directory / "etc")[family])
        node.run([f"{TOOLS[family]}-{node.backend}-restore", "-w", "--noflush"], stdin=text)
    try:
        for where, _ in STORY.values():
            told = unwrapped(explain(node, f"tcp {where} --in ens18", status=3))
            assert "It is stopped: dropped by port/vault, NODEWALL-" in told
            assert f" in mangle PREROUTING ({node.backend}): -j DROP" in told
            assert "can't see" not in told
        explain(node, 'tcp 10.90.0.7 "->" :31002 --in ens18', status=0)
    finally:
        node.load(CAPTURES / "kp126-{backend}-3svc")
        for family in FAMILIES:
            node.run(f"{TOOLS[family]} -I INPUT -p tcp --dport 31002 -j DROP")


def test_it_fits_80_columns_and_is_plain_when_piped(node: Node) -> None:
    for words in (
        'tcp 203.0.113.9 "->" :31002',
        'tcp 2001:db8:c::9 "->" "[fd90::1]:30001"',
        'icmp 203.0.113.9 "->" 10.90.0.1',
    ):
        lines = explain(node, words, status=0).splitlines()
        assert max(map(len, lines)) <= 80
        assert not any("\x1b" in line for line in lines)


def test_as_json_it_tells_the_same_to_programs(node: Node) -> None:
    told = json.loads(explain(node, 'tcp 203.0.113.9 "->" :31002 --in ens18 --json', status=0))
    assert told["verdict"] == "passes"
    assert told["outcomes"] == ["forwarded"]
    assert len(told["notes"]) == 1
    assert len(told["ways"]) == 2
    hooks = [(step["hook"], step["table"]) for step in told["ways"][0]["steps"]]
    assert [hook for hook in hooks if hook[1] in {"nat", None}] == [
        ("PREROUTING", "nat"),
        ("routing", None),
        ("POSTROUTING", "nat"),
    ]
    supposed = [one["holds"] for way in told["ways"] for one in way["supposed"]]
    assert supposed == [True, False]
    dropped = json.loads(explain(node, 'tcp 203.0.113.9 "->" 10.43.0.9:80 --in cni0 --mark 0x1 --json', status=0))
    assert dropped["packet"].endswith("mark 0x1")


def test_a_set_forks_until_it_can_be_read(node: Node) -> None:
    node.run("ipset create friends hash:net; ipset add friends 203.0.113.0/24")
    node.run("iptables -I INPUT 1 -m set --match-set friends src -m limit --limit 1/sec -j DROP")
    try:
        told = unwrapped(explain(node, 'tcp 203.0.113.9 "->" :22', status=3))
        assert "way 1 of 2, if INPUT 1: -m limit --limit 1/sec" in told
        assert "It can't be told, in one of these ways: dropped by INPUT 1 in filter INPUT" in told
        assert "delivered to 10.90.0.1:22 on this node" in told
        explain(node, 'tcp 198.51.100.2 "->" 10.90.0.1:22', status=0)
    finally:
        node.run("iptables -D INPUT 1")


def test_kube_proxy_in_nftables_mode_is_walked_too(laboratory: None) -> None:
    with build("nftables", "nft") as other:
        other.run("iptables -I INPUT -p tcp --dport 31002 -j DROP")
        told = unwrapped(explain(other, 'tcp 203.0.113.9 "->" 10.90.0.1:31002', status=0))
    assert "A DROP in filter INPUT (INPUT 1: -p tcp -m tcp --dport 31002 -j DROP) can't see this packet: " in told
    assert "has rewritten it to 10.42.0.2:8080 in nft table ip kube-proxy, chain nat-prerouting (or " in told


def test_a_rule_of_another_base_chain_that_is_not_understood_forks(node: Node) -> None:
    hook = "type filter hook input priority 10; policy accept"
    node.run(
        ["nft", "-f", "-"],
        stdin=f"table inet other {{ chain guard {{ {hook}\ntcp option maxseg size 1-500 drop\n}}\n}}\n",
    )
    try:
        told = unwrapped(explain(node, 'tcp 203.0.113.9 "->" :22', status=3))
        assert "way 1 of 2, if guard 1: tcp option" in told
        assert "dropped by guard 1 in nft table inet other, chain guard: tcp option" in told
    finally:
        node.run("nft delete table inet other")


def test_nothing_is_changed_and_no_table_is_made(laboratory: None) -> None:
    with Node("nft") as bare:
        explain(bare, 'tcp 203.0.113.9 "->" :22 --in eth0', status=0)
        assert bare.run("nft list ruleset").stdout == ""
        assert bare.run("cat /proc/net/ip_tables_names /proc/net/ip6_tables_names", check=False).stdout == ""


@pytest.mark.parametrize("example", ctl.COMMANDS["explain"].examples)
def test_each_example_of_the_help_runs(node: Node, example: str) -> None:
    _, command, *words = shlex.split(example)
    assert command == "explain"
    done = node.run([node.python(), "-m", "nodewalld.commands.ctl", command, *words], check=False)
    assert done.returncode in {0, 3}, done.stderr
    assert done.stdout
    assert not done.stderr


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ('tcp 203.0.113.9 "->" 10.90.0.1', 2, "tcp needs a port"),
        ('tcp "->" :80', 2, "SOURCE is missing"),
        ('tcp 203.0.113.9 "->" "[fd90::1]:80"', 2, "different families"),
        ('icmp 203.0.113.9 "->" :80', 2, "icmp has no ports"),
        ('tcp --from-node --in ens18 "->" :80', 2, "comes by no interface"),
        ('tcp 203.0.113.9 --out ens18 "->" :80', 2, "--out is for packets of this node"),
        ('tcp 203.0.113.9 "->" 10.90.0.1:99999', 2, "is no address and port"),
        ("tcp 203.0.113.9 -", 2, 'the shell has taken the arrow: write "->", in quotes'),
        ("tcp 203.0.113.9 10.90.0.1:80", 2, "with the arrow in quotes"),
        ("tcp 203.0.113.9", 2, "with the arrow in quotes"),
        ('tcp 203.0.113.9 "->" :80 --in nowhere', 1, "no interface nowhere (it has"),
        ('tcp 10.90.0.1 "->" :80', 2, "this node's own (--from-node"),
    ],
)
def test_what_can_not_be_meant_is_a_sentence_with_a_cure(node: Node, words: str, status: int, said: str) -> None:
    assert said in unwrapped(explain(node, words, status=status))


def test_the_page_shows_what_is_printed(node: Node) -> None:
    """docs/explain.md shows the story as this node tells it on nft; a run writes it anew with NODEWALLD_WRITE."""
    if node.backend != "nft":
        return
    told = explain(node, 'tcp 203.0.113.9 "->" :31002 --in ens18', status=0)
    text = DOCS.read_text()
    before, _, rest = text.partition("```console\n# nodewallctl explain")
    command, _, rest = rest.partition("\n")
    _, _, after = rest.partition("```")
    wanted = f"{before}```console\n# nodewallctl explain{command}\n{told}```{after}"
    if os.environ.get("NODEWALLD_WRITE"):
        DOCS.write_text(wanted)
    assert text == wanted


def test_500_services_take_less_than_a_second_of_cpu(laboratory: None) -> None:
    """All of it: Python's start, iptables-save of both families' backends, ip, nft."""
    with Node("nft", uplink="ens18") as large:
        large.run(["iptables-nft-restore"], stdin=services(500, Family.IPV4))
        script = (
            "import resource, sys; from nodewalld.commands import ctl; status = ctl.main(sys.argv[1:]);"
            "used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)];"
            "print(status, sum(each.ru_utime + each.ru_stime for each in used), file=sys.stderr)"
        )
        argv = ["explain", "tcp", "203.0.113.9", "->", ":30499", "--in", "ens18"]
        took = []
        for _ in range(3):
            status, seconds = large.run([large.python(), "-c", script, *argv]).stderr.split()
            assert status == "0"
            took.append(float(seconds))
        assert min(took) < 1.0, took
