"""Behind IPv6 extension headers the shield sees what ip6tables sees; what it can't see it leaves to ip6tables."""

import json
from pathlib import Path

import pytest
from entries import refusals
from shields import each_way

from lab.daemon import Daemon
from lab.layout import BEYOND, NODE, STRANGER
from lab.node import Node

pytestmark = pytest.mark.kernel

HEADERS = Path(__file__).with_name("headers.py")
OPEN = "7009", "7019"
SIGNED = "authentication"
HERE, BEHIND = (7001, 7002, 7003, 7004, 7009), (7011, 7019)
CONFIG = f"""{refusals("udp", STRANGER.ipv6)}
[zone.them]
sources = ["@foes"]
ports = ["7001-7003/udp", "7009/udp"]
target = "drop"
"""


def arrived(node: Node) -> dict[str, bool]:
    """Which datagrams arrive, by port and headers."""
    targets = [f"node,{NODE.ipv6},{port}" for port in HERE] + [f"beyond,{BEYOND.ipv6},{port}" for port in BEHIND]
    return dict(json.loads(node.run([node.python(), str(HEADERS), STRANGER.ipv6, *targets]).stdout))


def test_the_same_arrives_in_whatever_headers_it_is_wrapped(node: Node) -> None:
    free = arrived(node)
    lost = {name for name, came in free.items() if not came}
    assert {name.partition(" ")[2] for name in lost} == {"before its ports"}  # the kernel itself refuses those
    daemon = Daemon(node, "").wait_ready()
    found = {way: arrived(node) for way in each_way(daemon, CONFIG)}
    assert found["both"] == found["iptables"]
    for name, came in found["iptables"].items():
        if SIGNED not in name:
            assert came == (free[name] and name.startswith(OPEN)) == found["shield"][name], name
        elif came:
            assert found["shield"][name], name
    assert found["iptables"][f"7009 {SIGNED}"] == (node.backend == "legacy")  # ip6tables-nft sees a protocol of its own
