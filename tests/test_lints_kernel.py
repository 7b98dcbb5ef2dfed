"""Lints on a real node: `check` reads the rules, sets and addresses that are there, and leaves all as it was."""

import json

import pytest

from lab.daemon import Daemon
from lab.node import Node
from nodewalld.core.words import Backend, Family
from nodewalld.kernel.firewall import FirewallError
from nodewalld.kernel.survey import survey

pytestmark = pytest.mark.kernel

INPUT = """\
[[rule]]
name = "no-nodeport"
table = "filter"
chain = "INPUT"
rule = "-p tcp --dport 31002 -j DROP"

[set.hosts]
entries = ["192.0.2.1"]
"""
WAY_IN = '[failsafe]\nports = ["2222/tcp"]\n[[port]]\nname = "ssh"\nports = [22]\nallow = ["10.1.0.0/16"]\n'


def head(node: Node) -> str:
    return f'[daemon]\nbackend = "{node.backend}"\n'


def codes(daemon: Daemon, *options: str, **env: str) -> tuple[int, list[str], dict]:
    result = daemon.ctl("check", "--json", *options, env=env)
    said = json.loads(result.stdout)
    return result.returncode, [one["code"] for one in said["errors"] + said["warnings"]], said


def test_a_nodeport_refused_in_input_is_told_by_the_live_rules_and_nothing_is_changed(kube_node: Node) -> None:
    daemon = Daemon(kube_node, head(kube_node) + INPUT, start=False)
    legacy_before = kube_node.run("cat /proc/net/ip_tables_names /proc/net/ip6_tables_names").stdout
    status, found, said = codes(daemon)
    assert (status, found, said["node_read"]) == (0, ["input-after-dnat"], True)
    assert "(ipv4 and ipv6)" in said["warnings"][0]["message"]
    assert kube_node.run("cat /proc/net/ip_tables_names /proc/net/ip6_tables_names").stdout == legacy_before
    assert kube_node.run(["ipset", "list", "-name"]).stdout == ""
    plain = daemon.ctl("check", "--strict")
    assert plain.returncode == 1
    assert (
        "nodewalld.toml:3: rule.no-nodeport.rule: 31002/tcp is rewritten before INPUT by KUBE-NODEPORTS" in plain.stderr
    )
    assert plain.stderr.splitlines()[0].endswith("[input-after-dnat]")


def test_each_family_is_judged_by_its_own_rules(kube_node: Node) -> None:
    daemon = Daemon(kube_node, head(kube_node) + INPUT, start=False)
    kube_node.run("ip6tables -t nat -F")
    [warning] = codes(daemon)[2]["warnings"]
    assert "(ipv4)" in warning["message"]


def test_where_no_backend_is_to_be_found_that_is_told() -> None:
    def nobody_knows() -> Backend:
        raise FirewallError("iptables can't be started")

    facts = survey((Family.IPV4,), nobody_knows, (), None)
    assert (facts.rules, facts.unread) == ({}, ("iptables can't be started",))


def test_a_set_made_by_hand_with_another_type_is_an_error_with_the_cure(node: Node) -> None:
    daemon = Daemon(node, head(node) + INPUT, start=False)
    assert codes(daemon)[:2] == (0, [])
    assert node.run(["nft", "list", "tables"]).stdout == ""  # a look at a node without rules makes no table
    assert node.run("cat /proc/net/ip_tables_names").stdout == ""
    node.run(["ipset", "create", "hosts", "hash:ip"])
    status, found, said = codes(daemon)
    assert (status, found) == (1, ["set-type"])
    assert said["errors"][0]["cure"].startswith("`ipset destroy hosts`")


def test_who_would_be_locked_out_is_told_before_the_reload(node: Node) -> None:
    daemon = Daemon(node, head(node) + WAY_IN, start=False)
    stranger, office = "203.0.113.7 50000 10.90.0.1 22", "10.1.2.3 50000 10.90.0.1 22"
    assert codes(daemon, SSH_CONNECTION=stranger)[:2] == (0, ["locks-you-out"])
    assert codes(daemon, "--strict", SSH_CONNECTION=office)[:2] == (0, [])
