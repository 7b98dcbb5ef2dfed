"""What is told of a packet that the shield drops: the shield, and the entry whose refusal it is."""

import json
from typing import Any

import pytest
from entries import refusals
from packets import REFUSED, TIMEOUT, dial, verdicts
from test_trace import Trace

from lab.daemon import Daemon
from lab.layout import BEYOND, NODE, STRANGER, STRANGER_2, FamilyName
from lab.node import TOOLS, Node
from lab.traffic import Probe, serve

pytestmark = pytest.mark.kernel

CONFIG = f"""{refusals("tcp", STRANGER.ipv4, STRANGER.ipv6)}
[zone.them]
sources = ["{STRANGER_2.ipv4}", "{STRANGER_2.ipv6}"]
ports = ["7001-7003/tcp"]
target = "drop"
"""
FIRST = {
    "port/shut": (STRANGER, NODE, 7001),
    "zone/them": (STRANGER_2, NODE, 7004),
    "forward/through": (STRANGER, BEYOND, 7011),
}
LAST = {"port/answered": (STRANGER, NODE, 7002), "port/closed": (STRANGER, NODE, 7003)}
INSTEAD = "iptables should have answered it and did not: the shield drops it instead"


def dialled(family: FamilyName, entries: dict[str, Any]) -> dict[str, Probe]:
    return {entry: dial(source, family, to, port) for entry, (source, to, port) in entries.items()}


def explained(daemon: Daemon, probe: Probe) -> dict[str, Any]:
    address, port = probe.to
    to = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    result = daemon.ctl("explain", "tcp", probe.source, "->", to, "--json")
    assert result.returncode == 3, result.stderr
    return dict(json.loads(result.stdout))


def explained_as_dropped(daemon: Daemon, probe: Probe, entry: str) -> list[str]:
    """That each way of the packet ends in the shield, by this entry; the notes."""
    found = explained(daemon, probe)
    assert found["outcomes"] == ["dropped"], found
    for way in found["ways"]:
        assert way["by"]["place"].startswith("the shield, chain "), way["by"]
        assert way["by"]["entry"] == entry
    return list(found["notes"])


def test_each_answer_names_the_shield_and_the_entry(node: Node) -> None:
    family: FamilyName = "ipv4" if node.backend == "nft" else "ipv6"
    serve(node, "node", tcp=[7001, 7002, 7003, 7004])
    daemon = Daemon(node, CONFIG).wait_ready()
    first, last = dialled(family, FIRST), dialled(family, LAST)
    assert set(verdicts(node, first).values()) == {TIMEOUT}
    assert set(verdicts(node, last).values()) == {REFUSED}
    for entry, probe in first.items():
        assert explained_as_dropped(daemon, probe, entry) == []
    daemon.kill9()
    for tool in TOOLS.values():
        node.run(f"{tool} -t mangle -F; {tool} -F; {tool} -t nat -F")
    assert set(verdicts(node, first | last).values()) == {TIMEOUT}
    for entry, probe in last.items():
        (note,) = explained_as_dropped(daemon, probe, entry)
        assert note.startswith(INSTEAD)
    (traced,) = told_of(node, last["port/answered"])
    assert traced["outcome"] == f"dropped by port/answered, in the shield ({family}-refuse-port/answered)"
    knocks = json.loads(daemon.ctl("exposures", "--json").stdout)["exposures"]
    found = {
        door["governed_by"]: (door["answer"], door["shield"])
        for door in knocks
        if door["family"] == family and door["entries"]
    }
    assert found == {f"port/{name} (shield)": ("dropped", True) for name in ("shut", "answered", "closed")}
    missing = json.loads(daemon.ctl("plan", "--json").stdout)["changes"]
    assert {change["table"] for change in missing} == {"mangle", "filter", "nat"}  # and nothing of the shield


def told_of(node: Node, probe: Probe) -> list[dict[str, Any]]:
    """What `nodewallctl trace` tells of it."""
    trace = Trace(node, "tcp", "--dport", str(probe.to[1]), "--count", "1", "--json")
    verdicts(node, {"": probe})
    return trace.packets()
