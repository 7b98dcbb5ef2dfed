"""`remove` takes out what is ours, in both backends, and what was made for us; and nothing else."""

import pytest
from live import wait_in_force

from lab.daemon import Daemon
from lab.node import Node

pytestmark = pytest.mark.kernel

CONFIG = """
[set.office]
entries = ["192.0.2.1"]

[[port]]
name = "a"
ports = [31002]
allow = ["@office"]
action = "reject"

[[rule]]
name = "back"
table = "filter"
chain = "FORWARD"
rule = "-p icmp -j RETURN"

[[jump]]
name = "docker-user"
table = "filter"
from = "FORWARD"
to = "DOCKER-USER"
"""


def ours(node: Node) -> list[str]:
    text = node.rules("ipv4") + node.rules("ipv6") + node.run(["ipset", "list", "-name"]).stdout
    words = ("NODEWALL", "nodewalld", "office", "DOCKER-USER")
    return [line for line in text.splitlines() if any(word in line for word in words)]


def test_nothing_of_ours_is_left(node: Node) -> None:
    before = node.snapshot()
    daemon = Daemon(node, CONFIG).wait_ready()
    assert ours(node)
    assert daemon.ctl("remove").returncode == 0
    assert ours(node) == []
    assert node.snapshot() == before
    assert daemon.status()["state"] == "idle"


def test_without_a_daemon_as_well(node: Node) -> None:
    daemon = Daemon(node, CONFIG).wait_ready()
    daemon.stop()
    assert daemon.ctl("remove").returncode == 0
    assert ours(node) == []


def test_a_chain_that_others_have_begun_to_use_stays_reachable(node: Node) -> None:
    daemon = Daemon(node, CONFIG).wait_ready()
    node.run("iptables -A DOCKER-USER -s 192.0.2.9 -j DROP")
    daemon.ctl("remove")
    assert node.chain("filter", "DOCKER-USER") == ["-s 192.0.2.9/32 -j DROP"]
    assert node.chain("filter", "FORWARD") == ["-j DOCKER-USER"]


def test_a_chain_that_was_there_before_us_stays(node: Node) -> None:
    node.run("iptables -N DOCKER-USER; iptables -A FORWARD -j DOCKER-USER")
    daemon = Daemon(node, CONFIG).wait_ready()
    daemon.ctl("remove")
    assert node.chain("filter", "FORWARD") == ["-j DOCKER-USER"]


def test_a_chain_of_ours_that_a_neighbour_jumps_to_stops_neither_reload_nor_repair(node: Node) -> None:
    """The kernel refuses to delete it, and with it the whole transaction; no chain that we look at shows why."""
    with Daemon(node, CONFIG) as daemon:
        daemon.wait_ready()
        node.run("iptables -t mangle -N NEIGHBOUR && iptables -t mangle -A NEIGHBOUR -j NODEWALL-x-a")
        assert daemon.reload(CONFIG.replace('name = "a"', 'name = "b"')).returncode == 0
        assert daemon.status()["state"] == "enforcing", daemon.status()
        assert node.chain("mangle", "NEIGHBOUR") == ["-j NODEWALL-x-a"]
        assert node.chain("mangle", "NODEWALL-x-a") == []
        assert node.chain("mangle", "NODEWALL-x-b")
        node.run("iptables -t mangle -F PREROUTING")
        wait_in_force(daemon)
        node.run("iptables -t mangle -F NEIGHBOUR")
        assert daemon.reload().returncode == 0
        assert "NODEWALL-x-a" not in node.rules()


def test_a_left_over_chain_that_a_restore_brings_back_goes_with_the_repair(node: Node) -> None:
    """Not only at the next resync: until then a plan would find something to do."""
    with Daemon(node, CONFIG) as daemon:
        daemon.wait_ready()
        dump = "*mangle\n:NODEWALL-PRE - [0:0]\n-A NODEWALL-PRE -p tcp -j DROP\nCOMMIT\n"
        node.run([f"iptables-{node.backend}-restore"], stdin=dump)
        wait_in_force(daemon)
        assert "NODEWALL-PRE " not in node.rules()
