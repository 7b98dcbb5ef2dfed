"""The answers of `nodewallctl` on a real node: its examples run, its plans come true, its tables fit, it is quick."""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from live import ours

from lab.daemon import Daemon
from lab.installed import Installed
from lab.layout import FAMILIES
from lab.node import Node
from lab.processes import inner_pid
from lab.waiting import wait_for
from nodewalld.commands import ctl

pytestmark = pytest.mark.kernel

CONFIG = """
[set.office]
entries = ["10.90.0.7", "fd90::/64"]

[set.banned]

[[port]]
name = "vault-nodeport"
ports = [31002, "32000-32010"]
allow = ["@office", "10.0.0.0/8", "fd00::/8"]
deny = ["@banned"]

[[forward]]
name = "pods-from-nodes"
source = "!@office"
action = "reject"
position = { after = [{ rule = "-s 10.42.0.0/16 -j ACCEPT" }], before = [{ rule = "-d 10.42.0.0/16 -j ACCEPT" }] }

[[jump]]
name = "docker-user"
table = "filter"
from = "FORWARD"
to = "DOCKER-USER"
"""
FOREIGN = ("-A FORWARD -s 10.42.0.0/16 -j ACCEPT", "-A FORWARD -d 10.42.0.0/16 -j ACCEPT")


# --- the examples of --help -------------------------------------------------------------------------------------


def examples(parser: argparse.ArgumentParser) -> Iterator[str]:
    """What stands below "examples:" in the --help of a parser and of its commands, in the order of the commands."""
    _, found, text = (parser.epilog or "").partition("examples:\n")
    if found:
        yield from (line.strip() for line in text.splitlines() if line.startswith("  "))
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from examples(inner)


@pytest.fixture
def installed(laboratory: None) -> Iterator[Installed]:
    with Node("nft", uplink="ens18") as node:  # as the examples have it
        made = Installed(node, CONFIG)
        stand(node)
        made.run("iptables-save > /etc/iptables/rules.v4")
        made.start()
        yield made


ENDLESS = {re.compile(r" (-f|--follow|--watch)\b"): 130, re.compile(r"^nodewallctl trace "): 0}
"""What goes on until Ctrl-C, and the exit status then."""
BEFORE = {
    "confirm": "nodewallctl try",
    "revert": "nodewallctl try",
    "resume": "nodewallctl pause --for 10m",
    "import": "iptables-save > /tmp/rules",
}
"""What must have been done for a command to have something to do."""
AFTER = {
    "try": "nodewallctl revert",
    "pause": "nodewallctl resume",
    "remove": "nodewallctl reload",
    "report": "rm -f nodewalld-report-*.tar.gz /tmp/node7.tar.gz",
}
"""What puts the node back, so that the next example finds it in force."""
STATUS = {"explain": {0, 3}, "plan": {0, 3}}
"""Exit statuses that are answers; everything else must end with 0."""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_example_of_every_help_does_what_it_is_an_example_of(installed: Installed) -> None:
    lines = list(dict.fromkeys(examples(ctl._parser())))
    assert {line.split()[1] for line in lines} >= set(ctl.COMMANDS)
    for line in lines:
        command = line.split()[1]
        with contextlib.ExitStack() as after:
            if command in AFTER:
                after.callback(installed.run, AFTER[command])
            if command in BEFORE:
                installed.run(BEFORE[command])
            if endless := [status for which, status in ENDLESS.items() if which.search(line)]:
                assert interrupted(installed, line) == endless[0], line
                continue
            source = " < /tmp/rules" if line.endswith(" -") else ""
            done = installed.run(line + source, check=False)
            assert done.returncode in STATUS.get(command, {0}), f"{line}\n{done.stdout}{done.stderr}"
            assert "Traceback" not in done.stderr
            if "--json" in line:
                for one in done.stdout.splitlines():
                    json.loads(one)


def interrupted(installed: Installed, line: str) -> int:
    """Let it print, press Ctrl-C; its exit status."""
    with installed.popen(f"{line} 2>&1") as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        os.kill(inner_pid(process), signal.SIGINT)
        process.stdout.read()
        return process.wait(20)


# --- plan -------------------------------------------------------------------------------------------------------


def stand(node: Node, tool: str = "iptables") -> None:
    """The foreign rules between which seed 002's kind of rule stands, and a neighbour's."""
    for text in FOREIGN:
        node.run(f"{tool} {text}" if tool == "iptables" else f"{tool} {text.replace('10.42.0.0/16', 'fd42::/64')}")
    node.run(f"{tool} -t mangle -A PREROUTING -i eth9 -j ACCEPT")


DISTURBED = (
    "{tool} -t mangle -I PREROUTING 1 -j ACCEPT",  # our jump displaced
    "{tool} -t mangle -F NODEWALL-INPUT",  # a chain of ours flushed
    "{tool} -t mangle -D NODEWALL-p-vault-nodeport 2",  # a rule of ours gone
    "{tool} -t filter -D FORWARD -j DOCKER-USER",  # a jump gone
    "{tool} -t filter -I FORWARD 2 -s {source} -j DROP",  # more foreign rules
    "{tool} -t filter -N NODEWALL-left-over",
)


def test_what_plan_shows_as_before_stands_and_what_it_shows_as_after_will(node: Node) -> None:
    """Chain by chain and number by number, in both families, as iptables prints them before and after the commit."""
    stand(node)
    stand(node, "ip6tables")
    with Daemon(node, CONFIG, args=["--once"], start=False) as daemon:
        comes_true(daemon)
        for tool, source in (("iptables", "192.0.2.1"), ("ip6tables", "2001:db8::1")):
            node.run(" && ".join(DISTURBED).format(tool=tool, source=source))
        daemon.configure(CONFIG.replace("pods-from-nodes", "other").replace("10.0.0.0/8", "192.168.0.0/16"))
        comes_true(daemon)
        assert daemon.ctl("plan").returncode == 0


def comes_true(daemon: Daemon) -> None:
    """Plan, look, enforce, look."""
    done = daemon.ctl("plan", "--json")
    assert done.returncode == 3, done.stderr
    chains = json.loads(done.stdout)["chains"]
    assert {chain["family"] for chain in chains} == set(FAMILIES)
    assert {chain["chain"] for chain in chains} >= {"PREROUTING", "FORWARD", "NODEWALL-p-vault-nodeport"}
    for chain in chains:
        assert texts(daemon.node, chain) == [rule["rule"] for rule in chain["rules"] if rule["before"]]
    daemon.start()
    assert daemon.wait() == 0, daemon.log_text()
    for chain in chains:
        expected = [words(rule["rule"]) for rule in chain["rules"] if rule["after"]]
        assert [words(text) for text in texts(daemon.node, chain)] == expected, chain["chain"]


def texts(node: Node, chain: dict[str, str]) -> list[str]:
    return node.chain(chain["table"], chain["chain"], chain["family"])


def words(text: str) -> str:
    """A rule as far as iptables leaves it as it was written: not in quotes, nor in the mask of a lone address."""
    return re.sub(r"/(32|128)\b", "", text.replace('"', ""))


# --- tables, colours, time --------------------------------------------------------------------------------------


def test_every_answer_fits_80_columns_and_is_plain_where_nobody_looks(installed: Installed) -> None:
    installed.run("iptables -t mangle -F")
    wait_for(lambda: "mangle FORWARD" in installed.run("nodewallctl history").stdout, what="a repair")
    installed.run("sed -i s,10.0.0.0/8,192.168.0.0/16, nodewalld/nodewalld.toml")
    lines = ("nodewallctl status", "nodewallctl show", "nodewallctl history", "nodewallctl plan ./nodewalld")
    status, show, history, plan = (installed.run(line, check=False).stdout for line in lines)
    for out in (status, show, history, plan):
        assert [line for line in out.splitlines() if len(line) > 80] == []
        assert "\x1b" not in out
    assert re.search(r"^  exposed:    1 time since .* ms", status, re.MULTILINE)
    assert len(status.splitlines()) < 24
    assert re.search(r"^ +\d+ +\d+ +\d+ port/vault-nodeport +-g NODEWALL-x-", show, re.MULTILINE)
    assert re.search(r"^ +3 +- -s 10.0.0.0/8 -j RETURN \[port/vault-nodeport\]$", plan, re.MULTILINE)
    assert re.search(r"^.{15} repair +mangle PREROUTING +flushed +[\d.]+ m?s", history, re.MULTILINE)
    coloured = installed.typed(lines[3])
    assert "\x1b[32m             3 + -s 192.168.0.0/16 -j RETURN [port/vault-nodeport]\x1b[0m" in coloured
    assert re.sub(r"\x1b\[\d+m", "", coloured) == plan
    assert installed.typed(lines[3], env={"NO_COLOR": "1"}) == plan
    assert any(len(line) > 80 for line in installed.typed(lines[1], columns=160).splitlines())


def test_status_costs_at_most_150_ms_more_than_python_itself(laboratory: None) -> None:
    """Side by side, the quickest of each, for load only makes it slower; on a slow machine, six times python itself."""
    with Node("nft") as node, Daemon(node, CONFIG) as daemon:
        daemon.wait_ready()
        assert ours(node)
        nothing, status = [], []
        for _ in range(12):
            nothing.append(seconds([sys.executable, "-c", "pass"]))
            argv = [sys.executable, "-m", "nodewalld.commands.ctl", "status", "--runtime-dir"]
            status.append(seconds([*argv, str(daemon.runtime_directory)]))
            if min(status) - min(nothing) < 0.15:
                break
        assert min(status) - min(nothing) < max(0.15, 6 * min(nothing)), (nothing, status)


def seconds(argv: list[str]) -> float:
    began = time.monotonic()
    subprocess.run(argv, stdout=subprocess.DEVNULL, check=False, timeout=30)
    return time.monotonic() - began
