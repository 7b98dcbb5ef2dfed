"""What isn't there is waited for, and what fails in one family does not harm the other."""

import re
import signal

import pytest
from live import (
    ask,
    asleep,
    events,
    in_force,
    last_time,
    wait_events,
    wait_in_force,
)
from test_lifecycle import CAPTURE, CONFIG, HEAD, NODEPORT

from lab import layout
from lab.daemon import Daemon
from lab.layout import FAMILIES, FamilyName
from lab.node import TOOLS, BackendName, Node
from lab.traffic import Probe, connect, connect_all, serve_cluster
from lab.waiting import wait_for

pytestmark = pytest.mark.kernel

# --- what isn't there (yet)

LATER = """
[[rule]]
name = "later"
table = "filter"
chain = "LATER"
rule = "-p tcp --dport 7 -j DROP"

[[rule]]
name = "to-later"
table = "mangle"
chain = "PREROUTING"
rule = "-p tcp --dport 8 -j TARGET"
"""


def test_a_rule_whose_chain_is_missing_waits_and_comes_into_force_with_it(node: Node) -> None:
    with Daemon(node, HEAD + LATER) as daemon:
        daemon.wait_ready()
        status = ask(daemon, "status")
        assert status["state"] == "degraded"
        told = " ".join(status["reasons"])
        for words in ("ipv4", "ipv6", "rule/later waits", "no chain LATER", "rule/to-later waits", "no chain TARGET"):
            assert words in told
        assert daemon.ctl("status").returncode == 3
        for tool in TOOLS.values():
            node.run(f"{tool} -w -N LATER; {tool} -w -t mangle -N TARGET")
        wait_for(lambda: ask(daemon, "status")["state"] == "enforcing", what="the rules to follow their chains")
        for family in FAMILIES:
            assert "--dport 7" in node.rules(family)
            assert "-j TARGET" in node.rules(family)
            assert len(node.chain("filter", "LATER", family)) == 1
        assert in_force(daemon)
        assert events(daemon, "recovered")


def test_the_backend_is_the_one_of_the_hint_chain_and_follows_it(node: Node) -> None:
    """Whatever plain `iptables` is: kubelet's hint counts."""
    mine: BackendName = node.backend
    other: BackendName = "legacy" if mine == "nft" else "nft"
    hint = "KUBE-IPTABLES-HINT"
    node.run(f"iptables-{other} -w -t mangle -N {hint}")
    config = CONFIG.replace('"1h"', '"1s"')
    with Daemon(node, config) as daemon:
        daemon.wait_ready()
        assert ask(daemon, "status")["backend"] == other
        assert "NODEWALL" in node.rules(backend=other)
        assert "NODEWALL" not in node.rules(backend=mine)
        node.run(f"iptables-{other} -w -t mangle -X {hint}; iptables-{mine} -w -t mangle -N {hint}")
        wait_for(lambda: ask(daemon, "status")["backend"] == mine, what="the move")
        wait_for(lambda: "NODEWALL" not in node.rules(backend=other), what="the old rules to go")
        assert "NODEWALL" in node.rules(backend=mine)
        assert "NODEWALL" not in node.rules("ipv6", backend=other)
        wait_in_force(daemon)
        assert any("NODEWALL" not in e["what"] and hint in e["what"] for e in events(daemon, "reload"))


def test_without_a_hint_it_stays_with_the_backend_used_last(node: Node) -> None:
    other: BackendName = "legacy" if node.backend == "nft" else "nft"
    config = CONFIG.replace("[daemon]", f'[daemon]\nbackend = "{other}"')
    with Daemon(node, config) as daemon:
        daemon.wait_ready()
        daemon.stop()
        daemon.configure(CONFIG)
        daemon.start()
        daemon.wait_ready()
        assert ask(daemon, "status")["backend"] == other
        assert in_force(daemon)


# --- families fail apart


@pytest.mark.parametrize(("broken", "sound"), [("ipv6", "ipv4"), ("ipv4", "ipv6")])
def test_a_family_without_tools_does_not_harm_the_other(kube_node: Node, broken: FamilyName, sound: FamilyName) -> None:
    serve_cluster(kube_node)
    fake = kube_node.directory / "fake"
    fake.mkdir()
    for backend in ("nft", "legacy"):
        for action in ("", "-save", "-restore"):
            program = fake / f"{TOOLS[broken]}-{backend}{action}"
            program.write_text("#!/bin/sh\necho 'no tools here' >&2\nexit 1\n")
            program.chmod(0o755)
    env = {"PATH": f"{fake}:{kube_node.environment()['PATH']}"}
    with Daemon(kube_node, CONFIG, env=env) as daemon:
        daemon.wait_ready()
        status = ask(daemon, "status")
        assert status["state"] == "degraded"
        assert any(reason.startswith(f"{broken}: ") and "no tools here" in reason for reason in status["reasons"])
        assert not any(reason.startswith(f"{sound}: ") for reason in status["reasons"])
        assert status["families"] == {sound: "enforcing", broken: "degraded"}
        probes = [
            Probe("client", (layout.NODE.of(sound), NODEPORT), source.of(sound))
            for source in (layout.STRANGER, layout.ALLOWED)
        ]
        assert [answer.open for answer in connect_all(kube_node, probes)] == [False, True]
        since = last_time(daemon)
        asleep(daemon)
        daemon.signal(signal.SIGSTOP)  # both at one look
        for tool in TOOLS.values():
            kube_node.run(f"{tool} -w 5 -t mangle -F PREROUTING")
        daemon.signal(signal.SIGCONT)
        wait_events(daemon, lambda seen: any(e["family"] == sound for e in seen), "repair", since=since)
        assert not connect_all(kube_node, probes[:1])[0].open
        assert daemon.reload(CONFIG + '[[port]]\nname = "more"\nports = [7]\n').returncode == 0
        assert "--dport 7 " in kube_node.rules(sound)


def test_a_native_rule_in_a_table_of_ip6tables_does_not_harm_ipv4(laboratory: None) -> None:
    """iptables-nft-save then prints "incompatible", exits 0 and shows nothing: never taken for "our rules are gone"."""
    with Node("nft") as node:
        node.load(CAPTURE)
        serve_cluster(node)
        with Daemon(node, CONFIG) as daemon:
            daemon.wait_ready()
            six = _ours_in_nft(node)
            node.run(["nft", "insert rule ip6 mangle PREROUTING ct mark 0x5 accept"])
            assert "incompatible" in node.run("ip6tables-save 2>&1").stdout
            # Its text needs not be known to stand above it again, nor does iptables.
            wait_for(lambda: "NODEWALL" in _first_rule(node, "ip6 mangle PREROUTING"), what="our jump above it")
            assert ask(daemon, "status")["state"] == "enforcing"
            # A daemon that starts must read what there is.
            daemon.stop()
            daemon.start()
            daemon.wait_ready()
            wait_for(lambda: ask(daemon, "status")["state"] == "degraded", what="the trouble to be told")
            status = ask(daemon, "status")
            assert all(reason.startswith("ipv6: ") for reason in status["reasons"])
            assert "ip6tables-nft" in " ".join(status["reasons"])  # in the tool's own words
            since = last_time(daemon)
            node.run("iptables -w -t mangle -F PREROUTING")
            wait_events(daemon, lambda seen: any(e["family"] == "ipv4" for e in seen), "repair", since=since)
            assert not connect(node, "client", source=layout.STRANGER.ipv4, to=(layout.NODE.ipv4, NODEPORT)).open
            # What stood in ip6tables stands there still, and recovers by itself.
            assert _ours_in_nft(node) == six
            handle = re.search(r"ct mark .*# handle (\d+)", node.run("nft -a list chain ip6 mangle PREROUTING").stdout)
            assert handle
            node.run(f"nft delete rule ip6 mangle PREROUTING handle {handle[1]}")
            wait_for(lambda: ask(daemon, "status")["state"] == "enforcing", what="recovery")
            assert in_force(daemon)


def _ours_in_nft(node: Node) -> list[str]:
    """Our rules in IPv6 mangle as nft prints them, without counters, and without the comments that only it can see."""
    listed = node.run("nft list table ip6 mangle").stdout.splitlines()
    return [re.sub(r'packets \d+ bytes \d+| comment ".*"', "", line).strip() for line in listed if "NODEWALL" in line]


def _first_rule(node: Node, chain: str) -> str:
    return node.run(f"nft list chain {chain}").stdout.splitlines()[3]
