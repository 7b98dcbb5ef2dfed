"""What of a configuration the shield carries, and how ports and addresses are put in order for it."""

import ipaddress
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_random_configurations import NODE

from nodewalld.configuration.load import load
from nodewalld.core.config import PortRange
from nodewalld.core.decide import decide
from nodewalld.core.shield.ports import segments
from nodewalld.core.shield.render import render
from nodewalld.core.shield.rules import AddressSet, Shield, Verdict, Word
from nodewalld.core.words import Family

PORTS = st.integers(1, 40)
SPANS = st.lists(
    st.tuples(PORTS, PORTS, st.sampled_from("abc")).map(lambda s: (PortRange(min(s[:2]), max(s[:2])), s[2]))
)


def shield_of(tmp_path: Path, text: str) -> Shield:
    (tmp_path / "nodewalld.toml").write_text(text)
    config = load(tmp_path, check_owner=False)
    return render({family: decide(config, family, NODE) for family in config.daemon.families})


@given(SPANS)
def test_each_port_leads_to_all_whose_ranges_hold_it_and_no_two_segments_overlap(
    spans: list[tuple[PortRange, str]],
) -> None:
    found = list(segments(spans))
    for port in range(42):
        holders = [each for ports, each in found if ports.first <= port <= ports.last]
        wanted = tuple(dict.fromkeys(name for ports, name in spans if ports.first <= port <= ports.last))
        assert holders == ([wanted] if wanted else [])


@given(st.lists(st.integers(0, 255).flatmap(lambda n: st.integers(24, 32).map(lambda p: f"10.0.0.{n}/{p}"))))
def test_a_set_holds_the_addresses_of_its_networks_and_no_other(texts: list[str]) -> None:
    networks = frozenset(ipaddress.ip_network(text, strict=False) for text in texts)
    entry = AddressSet.of("x", Family.IPV4, networks)
    held = {number for first, last in entry.spans() for number in range(first, last + 1)}
    assert held == {int(address) for network in networks for address in network}
    runs = entry.spans()
    assert all(one[1] + (1 if entry.ranges else 0) < other[0] for one, other in pairwise(runs))


def test_every_verdict_leads_to_a_chain_that_is_there(tmp_path: Path) -> None:
    for example in sorted((Path(__file__).parent.parent / "etc/examples").iterdir()):
        shield = shield_of(tmp_path, example.read_text())
        chains = {chain.name for chain in shield.chains}
        thens = [rule.then for chain in shield.chains for rule in chain.rules]
        thens += [verdict for each in shield.maps for _, verdict in each.verdicts]
        led = {then.chain for then in thens if isinstance(then, Verdict) and then.word in {Word.JUMP, Word.GOTO}}
        assert led | {chain.name for chain in shield.chains if chain.base} == chains


@pytest.mark.parametrize("name", ["last", "first", "origin", "here", "zone-origin", "members", "a-origin", "a-tcp"])
def test_no_entry_s_name_makes_two_chains_one(tmp_path: Path, name: str) -> None:
    """The same entries, under another name, give the same number of chains and of rules."""

    def size(called: str) -> tuple[int, int]:
        text = f"""
[zone.{called}]
interfaces = ["eth0"]
services = ["ssh"]
target = "drop"
[zone.a]
interfaces = ["eth1"]
services = ["ssh"]
target = "reject"
[[port]]
name = "{called}"
ports = [1, 2]
action = "reject"
[[port]]
name = "a"
ports = [2]
from_node = true
[[forward]]
name = "{called}"
source = ["10.0.0.0/8"]
action = "drop"
"""
        chains = shield_of(tmp_path, text).chains
        return len(chains), sum(len(chain.rules) for chain in chains)

    assert size(name) == size("other")


PORT = '[[port]]\nname = "a"\nports = [1]\nfrom_node = true\n'
ACCEPT = '[[rule]]\nname = "in"\ntable = "mangle"\nchain = "{}"\nrule = "-p tcp --sport 9 -j ACCEPT"\n'


def test_what_a_rule_accepts_before_our_refusals_is_no_matter_of_the_shield(tmp_path: Path) -> None:
    assert dict(shield_of(tmp_path, PORT + ACCEPT.format("PREROUTING")).iptables_only).keys() == {"rule/in"}
    two = PORT + ACCEPT.format("PREROUTING") + ACCEPT.format("INPUT").replace('"in"', '"more"')
    shield = shield_of(tmp_path, two)
    assert "goes before it" in dict(shield.iptables_only)["port/a"]
    assert shield.rules == 0
    shield = shield_of(tmp_path, PORT + ACCEPT.format("OUTPUT"))
    assert dict(shield.iptables_only)["port/a"].startswith("judging this node itself")
    assert {chain.name for chain in shield.chains if chain.base} == {"prerouting"}


def test_what_is_not_carried_is_told_with_its_reason(tmp_path: Path) -> None:
    text = """
    [[forward]]
    name = "through"
    action = "accept"
    [[forward]]
    name = "placed"
    action = "drop"
    position = "first"
    [[port]]
    name = "counted"
    ports = [1]
    enforce = false
    [[rule]]
    name = "raw"
    table = "filter"
    chain = "INPUT"
    rule = "-j DROP"
    """
    told = dict(shield_of(tmp_path, text).iptables_only)
    assert told == {
        "forward/through": "an accept is for the others' rules behind it",
        "forward/placed": "its place among others' rules is its meaning",
        "port/counted": "it only counts",
        "rule/raw": "the text of a rule is iptables'",
    }
