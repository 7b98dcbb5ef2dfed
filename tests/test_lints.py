"""Every warning of `check`: said where docs/lints.md says so, cured by its cure, and silent at a near miss."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodewalld.commands import ctl
from nodewalld.configuration.load import load
from nodewalld.core import lints
from nodewalld.core.bypasses import BaseChain, Paths, Program
from nodewalld.core.config import Config, Problem
from nodewalld.core.environment import Environment
from nodewalld.core.lints.facts import NodeFacts
from nodewalld.core.lints.texts import take_apart
from nodewalld.core.lockout import Connection
from nodewalld.core.words import Family, Table
from nodewalld.kernel.firewall import parse_tables

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs" / "lints.md"
FAMILIES = {Family.IPV4: "v4", Family.IPV6: "v6"}
DUAL_STACK = Environment({Family.IPV4: ("10.90.0.1",), Family.IPV6: ("fd90::1", "fe80::1")})
SINGLE_STACK = Environment({Family.IPV4: ("10.90.0.1",), Family.IPV6: ("fe80::1",)})
SSH = Connection("203.0.113.7", "10.90.0.1", 22)
NODE = NodeFacts(DUAL_STACK, sets={"by_hand": ("hash:ip", Family.IPV4)}, connection=SSH)


EMPTY = {family: {table: {} for table in Table} for family in Family}
REFUSING = BaseChain("inet", "filter", "forward", "forward", 0, refuses=True)
CILIUM = Paths(programs=(Program("eth0", "ingress", "cil_from_netdev"),))
BESIDE = {
    "own nftables": replace(NODE, paths=Paths(base_chains=(REFUSING,))),
    "cilium": replace(NODE, rules=EMPTY, paths=CILIUM),
    "ipvs": replace(NODE, rules=EMPTY, ipvs=True),
    "two backends": replace(
        NODE, rules=EMPTY, elsewhere={family: {Table.FILTER: frozenset({"DOCKER-USER"})} for family in Family}
    ),
    "kube-proxy in nftables": replace(
        NODE, rules=EMPTY, paths=Paths(tables=frozenset({("ip", "kube-proxy"), ("ip6", "kube-proxy")}))
    ),
}
"""Nodes with something beside iptables; tests/test_lints_beside.py sees the same on the real kernel."""


def captured(name: str) -> NodeFacts:
    """A node with the rules of a capture, with those written by hand in tests/lints, or with something beside them."""
    if name in BESIDE:
        return BESIDE[name]
    rules = {}
    for family, suffix in FAMILIES.items():
        for path in (*HERE.glob(f"captures/{name}.{suffix}.*"), *HERE.glob(f"lints/{name}.{suffix}.*")):
            rules[family] = saved(path.read_text())
    assert rules, name
    return replace(NODE, rules=rules)


def saved(text: str):
    return parse_tables(re.sub(r"^\[\d+:\d+\] ", "", text, flags=re.MULTILINE))


def live(table: str, *rules: str, families: tuple[Family, ...] = tuple(Family)) -> NodeFacts:
    """A node with these rules, each after -A, in one table."""
    text = "\n".join((f"*{table}", *(f"-A {rule}" for rule in rules), "COMMIT"))
    return replace(NODE, rules={family: parse_tables(text) for family in families})


class Offline:
    """A kernel that takes every text, on a node of the test's choice."""

    def __init__(self, facts: NodeFacts) -> None:
        self._facts = facts

    def try_texts(self, config: Config) -> tuple[Problem, ...] | str:
        return ()

    def survey(self, config: Config, connection: str) -> NodeFacts:
        return self._facts


Check = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Run `check` over a text on a node: its exit status, and the codes of all that it says."""
    tmp_path.chmod(0o700)

    def run(text: str, facts: NodeFacts, *options: str) -> tuple[int, list[str]]:
        (tmp_path / "nodewalld.toml").write_text(text)
        tools = ctl.Tools(lambda: Offline(facts), lambda: load)
        status = ctl.main(["check", str(tmp_path), "--json", *options], tools=tools)
        said = json.loads(capsys.readouterr().out)
        return status, [problem["code"] for problem in said["errors"] + said["warnings"]]

    return run


def examples() -> list[tuple[str, str, str, str]]:
    """Of each section: its code, the capture that it names, an example, and the cured one."""
    found = []
    for section in DOCS.read_text().split("\n## ")[1:]:
        code = section.splitlines()[0]
        seen = re.search(r"^Seen with: `(.*)`$", section, re.MULTILINE)
        blocks = re.findall(r"```toml\n(.*?)```", section, re.DOTALL)
        assert blocks, code
        pairs = zip(blocks[::2], blocks[1::2], strict=True)
        found += [(code, seen[1] if seen else "", bad, good) for bad, good in pairs]
    return found


def test_every_code_is_documented_in_a_section_in_the_table_and_in_the_manual() -> None:
    listed = re.findall(r"^\| \[`([a-z0-9-]+)`\]", DOCS.read_text(), re.MULTILINE)
    assert listed == sorted(listed)
    assert set(listed) == {code for code, *_ in examples()} == lints.CODES
    manual = (HERE.parent / "packaging/man/nodewallctl.8.md").read_text()
    assert re.findall(r"^\*\*([a-z0-9]+(?:-[a-z0-9]+)+)\*\*$", manual, re.MULTILINE) == listed


@pytest.mark.parametrize(
    ("code", "seen", "bad", "good"), examples(), ids=[f"{e[0]}-{i}" for i, e in enumerate(examples())]
)
def test_each_documented_example_says_its_code_and_its_cure_is_silent(
    code: str, seen: str, bad: str, good: str, check: Check
) -> None:
    facts = captured(seen) if seen else NODE
    status, codes = check(bad, facts)
    assert set(codes) - (lints.NOTES - {code}) == {code}
    assert status == (1 if code in lints.ERRORS else 0)
    assert check(bad, facts, "--strict")[0] == (0 if code in lints.NOTES else 1)
    if code not in lints.ERRORS:
        assert code not in check(bad, facts, "--strict", "--ignore", code)[1]
    status, codes = check(good, facts, "--strict")
    assert (status, set(codes) - (lints.NOTES - {code})) == (0, set())


def rule(text: str, *, name: str = "r", table: str = "filter", chain: str = "INPUT", more: str = "") -> str:
    return f'[[rule]]\nname = "{name}"\ntable = "{table}"\nchain = "{chain}"\nrule = "{text}"\n{more}\n'


def port(name: str, ports: str, more: str = "") -> str:
    return f'[[port]]\nname = "{name}"\nports = [{ports}]\n{more}\n'


def forward(name: str, action: str, more: str = "") -> str:
    return f'[[forward]]\nname = "{name}"\naction = "{action}"\n{more}\n'


def zone(name: str, more: str, target: str = "drop") -> str:
    return f'[zone.{name}]\ntarget = "{target}"\n{more}\n'


FIRST, LAST, IPV4_ONLY = 'position = "first"', 'position = "last"', 'families = ["ipv4"]'
DROP_31002 = "-p tcp --dport 31002 -j DROP"
IPVS = replace(live("nat", "KUBE-NODE-PORT -p tcp -j RETURN"), ipvs=True)
FELIX = ("FORWARD -m comment --comment cali:abc -j cali-FORWARD", "FORWARD -j KUBE-FORWARD")
APPENDED = "FORWARD -m comment --comment cali:xyz -m mark --mark 0x10000/0x10000 -j ACCEPT"
NODE_PORTS = live("nat", "PREROUTING -j KUBE-NODEPORTS", "KUBE-NODEPORTS -s 192.0.2.1 -j RETURN")
BRIDGED = live(
    "nat",
    "PREROUTING -m addrtype --dst-type LOCAL -j HOSTPORTS",
    "HOSTPORTS -i br0 -j RETURN",
    "HOSTPORTS -p tcp -m tcp --dport 8080 -j DNAT --to-destination 10.0.0.1:80",
)
OWN_ADDRESS = live(
    "nat",
    "KUBE-NODEPORTS -p tcp -m tcp --dport 31002 -j KUBE-EXT-A",
    "KUBE-SERVICES -d 10.90.0.1/32 -p tcp -m tcp --dport 80 -j KUBE-EXT-A",
    families=(Family.IPV4,),
)
KUBE, DOCKER, BALANCED = "kp126-nft-3svc", "docker-20.10-nft-container-published", "loadbalancer"

SAID = [
    # input-after-dnat
    (rule("-p tcp -m multiport --dports 80,31002 -j REJECT"), KUBE, "input-after-dnat"),
    (rule(DROP_31002, table="mangle"), KUBE, "input-after-dnat"),
    (rule("-p tcp --destination-port=30000:32767 -j DROP"), KUBE, "input-after-dnat"),
    (rule("-p tcp --dport 31555 -j DROP"), KUBE, "input-after-dnat"),
    (rule(DROP_31002, more='families = ["ipv6"]'), KUBE, "input-after-dnat"),
    (rule(DROP_31002), NODE_PORTS, "input-after-dnat"),
    (rule("-i eth0 -p tcp --dport 8080 -j DROP"), BRIDGED, "input-after-dnat"),
    (rule("-p tcp --dport 8080 -j DROP"), DOCKER, "input-after-dnat"),
    (rule("-s 203.0.113.0/24 -p tcp --dport 31002 -j DROP"), KUBE, "input-after-dnat"),
    (
        rule("-p tcp --dport 8080 -j DROP"),
        live("nat", "PREROUTING -p tcp -m tcp --dport 8080 -j REDIRECT"),
        "input-after-dnat",
    ),
    # never-matches
    (
        rule("-p 6 -j ACCEPT", table="mangle", name="a")
        + rule("-s 192.0.2.1 -p tcp -j DROP", table="mangle", name="b"),
        NODE,
        "never-matches",
    ),
    (rule("-p udp -j DROP", name="a") + rule("-p udp -m udp --dport 80 -j LOG", name="b"), NODE, "never-matches"),
    (rule("-p udp -j DROP", name="a") + rule("-p udp -j DROP", name="b"), NODE, "never-matches"),
    (rule("-p udp -j DROP", name="a", more=LAST) + rule("-j ACCEPT", name="b", more=FIRST), NODE, "never-matches"),
    (forward("a", "drop", 'in = "eth+"') + forward("b", "reject", 'in = "eth0"'), NODE, "never-matches"),
    (forward("a", "accept") + forward("b", "accept", 'protocol = "tcp"\nports = [80]'), NODE, "never-matches"),
    (
        forward("a", "accept", 'source = "10.1.2.3"') + forward("b", "reject", 'source = "10.1.0.0/16"'),
        NODE,
        "never-matches",
    ),
    (
        zone("a", 'sources = ["10.0.0.0/23"]')
        + zone("b", 'sources = ["10.0.0.0/24"]')
        + zone("c", 'sources = ["10.0.1.0/24"]'),
        NODE,
        "never-matches",
    ),
    (zone("a", 'interfaces = ["eth+"]') + zone("b", 'interfaces = ["eth0"]'), NODE, "never-matches"),
    # access
    (port("a", "80", 'allow = ["10.0.0.0/8"]\ndeny = ["fd00::/8"]'), NODE, "deny-outside-allow"),
    (port("a", "80", 'allow = ["10.0.0.0/8"]') + port("b", '"79-81"'), NODE, "allow-in-vain"),
    (port("a", "80", 'allow = ["10.0.0.1"]') + zone("z", 'sources = ["10.0.0.0/8"]', "reject"), NODE, "allow-in-vain"),
    ('[daemon]\nfamilies = ["ipv4"]\n' + port("a", "80"), NODE, "ipv4-only"),
    (rule("-p tcp --dport 23 -j DROP", more=IPV4_ONLY), NODE, "ipv4-only"),
    (forward("a", "drop", 'source = "0.0.0.0/0"'), NODE, "ipv4-only"),
    (zone("a", 'sources = ["0.0.0.0/0"]\nservices = ["ssh"]'), NODE, "ipv4-only"),
    ('[failsafe]\nfrom = ["10.0.0.0/8"]\n' + port("a", "22"), NODE, "locks-you-out"),
    (port("a", "31002") + port("b", "80"), BALANCED, "other-addresses"),
    (port("a", "31002") + port("b", "80", "destination = '192.0.2.10'\nenforce = false"), BALANCED, "other-addresses"),
    # contested-position
    (rule("-p udp -j DROP", chain="FORWARD", more=FIRST), live("filter", *FELIX), "contested-position"),
    (rule("-p udp -j DROP", chain="FORWARD", more=LAST), live("filter", *FELIX, APPENDED), "contested-position"),
    (forward("a", "drop", 'position = { before = ["cali-*"] }'), live("filter", *FELIX), "contested-position"),
    (
        forward("a", "drop", 'position = { after = ["KUBE-FORWARD"], before = [{ comment = "cali:*" }] }'),
        live("filter", *FELIX),
        "contested-position",
    ),
    (forward("a", "drop", FIRST), live("filter", *FELIX), "contested-position"),
    (
        rule("-p udp -j DROP", more=FIRST),
        live("filter", "INPUT -m comment --comment nodewalld:x -j DROP", "INPUT -j KUBE-ROUTER-INPUT"),
        "contested-position",
    ),
    (
        '[[jump]]\nname = "j"\ntable = "filter"\nfrom = "FORWARD"\nto = "MINE"\nposition = "first"',
        live("filter", *FELIX),
        "contested-position",
    ),
    # failsafe-overruled
    (rule("-j DROP", table="raw", chain="PREROUTING"), NODE, "failsafe-overruled"),
    (rule("-p tcp --dport 20:25 -j REJECT", more=FIRST), NODE, "failsafe-overruled"),
    (
        rule("! -s 10.0.0.0/8 -p tcp --dport 22 -j DROP") + rule("-p tcp --dport 22 -s ::1 -j DROP", name="6"),
        NODE,
        "failsafe-overruled",
    ),
    (
        port("a", "80"),
        live("filter", "INPUT -j KUBE-FIREWALL", "INPUT -p tcp -m tcp --dport 22 -j DROP"),
        "failsafe-overruled",
    ),
    # marks
    (
        port("a", "80", 'action = "reject"'),
        live("mangle", "PREROUTING -j MARK --set-xmark 0x1000/0x1000"),
        "mark-in-use",
    ),
    (
        zone("z", 'interfaces = ["ens18"]\nservices = ["ssh"]', "reject"),
        live("filter", "X -m mark ! --mark 0x1000/0x3000 -j DROP"),
        "mark-in-use",
    ),
    (rule("-j ULOG"), NODE, "obsolete-target"),
    # beside iptables
    (rule("-p udp -j ACCEPT", chain="FORWARD"), "own nftables", "accept-overruled"),
    (forward("a", "accept", LAST), "own nftables", "accept-overruled"),
    (port("a", '"31000-31010"', 'action = "reject"'), "cilium", "nodeport-by-bpf"),
    (port("a", "31002"), replace(NODE, rules=EMPTY, paths=Paths(interfaces=("cilium_host",))), "nodeport-by-bpf"),
    (port("a", "31002"), replace(NODE, rules=EMPTY, paths=Paths(interfaces=("bpfin.cali",))), "nodeport-by-bpf"),
    (
        rule("-p tcp -m conntrack --ctorigdstport 31002 -j DROP", chain="FORWARD"),
        "ipvs",
        "nodeport-by-ipvs",
    ),
    (forward("a", "reject", 'position = { after = ["DOCKER-*"] }'), "two backends", "other-backend"),
    (
        '[[jump]]\nname = "j"\ntable = "filter"\nfrom = "FORWARD"\nto = "DOCKER-USER"\n',
        "two backends",
        "other-backend",
    ),
    (rule("-p tcp -g SAME", chain="FORWARD"), NODE, "obsolete-target"),
]


@pytest.mark.parametrize(("text", "facts", "code"), SAID, ids=[f"{code}-{i}" for i, (_, _, code) in enumerate(SAID)])
def test_it_is_said_of_every_form_that_the_mistake_takes(
    text: str, facts: NodeFacts | str, code: str, check: Check
) -> None:
    facts = captured(facts) if isinstance(facts, str) else facts
    assert set(check(text, facts)[1]) - lints.NOTES == {code}


SILENT = {
    "an accept on another hook": (rule("-p udp --dport 7 -j ACCEPT"), "own nftables"),
    "an accept in mangle": (rule("-p udp -j ACCEPT", table="mangle", chain="FORWARD"), "own nftables"),
    "an accept that is only counted": (forward("a", "accept", "enforce = false"), "own nftables"),
    "an accept beside a chain of the other family": (
        rule("-p udp -j ACCEPT", chain="FORWARD"),
        replace(NODE, paths=Paths(base_chains=(REFUSING._replace(family="ip"),))),
    ),
    "an accept beside a chain that lets pass": (
        forward("a", "accept"),
        replace(NODE, paths=Paths(base_chains=(REFUSING._replace(refuses=False),))),
    ),
    "a NodePort beside Cilium, where kube-proxy serves it": (
        port("a", "31002"),
        replace(live("nat", "PREROUTING -j KUBE-SERVICES", "KUBE-SERVICES -j RETURN"), paths=CILIUM),
    ),
    "a NodePort beside Cilium, where kube-proxy serves it by nftables": (
        port("a", "31002"),
        replace(NODE, rules=EMPTY, paths=replace(CILIUM, tables=frozenset({("ip", "kube-proxy")}))),
    ),
    "a NodePort beside Cilium on a node whose rules can't be read": (port("a", "31002"), replace(NODE, paths=CILIUM)),
    "a program that nobody knows": (
        port("a", "31002"),
        replace(NODE, rules=EMPTY, paths=Paths(programs=(Program("eth0", "ingress", "mine"),))),
    ),
    "a published port in FORWARD beside IPVS": (
        rule("-p tcp -m conntrack --ctorigdstport 8080 -j DROP", chain="FORWARD"),
        "ipvs",
    ),
    "a redirect of what kube-proxy doesn't serve": (port("a", "8200", 'action = "redirect"'), "kube-proxy in nftables"),
    "an anchor that both backends have": (
        forward("a", "reject", 'position = { after = ["DOCKER-USER"] }'),
        replace(BESIDE["two backends"], rules=live("filter", "FORWARD -j DOCKER-USER").rules),
    ),
    "one of two anchors in the other backend": (
        forward("a", "reject", 'position = { after = ["DOCKER-USER"], before = ["KUBE-FORWARD"] }'),
        "two backends",
    ),
    "a NodePort accepted in INPUT": (rule("-p tcp --dport 31002 -j ACCEPT"), KUBE),
    "the number of a published port in another protocol": (rule("-p udp --dport 8080 -j DROP"), DOCKER),
    "a port that nobody rewrites": (rule("-p tcp --dport 10250 -j DROP"), KUBE),
    "a NodePort refused before DNAT": (rule(DROP_31002, table="mangle", chain="PREROUTING"), KUBE),
    "a NodePort refused in FORWARD": (rule(DROP_31002, chain="FORWARD"), KUBE),
    "a NodePort that is only counted": (rule(DROP_31002, more="enforce = false"), KUBE),
    "a NodePort on loopback": (rule("-i lo -p tcp --dport 31002 -j DROP"), KUBE),
    "all but a NodePort": (rule("-p tcp ! --dport 31002 -j DROP", more=LAST), KUBE),
    "a NodePort with IPVS": (rule(DROP_31002), IPVS),
    "a NodePort with IPVS, beside chains of the other mode": (rule(DROP_31002), replace(NODE_PORTS, ipvs=True)),
    "what a bridge dials that is excepted": (rule("-i br0 -p tcp --dport 8080 -j DROP"), BRIDGED),
    "a port that is rewritten but for one address": (
        rule("-p tcp --dport 8080 -j DROP"),
        live("nat", "PREROUTING ! -d 192.0.2.1/32 -p tcp -m tcp --dport 8080 -j REDIRECT --to-ports 80"),
    ),
    "a port published in IPv4, refused in IPv6 where docker-proxy serves it": (
        rule("-p tcp --dport 8080 -j DROP", more='families = ["ipv6"]'),
        DOCKER,
    ),
    "what containers dial at their host": (rule("-i docker0 -p tcp --dport 8080 -j DROP"), DOCKER),
    "a port that is rewritten for one address only": (
        rule("-p tcp --dport 8080 -j DROP"),
        live("nat", "PREROUTING -d 192.0.2.1/32 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 10.0.0.1:80"),
    ),
    "a port exempt from being rewritten": (
        rule("-p tcp --dport 8080 -j DROP"),
        live(
            "nat",
            "PREROUTING -p tcp -m tcp --dport 8080 -j RETURN",
            "PREROUTING -p tcp -m tcp --dport 8000:9000 -j DNAT --to-destination 10.0.0.1:80",
        ),
    ),
    "a Service without endpoints": (
        rule("-p tcp --dport 8080 -j DROP"),
        live("nat", "PREROUTING -p tcp -m tcp --dport 8080 -j KUBE-SVC-X", "KUBE-SVC-X -j KUBE-MARK-MASQ"),
    ),
    "rules in different tables": (
        rule("-p udp -j DROP", name="a") + rule("-p udp -j DROP", table="mangle", name="b"),
        NODE,
    ),
    "rules of different families": (
        rule("-p udp -j DROP", name="a", more='families = ["ipv6"]') + rule("-p udp -j DROP", name="b"),
        NODE,
    ),
    "a rule with a limit before": (
        rule("-p udp -m limit --limit 5/s -j ACCEPT", name="a")
        + rule("-p udp -m limit --limit 5/s -j ACCEPT", name="b"),
        NODE,
    ),
    "a rule that is only counted before": (
        rule("-p udp -j DROP", name="a", more="enforce = false") + rule("-p udp -j DROP", name="b"),
        NODE,
    ),
    "a narrower rule before": (rule("-p udp --dport 53 -j ACCEPT", name="a") + rule("-p udp -j DROP", name="b"), NODE),
    "a rule before that goes on": (
        rule("-p udp -j MARK --set-mark 2", name="a", table="mangle")
        + rule("-p udp -j DROP", name="b", table="mangle"),
        NODE,
    ),
    "a rule before at a later position": (
        rule("-p udp -j DROP", name="a", more=LAST) + rule("-p udp --dport 9 -j ACCEPT", name="b"),
        NODE,
    ),
    "a rule that returns before": (rule("-p udp -j RETURN", name="a") + rule("-p udp -j DROP", name="b"), NODE),
    "a rule that returns behind": (rule("-p udp -j DROP", name="a") + rule("-p udp -j RETURN", name="b"), NODE),
    "a narrower forward before": (forward("a", "drop", 'in = "eth0"') + forward("b", "drop"), NODE),
    "a forward refused by mark before one that drops": (
        forward("a", "reject") + forward("b", "drop", 'in = "eth0"'),
        NODE,
    ),
    "a forward for the other family": (
        forward("a", "drop", 'source = "10.0.0.0/8"') + forward("b", "drop", 'source = ["10.0.0.0/8", "fd00::/8"]'),
        NODE,
    ),
    "zones within zones": (zone("a", 'sources = ["10.0.0.0/8"]') + zone("b", 'sources = ["10.1.0.0/16"]'), NODE),
    "a wildcard after the name": (
        zone("a", 'interfaces = ["eth0"]\nservices = ["ssh"]') + zone("b", 'interfaces = ["eth+"]\nservices = ["ssh"]'),
        NODE,
    ),
    "a deny that takes a part": (port("a", "80", 'allow = ["10.0.0.0/8"]\ndeny = ["10.0.0.1"]'), NODE),
    "a deny by a set": (
        '[set.s]\nentries = ["192.0.2.1"]\n' + port("a", "80", 'allow = ["10.0.0.0/8"]\ndeny = ["@s"]'),
        NODE,
    ),
    "ports that narrow each other": (
        port("a", "80", 'allow = ["10.0.0.0/8"]') + port("b", "80", 'allow = ["10.1.0.0/16"]'),
        NODE,
    ),
    "a port for any, narrowed in IPv4 only": (
        port("a", "80", 'allow = ["any"]\ndeny = ["10.66.0.0/16"]') + port("b", "80", 'allow = ["10.0.0.0/8"]'),
        NODE,
    ),
    "a port that the failsafe keeps open": (port("a", "22", 'allow = ["10.0.0.0/8"]') + port("b", "22"), NODE),
    "the same port of other protocols": (
        port("a", "53", 'allow = ["10.0.0.0/8"]') + port("b", "53", 'protocol = "udp"\nallow = ["10.9.0.0/16"]'),
        NODE,
    ),
    "the same port of other addresses": (
        port("a", "80", 'allow = ["10.0.0.0/8"]') + port("b", "80", 'destination = ["192.0.2.1"]'),
        NODE,
    ),
    "the same port of the node itself": (
        port("a", "80", 'allow = ["127.0.0.0/8"]\nfrom_node = true') + port("b", "80", 'allow = ["10.0.0.0/8"]'),
        NODE,
    ),
    "a port whose protocol its zone allows": (
        port("a", "80", 'allow = ["10.0.0.1"]') + zone("z", 'sources = ["10.0.0.0/8"]\nprotocols = ["tcp"]'),
        NODE,
    ),
    "a port that its zone allows": (
        port("a", "80", 'allow = ["10.0.0.1"]') + zone("z", 'sources = ["10.0.0.0/8"]\nports = ["80/tcp"]'),
        NODE,
    ),
    "a port that a closer zone allows": (
        port("a", "80", 'allow = ["10.0.0.0/8"]')
        + zone("z", 'sources = ["10.0.0.0/8"]')
        + zone("y", 'sources = ["10.0.0.1"]', "accept"),
        NODE,
    ),
    "a port for another network than the zone's": (
        port("a", "80", 'allow = ["172.16.0.0/12"]') + zone("z", 'interfaces = ["ens18"]\nservices = ["ssh"]'),
        NODE,
    ),
    "a port that one of the zones allows": (
        port("a", "80", 'allow = ["any"]')
        + zone("z", 'interfaces = ["ens18"]\nservices = ["ssh"]')
        + zone("y", 'sources = ["10.0.0.0/8"]', "accept"),
        NODE,
    ),
    "an allow that is nobody in IPv6": (port("a", "80", 'allow = ["10.0.0.0/8"]'), NODE),
    "IPv4 alone on a node without IPv6": (
        '[daemon]\nfamilies = ["ipv4"]\n' + port("a", "80"),
        replace(NODE, environment=SINGLE_STACK),
    ),
    "one host refused by its IPv4 address": (rule("-s 203.0.113.9 -j DROP", table="raw", chain="PREROUTING"), NODE),
    "a rule with its twin": (
        rule("! -s 10.0.0.0/8 -p tcp --dport 23 -j DROP", name="a")
        + rule("! -s fd00::/8 -p tcp --dport 23 -j DROP", name="b"),
        NODE,
    ),
    "a rule with a [[port]] for both": (
        rule("! -s 10.0.0.0/8 -p tcp --dport 23 -j DROP") + port("a", "23", 'allow = ["10.0.0.0/8"]'),
        NODE,
    ),
    "a forward that excepts IPv4 addresses": (forward("a", "drop", 'source = "!10.0.0.0/8"'), NODE),
    "a forward that excepts all of IPv4": (forward("a", "drop", 'source = "!0.0.0.0/0"'), NODE),
    "two zones for everybody": (
        zone("a", 'sources = ["0.0.0.0/0"]\nservices = ["ssh"]') + zone("b", 'sources = ["::/0"]\nservices = ["ssh"]'),
        NODE,
    ),
    "a zone for everybody": (zone("a", 'sources = ["0.0.0.0/0", "::/0"]\nservices = ["ssh"]'), NODE),
    "below Calico's by name": (forward("a", "drop", 'position = { after = ["cali-*"] }'), live("filter", *FELIX)),
    "above what yields, below Calico's": (
        forward("a", "drop", 'position = { before = ["KUBE-FORWARD"] }'),
        live("filter", *FELIX),
    ),
    "early below Calico's": (rule("-p udp -j DROP", chain="FORWARD"), live("filter", *FELIX, APPENDED)),
    "first where Calico appends": (
        rule("-p udp -j DROP", chain="FORWARD", more=FIRST),
        live("filter", "FORWARD -j KUBE-FORWARD", FELIX[0]),
    ),
    "last where Calico only inserts": (rule("-p udp -j DROP", chain="FORWARD", more=LAST), live("filter", *FELIX)),
    "first in a chain where Calico is not": (rule("-p udp -j DROP", more=FIRST), live("filter", *FELIX)),
    "first above Docker's": (
        rule("-p udp -j DROP", chain="FORWARD", more=FIRST),
        live("filter", "FORWARD -j DOCKER-USER"),
    ),
    "one host kept from ssh": (rule("-s 203.0.113.9 -p tcp --dport 22 -j DROP"), NODE),
    "ssh limited by hand": (
        rule("-s 10.0.0.0/8 -p tcp --dport 22 -j ACCEPT", name="a") + rule("-p tcp --dport 22 -j DROP", name="b"),
        NODE,
    ),
    "a default at the end": (rule("-j DROP", more=LAST), NODE),
    "ssh refused by another program that may have let it pass": (
        port("a", "80"),
        live("filter", "INPUT -j ufw-user-input", "INPUT -p tcp -m tcp --dport 22 -j DROP"),
    ),
    "one host kept from ssh by another program": (
        port("a", "80"),
        live("filter", "INPUT -s 203.0.113.9/32 -p tcp -m tcp --dport 22 -j DROP"),
    ),
    "a failsafe that promises other ports": (
        '[failsafe]\nports = ["2222/tcp"]\n' + rule("-p tcp --dport 22 -j DROP"),
        NODE,
    ),
    "a mark that nothing of ours uses": (
        port("a", "80"),
        live("mangle", "PREROUTING -j MARK --set-xmark 0x1000/0x1000"),
    ),
    "our own marks": (
        port("a", "80", 'action = "reject"'),
        live(
            "mangle",
            "NODEWALL-x-a -m comment --comment nodewalld:port/a -j MARK --set-xmark 0x1000/0x1000",
            "PREROUTING -m comment --comment nodewalld:rule/r -j MARK --set-xmark 0x1000/0x1000",
        ),
    ),
    "other bits": (
        port("a", "80", 'action = "reject"'),
        live(
            "mangle",
            "PREROUTING -j MARK --set-xmark 0x1/0xffffffff",
            "PREROUTING -i eth0 -j CONNMARK --set-xmark 0x1000/0x1000",
            "PREROUTING -m connmark --mark 0x1000/0x1000 -j RETURN",
            "OUTPUT -m mark --mark 0x2000/0x2000 -j RETURN",
        ),
    ),
    "NFLOG": (rule("-j NFLOG"), NODE),
    "a NodePort that is counted only": (port("a", "31002", "enforce = false"), BALANCED),
    "a NodePort guarded at any address": (port("a", "31002, 80", 'destination = "any"'), BALANCED),
    "a NodePort with its Service's port guarded at any address": (
        port("a", "31002") + port("b", "80", 'destination = "any"'),
        BALANCED,
    ),
    "a NodePort with its Service at this node's own address, guarded": (port("a", "31002, 80"), OWN_ADDRESS),
    "a NodePort whose Service has no more addresses": (port("a", "30001"), BALANCED),
    "a set of the right type": (
        '[set.mine]\nentries = ["10.0.0.1"]',
        replace(NODE, sets={"mine": ("hash:net", Family.IPV4), "mine-v6": ("hash:net", Family.IPV6)}),
    ),
    "no set yet": ('[set.mine]\nentries = ["10.0.0.1"]', NODE),
}


@pytest.mark.parametrize(("text", "facts"), SILENT.values(), ids=SILENT)
def test_a_near_miss_is_not_warned_of(text: str, facts: NodeFacts | str, check: Check) -> None:
    facts = captured(facts) if isinstance(facts, str) else facts
    assert set(check(text, facts)[1]) - lints.NOTES == set()


SANE = """\
[[port]]
name = "web"
ports = [31002, "8000-9000"]
allow = ["10.0.0.0/8", "203.0.113.0/24"]
action = "reject"

[[forward]]
name = "to-pods"
in = "@default-route"
source = "!10.0.0.0/8"
action = "drop"

[[rule]]
name = "noise"
table = "raw"
chain = "PREROUTING"
rule = "-p udp --dport 137:138 -j DROP"

[[rule]]
name = "metrics"
table = "filter"
chain = "INPUT"
rule = "-p tcp --dport 9100 -j DROP"

[[jump]]
name = "docker-user"
table = "filter"
from = "FORWARD"
to = "DOCKER-USER"

[zone.cluster]
sources = ["10.0.0.0/8"]
target = "accept"

[zone.public]
interfaces = ["eth0"]
services = ["ssh", "https"]
ports = ["31002/tcp", "8000-9000/tcp"]
target = "drop"
"""
CAPTURES = sorted({re.sub(r"\.v[46]\..*", "", path.name) for path in HERE.glob("captures/*.v4.*")})


@pytest.mark.parametrize("name", CAPTURES)
def test_a_sane_configuration_is_warned_of_beside_no_neighbour(name: str, check: Check) -> None:
    assert set(check(SANE, captured(name), "--strict")[1]) <= lints.NOTES


CONDITIONS = [
    "-p tcp",
    "! -s 10.0.0.0/8",
    "--source=192.0.2.1",
    "-m tcp --dport 22",
    "-m multiport --destination-ports 80,443",
    '-m comment --comment "! -p udp -j DROP"',
    "-m limit --limit 5/s",
    "-m conntrack ! --ctstate NEW",
    "-m set --match-set office src",
    "-i ! eth0",
    "--syn",
    "-m socket",
    "--nonsense",
]


@given(st.permutations(CONDITIONS), st.integers(0, len(CONDITIONS)), st.integers(0, len(CONDITIONS)))
def test_a_rule_says_the_same_in_any_order_and_never_less_with_more_conditions(
    conditions: list[str], few: int, place: int
) -> None:
    some = conditions[:few]
    at = min(place, few)
    text = take_apart(" ".join([*some[:at], "-j DROP", *some[at:]]))
    assert text == take_apart(" ".join([*sorted(some), "-j DROP"]))
    assert text.target == "DROP"
    whole = take_apart(" ".join([*conditions, "--jump DROP"]))
    assert text.conditions <= whole.conditions
    silent = sum("--comment" in each for each in some)
    assert len(text.conditions) >= few - silent


WORDS = [*" ".join(CONDITIONS).replace('"', "").split(), "-j", "!", "-", "--", "=", "-g", "é"]


@given(st.lists(st.sampled_from(WORDS)))
def test_no_text_makes_it_crash(words: list[str]) -> None:
    text = take_apart(" ".join(words))
    assert isinstance(text.protocol, str)
    assert len(text.ports) <= len(words)
    assert len(list(text.addresses("-s"))) <= len(words)
