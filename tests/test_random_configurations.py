"""Any configuration is refused with places, or iptables takes what it compiles to; and none leaves traces of another.

Hypothesis makes the configurations, always the same ones unless NODEWALLD_EXAMPLES asks for more of them; those that
are good are then loaded into one kernel, many in one restore, each replacing the one before it.
"""

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from live import ask
from test_specs import TEXTS

from lab.daemon import Daemon
from lab.layout import FAMILIES
from lab.node import Node
from nodewalld.commands.offline import desired
from nodewalld.configuration.errors import ConfigError
from nodewalld.configuration.load import load
from nodewalld.core.config import Config, Problem
from nodewalld.core.desired import Desired
from nodewalld.core.environment import Environment
from nodewalld.core.words import Backend, Family
from nodewalld.kernel.firewall import tool
from nodewalld.service import client

MORE = int(os.environ.get("NODEWALLD_EXAMPLES", "0"))
EXAMPLES = MORE or 250
STEPS = 24
NODE = Environment(
    {Family.IPV4: ("192.0.2.1",), Family.IPV6: ("2001:db8::1",)},
    {Family.IPV4: ("192.0.2.9",), Family.IPV6: ()},
    {Family.IPV4: ("eth0",), Family.IPV6: ("eth0", "eth1")},
)

some = st.sampled_from
flag = some([True, False])
ports = st.lists(some([1, 22, 443, "80-90", "32000:32767", 65535]), min_size=1, max_size=20)
peers = st.lists(
    some(["10.0.0.0/8", "192.0.2.7", "fd00::/8", "::1", "@both", "@empty", "0.0.0.0/0", "any"]), max_size=4
)
positions: st.SearchStrategy[Any] = some(
    [
        *("first", "early", "last", {"after": "DOCKER*"}, {"before": ["KUBE-*", {"comment": "cali:*"}]}),
        {"after": [{"rule": "-s 10.42.0.0/16 -j ACCEPT"}], "before": [{"rule": "-A FORWARD -j DROP"}]},
    ]
)
_networks = some(
    ["any", "10.0.0.0/8", "!192.0.2.7", "fd00::/8", "!@both", "@empty", ["@both", "::1"], ["!10.0.0.1", "!@v6"]]
)
_interfaces = some(
    ["eth0", "!docker0", "cni+", "@default-route", "!@default-route", ["eth0", "eth1"], ["!eth0", "!w+"]]
)
_texts = some([text for text in TEXTS if "OTHERS" not in text.rule])
KINDS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "port": {
        "protocol": st.lists(some(["tcp", "udp", "sctp"]), min_size=1, max_size=3, unique=True),
        "allow": peers,
        "deny": peers,
        "action": some(["drop", "reject", "redirect", "redirect:1025"]),
        "from_node": flag,
        "destination": some(["local", "any", ["192.0.2.9"], ["192.0.2.0/24", "2001:db8::9"], ["fd00::1"]]),
        "log": flag,
        "enforce": flag,
    },
    "forward": {
        "in": _interfaces,
        "out": _interfaces,
        "source": _networks,
        "destination": _networks,
        "position": positions,
        "log": flag,
        "enforce": flag,
    },
    "zone": {
        "sources": st.lists(some(["10.1.0.0/16", "10.0.0.0/8", "fd01::/16", "@v6", "198.51.100.1"]), max_size=3),
        "interfaces": st.lists(some(["eth0", "eth1", "w+"]), max_size=2, unique=True),
        "include": st.lists(some(["z0", "z1", "z2"]), max_size=2),
        "services": st.lists(some(["ssh", "dns", "ipsec", "own", "vrrp", "samba"]), max_size=4),
        "ports": st.lists(some(["80/tcp", "90-99/udp", "7/sctp"]), max_size=3),
        "protocols": st.lists(some(["ipip", "esp", 47, "icmpv6"]), max_size=2),
        "log": flag,
        "enforce": flag,
    },
}
_WORDS = ("", "@nobody", "!", "10.0.0.1/8", "x\ny", "COMMIT", "-j DROP", "$(id)", "first ", "redirect:0", "v" * 30)
_VALUES = (0, -1, 65536, 1.5, True, [], {}, ["any", "!any"], {"rule": "-F"}, {"after": []}, [["tcp"]], "\u202e")
BAD: st.SearchStrategy[Any] = some([*_WORDS, *_VALUES])


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """All kinds of entries, nearly always good ones; now and then a key has a value that is nearly good, or bad."""
    tree: dict[str, Any] = {
        "daemon": {"families": draw(some([["ipv4", "ipv6"], ["ipv4", "ipv6"], ["ipv4"], ["ipv6"]]))},
        "set": {"both": {"entries": ["192.0.2.0/24", "fd00::1"]}, "empty": {}, "v6": {"entries": ["fd02::/16"]}},
        "service": {"own": {"ports": ["8200/tcp"], "protocols": ["gre"]}},
    }
    if draw(flag):
        tree["daemon"]["mark"] = draw(some(["0x1000", "0x1", "0x80000000", 4096]))
    if draw(flag):
        tree["failsafe"] = {
            "ports": draw(some([[], ["22/tcp"], ["60000-61000/udp"]])),
            "from": draw(some([["any"], ["@v6"]])),
        }
    for kind in ("port", "forward", "rule", "jump"):
        tree[kind] = [{"name": f"{kind}{n}", **draw(_entry(kind))} for n in range(draw(st.integers(0, 3)))]
    for jump, chain in zip(tree["jump"], draw(st.permutations(["FORWARD", "INPUT", "OUTPUT"])), strict=False):
        jump["from"] = chain  # each once, or nearly all would be refused
    tree["zone"] = {f"z{number}": draw(_entry("zone")) for number in range(draw(st.integers(0, 2)))}
    if draw(st.integers(0, 3)) == 0:
        holders = [e for kind in ("port", "forward", "rule", "jump") for e in tree[kind]]
        holder = draw(some([*holders, *tree["zone"].values(), *tree["set"].values(), tree["daemon"]]))
        holder[draw(some([*holder, "name", "position", "unknown"]))] = draw(BAD)
    return tree


@st.composite
def _entry(draw: st.DrawFn, kind: str) -> dict[str, Any]:
    given_keys = {key: draw(values) for key, values in KINDS.get(kind, {}).items() if draw(flag)}
    if kind == "port":
        given_keys["ports"] = draw(ports)
    elif kind == "forward":
        given_keys["action"] = draw(some(["accept", "drop", "reject"]))
        given_keys |= draw(
            some([{}, {"protocol": "gre"}, {"protocol": "udp", "ports": [53, "1-9"]}, {"protocol": "icmp"}])
        )
    elif kind == "zone":
        given_keys["target"] = draw(some(["accept", "drop", "reject"]))
    elif kind == "rule":
        text = draw(_texts)
        families = [
            f for f in ("ipv4", "ipv6") if text.tool in {"both", tool(Family(f), Backend.NFT, "").split("-")[0]}
        ]
        return {
            "table": text.table,
            "chain": text.chain,
            "rule": text.rule.replace("hosts", "both"),
            "families": families,
            "position": draw(positions),
            "enforce": draw(flag),
        }
    elif kind == "jump":
        return {
            "table": "filter",
            "from": "FORWARD",
            "to": "DOCKER-USER",
            "position": draw(positions),
        }
    return given_keys


def toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value).lower()


def written(tree: dict[str, Any]) -> str:
    """One entry, or one key of a table that stands once, a line: so that a place is worth something."""
    lines = []
    for kind, content in tree.items():
        if isinstance(content, list):
            lines += [f"[[{kind}]]\n" + "\n".join(f"{k} = {toml(v)}" for k, v in entry.items()) for entry in content]
        else:
            lines += [f"{kind}.{key} = {toml(value)}" for key, value in content.items()]
    lines.sort(key=lambda line: line.startswith("["))
    return "\n".join(lines) + "\n"


class Found(NamedTuple):
    """What hypothesis has made: the good ones, with their texts, and how many were refused."""

    good: list[tuple[str, Config]]
    refused: int


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("random")
    good: list[tuple[str, Config]] = []
    refused = [0]

    @settings(
        max_examples=EXAMPLES,
        derandomize=not MORE,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(tree=configurations())
    def collect(tree: dict[str, Any]) -> None:
        text = written(tree)
        (folder / "nodewalld.toml").write_text(text)
        try:
            good.append((text, load(folder, check_owner=False)))
        except ConfigError as error:
            refused[0] += 1
            for problem in error.problems:
                has_its_place(problem, text)

    collect()
    return Found(good, refused[0])


def has_its_place(problem: Problem, text: str) -> None:
    assert Path(problem.where.file).is_file()
    assert 1 <= problem.where.line <= text.count("\n")
    assert problem.key
    assert problem.message
    assert problem.cure, problem


def scripts(wanted: Desired) -> str:
    """The whole of every table as restore takes it, with the foreign chains that it refers to."""
    parts = []
    for table, content in wanted.tables.items():
        foreign = {name for p in content.placements for name in (p.chain, p.needs, p.creates) if name}
        foreign |= {line.needs for chain in content.chains for line in chain.lines if line.needs}
        names = [chain.name for chain in content.chains] + sorted(foreign - set(table.builtin_chains))
        lines = [f":{name} - [0:0]" for name in names]
        lines += [f"-A {chain.name} {line.text}" for chain in content.chains for line in chain.lines]
        lines += [f"-A {place.chain} {place.text}" for place in content.placements]
        parts.append("\n".join((f"*{table}", *lines, "COMMIT", "")))
    return "".join(parts)


def test_enough_of_them_are_good_and_enough_are_not(found: Found) -> None:
    assert len(found.good) > EXAMPLES * 0.3
    assert found.refused > EXAMPLES * 0.1


def test_what_is_not_refused_compiles_to_rules_that_iptables_takes(found: Found, node: Node) -> None:
    for family in Family:
        texts, script, sets = [], "", set()
        for text, config in found.good:
            wanted = desired(config, NODE).get(family)
            if wanted:
                texts += [text] * (scripts(wanted).count("\n"))
                script += scripts(wanted)
                sets |= {entry.name for entry in wanted.sets}
        inet = "inet" if family is Family.IPV4 else "inet6"
        node.run(
            ["ipset", "restore"], stdin="".join(f"create {name} hash:net family {inet}\n" for name in sorted(sets))
        )
        assert len(texts) > 1000
        result = node.run([tool(family, Backend(node.backend), "restore")], stdin=script, check=False, timeout=100)
        if result.returncode:
            numbers = [int(word) for word in result.stderr.replace(":", " ").split() if word.isdigit()]
            number = next((n for n in numbers if n > 10), 1)
            pytest.fail(f"{result.stderr}\n{script.splitlines()[number - 1]}\nof\n{texts[number - 1]}")


# --- from any configuration to any other

FOREIGN = """\
*filter
:DOCKER-USER - [0:0]
:KUBE-FORWARD - [0:0]
-A FORWARD -j KUBE-FORWARD
-A FORWARD -m comment --comment "cali:x" -j ACCEPT
-A FORWARD -j DROP
-A INPUT -p tcp -m tcp --dport 9 -j ACCEPT
-A DOCKER-USER -j RETURN
COMMIT
*mangle
-A PREROUTING -j MARK --set-xmark 0x0/0x4000
COMMIT
*nat
-A PREROUTING -p tcp -m tcp --dport 8080 -j RETURN
COMMIT
"""


def state(node: Node) -> dict[str, Any]:
    """The rules of each chain, and the content of each set; not the order of chains, nor counters."""
    held: dict[str, Any] = {}
    for family in FAMILIES:
        table = ""
        for line in node.rules(family).splitlines():
            if line.startswith("*"):
                table = line
            elif line.startswith(":") and not line.split()[0].endswith(tuple(BUILT_IN)):
                held.setdefault(f"{family} {table} {line.split()[0][1:]}", [])
            elif line.startswith("-A") and not line.endswith(" -j DOCKER-USER"):
                held.setdefault(f"{family} {table} {line.split()[1]}", []).append(line)
    saved = node.run(["ipset", "save"]).stdout.splitlines()
    return held | {"sets": sorted(" ".join(line.split()[:3]) for line in saved)}


BUILT_IN = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")


def untouched(node: Node) -> list[str]:
    """What is foreign. A `[[jump]]` bears no tag and may be its owner's by now: it stays when nobody asks for it."""
    return [line for line in node.snapshot().splitlines() if not line.endswith(" -j DOCKER-USER")]


def put(daemon: Daemon, text: str) -> None:
    daemon.configure(text)
    client.call(daemon.runtime_directory / "control.sock", {"command": "reload"}, 30.0)


def some_of(good: Sequence[tuple[str, Config]], backend: str) -> list[str]:
    """The largest, for they have most to leave behind; without rules, of which some wait for what is not there."""
    texts = sorted((text for text, config in good if len(config.daemon.families) == 2), key=len, reverse=True)
    return [f'daemon.backend = "{backend}"\n{text}' for text in (*texts[:7], *texts[-1:])]


def test_what_one_configuration_leaves_is_what_it_alone_would(found: Found, node: Node) -> None:
    for family in Family:
        node.run([tool(family, Backend(node.backend), "restore")], stdin=FOREIGN)
    foreign = untouched(node)
    texts = some_of(found.good, node.backend)
    daemon = Daemon(node, "", start=True).wait_ready()
    alone = []
    for text in texts:
        ask(daemon, "remove")
        assert untouched(node) == foreign
        put(daemon, text)
        alone.append(state(node))
    dice = random.Random(MORE)
    last = len(texts) - 1
    for step in range(MORE or STEPS):
        last = dice.choice([number for number in range(len(texts)) if number != last])
        put(daemon, texts[last])
        assert state(node) == alone[last], f"step {step}: {texts[last]}"
        assert untouched(node) == foreign, f"step {step}: {texts[last]}"
