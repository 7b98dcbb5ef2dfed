"""Docker's, kube-proxy's, Calico's and CNI's own jumps are missed when somebody has flushed them, on the real kernel.

What people suffer from: moby#12294, kubernetes#129128, rke2#10469, k3s#14419. Both backends are disturbed at the same
time, each beside a daemon of its own, so that one wait serves both.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime, timedelta
from typing import Any

import pytest
from captured import CAPTURES, add_capture
from live import NEIGHBOUR, ask, disturb, events

from lab.daemon import Daemon
from lab.node import Node
from lab.waiting import wait_for

pytestmark = pytest.mark.kernel

CONFIG = '[daemon]\nresync = "{resync}"\n[[port]]\nname = "vault"\nports = [31002]\n'
DOCKER, PORTMAP = "docker-20.10-{backend}-container-published", "cni-portmap-1.1.1-{backend}-hostport"
OWNERS = {"Docker", "kube-proxy", "Calico", "CNI portmap", "CNI firewall"}


def stand(node: Node) -> None:
    """Everybody's rules as captured, one beside the other."""
    node.load(CAPTURES / "kp126+felix3264-insert-{backend}-3svc")
    add_capture(node, DOCKER)
    add_capture(node, PORTMAP)


@pytest.fixture
def daemons(laboratory: None, request: pytest.FixtureRequest) -> Iterator[list[Daemon]]:
    with ExitStack() as stack:
        made = []
        for backend in ("nft", "legacy"):
            node = stack.enter_context(Node(backend))
            stand(node)
            daemon = stack.enter_context(Daemon(node, CONFIG.format(resync=request.param)))
            daemon.wait_ready()
            made.append(daemon)
        yield made


def lost(daemon: Daemon) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in ask(daemon, "status")["neighbours"]}


def wait_lost(daemon: Daemon) -> dict[str, dict[str, Any]]:
    return wait_for(lambda: lost(daemon), timeout=20, what=f"a loss on {daemon.node.backend} to be told")


def culprit(each: dict[str, Any]) -> str | None:
    by = each["by"]
    return by and str(by["name"])


@pytest.mark.parametrize("daemons", ["1s"], indirect=True)
def test_a_flush_of_nat_alone_and_a_jump_taken_out_by_hand_are_told_with_their_cure(daemons: list[Daemon]) -> None:
    left = []
    for daemon in daemons:
        assert lost(daemon) == {}
        [forward] = [rule for rule in daemon.node.chain("filter", "FORWARD") if rule.endswith("-j KUBE-FORWARD")]
        disturb(daemon.node, ["iptables -w -t nat -F", f"iptables -w -D FORWARD {forward}"])
        left.append(daemon.node.snapshot())
    for daemon, foreign in zip(daemons, left, strict=True):
        told = wait_lost(daemon)
        assert list(told) == ["Docker", "kube-proxy", "Calico", "CNI portmap"]
        assert told["Docker"]["what"].startswith("published ports of Docker are dead since ")
        assert told["Docker"]["what"].endswith(": systemctl restart docker")
        assert "forwards to pods" in told["kube-proxy"]["what"]
        assert told["CNI portmap"]["what"].startswith("hostPorts and masquerades of hostPorts of CNI portmap")
        # One program alone has written since the look before: on nft the kernel names it, on legacy nobody does.
        named = NEIGHBOUR if daemon.node.backend == "nft" else None
        assert {culprit(each) for each in told.values()} == {named}
        said = [each["what"][:1].upper() + each["what"][1:] for each in told.values()]
        assert [event["message"] for event in events(daemon, "neighbour")] == said
        assert "  neighbours: published ports of Docker are dead" in daemon.ctl("status").stdout
        # Nothing of theirs was written, and a restart forgets nothing and tells nothing twice.
        assert daemon.node.snapshot() == foreign
        daemon.restart()
        assert lost(daemon) == told
        add_capture(daemon.node, DOCKER)
        wait_for(lambda daemon=daemon: "Docker" not in lost(daemon), what="the healing")
        [healed] = events(daemon, "healed")
        assert healed["message"].startswith("The jumps of Docker stand again, after ")
        assert events(daemon, "neighbour") == []
        assert daemon.reload().returncode == 0  # the others were taken out on purpose
        assert lost(daemon) == {}


@pytest.mark.parametrize("daemons", ["1h"], indirect=True)
def test_after_a_flush_of_ours_the_neighbours_are_looked_at_at_once(daemons: list[Daemon]) -> None:
    tables = ("raw", "mangle", "nat", "filter")
    for daemon in daemons:
        disturb(
            daemon.node, [f"iptables -w -t {table} -{what}" for what in ("F", "X") for table in tables], check=False
        )
    for daemon in daemons:
        wait_for(lambda daemon=daemon: lost(daemon).keys() == OWNERS, timeout=20, what="everybody's loss to be told")
        told = lost(daemon)
        named = NEIGHBOUR if daemon.node.backend == "nft" else None
        assert {culprit(each) for each in told.values()} == {named}
        [first, *_] = events(daemon, "repair")
        moments = [datetime.fromisoformat(text) for text in (first["time"], told["Docker"]["since"])]
        assert abs(moments[1] - moments[0]) < timedelta(seconds=1)
        assert "(IPv4)" not in told["Docker"]["what"]  # it has no rules in IPv6
        assert told["kube-proxy"]["what"].startswith("Services and NodePorts, ")
        assert " of kube-proxy (IPv4) are dead" in told["kube-proxy"]["what"]
