"""Base chains of other programs, as `nft -j list table` prints them, are walked beside iptables' tables."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from worlds import packet, world

from nodewalld.walk import UDP, BaseChain, Outcome, judge, read_table

IFACE = {"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "ens18"}}
DPORT = {"payload": {"protocol": "tcp", "field": "dport"}}


def table(
    *rules: Sequence[Any],
    hook: str = "input",
    prio: int = 10,
    policy: str = "accept",
    kind: str = "filter",
    name: str = "t",
) -> tuple[BaseChain, ...]:
    """A table with one base chain, and a chain "other" that drops; a rule is a list of statements."""
    where = {"family": "inet", "table": name}
    chain = {**where, "name": "base", "type": kind, "hook": hook, "prio": prio, "policy": policy}
    items: list[dict[str, Any]] = [{"table": {"family": "inet", "name": name}}, {"chain": chain}]
    items += [{"chain": {**where, "name": "other"}}, {"chain": {**where, "name": "ipv4-refuse-port/vault"}}]
    items.append({"set": {**where, "name": "nets", "elem": [{"prefix": {"addr": "203.0.113.0", "len": 24}}]}})
    items.append(
        {"map": {**where, "name": "ports", "elem": [[80, {"drop": None}], [443, {"jump": {"target": "other"}}]]}}
    )
    items.append({"chain": {**where, "name": "back"}})
    for chain_name, expr in [("base", rule) for rule in rules] + [("other", [{"drop": None}])]:
        items.append({"rule": {**where, "chain": chain_name, "expr": json.loads(json.dumps(expr))}})
    ours = {**where, "chain": "ipv4-refuse-port/vault", "comment": "port/vault"}
    items.append({"rule": {**ours, "expr": [{"counter": None}, {"drop": None}]}})
    return read_table(items)


def passes(*rules: Sequence[Any], port: int = 80, **more: Any) -> bool | None:
    return judge(packet("203.0.113.9", "10.90.0.1", port), world("", others=table(*rules, **more))).passes


@pytest.mark.parametrize(
    ("op", "left", "right", "matches"),
    [
        ("==", {"meta": {"key": "iifname"}}, "ens*", True),
        ("==", {"meta": {"key": "iifname"}}, {"set": ["eth0", "eth1"]}, False),
        ("==", {"meta": {"key": "nfproto"}}, "ipv6", False),
        ("==", {"meta": {"key": "l4proto"}}, {"set": ["icmp", "tcp"]}, True),
        ("==", DPORT, {"set": [22, {"range": [80, 90]}]}, True),
        ("!=", DPORT, 80, False),
        (">", DPORT, 79, True),
        ("<", DPORT, 80, False),
        ("==", {"payload": {"protocol": "udp", "field": "dport"}}, 80, False),
        ("!=", {"payload": {"protocol": "udp", "field": "dport"}}, 81, False),  # it has no such port
        ("==", {"payload": {"protocol": "tcp", "field": "sport"}}, 40000, None),
        ("==", {"payload": {"protocol": "ip", "field": "saddr"}}, "@nets", True),
        ("==", {"&": [{"payload": {"base": "nh", "offset": 96, "len": 32}}, 0xFF000000]}, 203 << 24, True),
        (
            "==",
            {"concat": [{"payload": {"protocol": "ip", "field": "daddr"}}, DPORT]},
            {"concat": ["10.90.0.1", 80]},
            True,
        ),
        ("in", {"ct": {"key": "state"}}, ["established", "new"], True),
        ("==", {"ct": {"key": "state"}}, {"set": ["established", "related"]}, False),
        ("in", {"ct": {"key": "status"}}, "dnat", False),
        ("==", {"ct": {"key": "proto-dst", "dir": "original"}}, 80, True),
        ("==", {"fib": {"result": "type", "flags": ["daddr"]}}, {"range": ["local", "multicast"]}, True),
        ("==", {"fib": {"result": "type", "flags": ["saddr"]}}, "local", False),
        ("==", {"fib": {"result": "oif", "flags": ["saddr", "mark", "iif"]}}, False, False),
        ("==", {"fib": {"result": "oif", "flags": ["saddr"]}}, True, True),
        ("==", {"fib": {"result": "oif", "flags": ["daddr", "oif"]}}, False, None),
        ("==", {"&": [{"meta": {"key": "mark"}}, 0xF]}, 0, True),
        ("in", {"payload": {"protocol": "tcp", "field": "flags"}}, "syn", True),
        ("==", {"meta": {"key": "skuid"}}, 0, None),
        ("==", {"payload": {"protocol": "tcp", "field": "window"}}, 0, None),
    ],
)
def test_an_expression_is_what_nft_says(op: str, left: Any, right: Any, matches: bool | None) -> None:
    answer = passes([{"match": {"op": op, "left": left, "right": right}}, {"drop": None}])
    assert answer is (None if matches is None else not matches)


def test_verdicts_maps_and_policies() -> None:
    vmap = [{"vmap": {"key": DPORT, "data": "@ports"}}]
    assert passes(vmap) is False
    assert passes(vmap, port=443) is False
    assert passes(vmap, port=444)
    assert passes([{"accept": None}], [{"drop": None}])
    assert passes([IFACE, {"goto": {"target": "other"}}]) is False
    assert passes(policy="drop") is False
    # What is gone to does not come back to where it was gone from.
    assert passes([{"jump": {"target": "back"}}], [{"drop": None}]) is False
    assert passes([{"goto": {"target": "back"}}], [{"drop": None}])
    assert passes([{"return": None}], policy="drop") is False
    assert passes([{"reject": None}]) is False
    assert passes([{"limit": {"rate": 1, "per": "second"}}, {"drop": None}]) is None
    assert passes([{"xt": None}]) is None
    assert (
        passes([IFACE, {"mangle": {"key": {"meta": {"key": "mark"}}, "value": 1}}, {"drop": None}]) is None
    )  # two deeds


def test_a_lot_falls_on_one_of_all() -> None:
    lot = {"numgen": {"mode": "random", "mod": 2, "offset": 0}}
    both = [[0, {"drop": None}], [1, {"jump": {"target": "other"}}]]
    assert passes([{"vmap": {"key": lot, "data": {"set": both}}}]) is False
    assert passes([{"vmap": {"key": lot, "data": {"set": both[:1]}}}]) is None


def test_an_accept_overrules_no_other_chain() -> None:
    filter_ = "*filter\n:INPUT DROP [0:0]\nCOMMIT\n"
    verdict = judge(packet("203.0.113.9", "10.90.0.1", 80), world(filter_, others=table([{"accept": None}], prio=-10)))
    assert verdict.passes is False


def test_marks_go_from_one_to_the_other() -> None:
    mark = [{"mangle": {"key": {"meta": {"key": "mark"}}, "value": {"|": [{"meta": {"key": "mark"}}, 8]}}}]
    others = table(mark, hook="prerouting", prio=-160)
    text = "*mangle\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -m mark --mark 0x8/0x8 -j DROP\nCOMMIT\n"
    assert judge(packet("203.0.113.9", "10.90.0.1", 80), world(text, others=others)).passes is False


@pytest.mark.parametrize(("prio", "port"), [(-101, 8080), (-99, 9090)])
def test_who_binds_a_flow_first_has_bound_it(prio: int, port: int) -> None:
    dnat = [
        {"match": {"op": "==", "left": DPORT, "right": 80}},
        {"dnat": {"family": "ip", "addr": "10.42.0.2", "port": 8080}},
    ]
    text = "*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p tcp -j DNAT --to-destination 10.42.0.2:9090\nCOMMIT\n"
    others = table(dnat, hook="prerouting", prio=prio, kind="nat")
    verdict = judge(packet("203.0.113.9", "10.90.0.1", 80), world(text, others=others))
    assert verdict.outcomes == {Outcome.FORWARDED}
    assert {path.state.destination_ports for path in verdict.paths} == {(port, port)}
    assert judge(packet("203.0.113.9", "10.90.0.1", 80, UDP), world(text, others=others)).outcomes == {
        Outcome.DELIVERED
    }


def test_ours_are_named_there_too() -> None:
    there = {"jump": {"target": "ipv4-refuse-port/vault"}}
    others = table([there], name="nodewalld")
    verdict = judge(packet("203.0.113.9", "10.90.0.1", 80), world("", others=others))
    assert [rule.tag for rule in verdict.deciders] == ["port/vault"]
    verdict = judge(packet("203.0.113.9", "10.90.0.1", 80), world("", others=table([there])))
    assert [rule.tag for rule in verdict.deciders] == [""]
