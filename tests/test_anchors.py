"""Anchors under way: gone for a moment or for hours, renamed, doubled, crossed. docs/configuration.md states it all."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from live import ask, events, last_time, wait_events, wait_in_force

from lab.daemon import Daemon
from lab.layout import FamilyName
from lab.node import TOOLS, BackendName, Node
from lab.waiting import wait_for

pytestmark = pytest.mark.kernel

AFTER, BEFORE, RENAMED, OURS, OTHER = "KUBE-FORWARD", "DOCKER-USER", "DOCKER-FORWARD", "ours", "ACCEPT"
CONFIG = f"""
[daemon]
resync = "1h"

[[forward]]
name = "telnet"
protocol = "tcp"
ports = [23]
action = "drop"
position = {{ after = ["{AFTER}"], before = ["{BEFORE}"] }}
"""
MISSING = f"none of its anchors is in the chain ({AFTER}, {BEFORE})"
CROSSED = f"in the wrong order ({AFTER} stands below {BEFORE}), so only `before` is kept"


@dataclass
class Chain:
    """FORWARD of one family, by what its rules lead to."""

    daemon: Daemon
    node: Node
    family: FamilyName

    def write(self, *commands: str) -> None:
        """One transaction; the last word of a command is what its rule leads to."""
        lines = [" -j ".join(command.rsplit(" ", 1)) if command[1] in "AID" else command for command in commands]
        script = "\n".join(("*filter", *lines, "COMMIT", ""))
        self.node.run([f"{TOOLS[self.family]}-restore", "-w", "--noflush"], stdin=script)

    def fill(self, *targets: str) -> None:
        """Ours is gone with all that was there before."""
        self.write("-F FORWARD", *(f"-A FORWARD {target}" for target in targets))

    @property
    def targets(self) -> list[str]:
        rules = self.node.chain("filter", "FORWARD", self.family)
        return [OURS if "nodewalld:" in rule else rule.rpartition("-j ")[2] for rule in rules]

    def wait(self, *targets: str) -> None:
        wait_for(lambda: self.targets == list(targets), what=f"{targets} in {self.family}")

    def wait_reasons(self, *reasons: str) -> None:
        start = f"{self.family}: forward/telnet in filter FORWARD: "

        def told() -> bool:
            seen = [text for text in ask(self.daemon, "status")["reasons"] if text.startswith(start)]
            return len(seen) == len(reasons) and all(map(str.endswith, seen, reasons))

        wait_for(told, what=f"the reasons {reasons}")

    def begin(self, *targets: str) -> None:
        self.fill(*targets)
        wait_in_force(self.daemon)
        assert OURS in self.targets


@pytest.fixture(scope="module", params=["nft", "legacy"])
def daemon(laboratory: None, request: pytest.FixtureRequest) -> Iterator[Daemon]:
    backend: BackendName = request.param
    with Node(backend) as node:
        chains = "".join(f":{name} - [0:0]\n" for name in (AFTER, BEFORE, RENAMED))
        for tool in TOOLS.values():
            node.run(
                [f"{tool}-restore"], stdin=f"*filter\n{chains}-A FORWARD -j {AFTER}\n-A FORWARD -j {BEFORE}\nCOMMIT\n"
            )
        yield Daemon(node, CONFIG).wait_ready()


@pytest.fixture
def chain(daemon: Daemon) -> Chain:
    """IPv4 on nft, IPv6 on legacy: where anchors are is nothing that a family changes."""
    made = Chain(daemon, daemon.node, "ipv4" if daemon.node.backend == "nft" else "ipv6")
    made.begin(AFTER, BEFORE)
    made.wait(AFTER, OURS, BEFORE)
    made.wait_reasons()
    return made


def test_one_that_is_back_in_a_moment_moves_nothing_and_is_not_told(chain: Chain) -> None:
    """Docker's way to move its jump: delete, then insert. Without `before` ours would go down to below `after`."""
    chain.fill(BEFORE, OTHER, AFTER)
    chain.wait(OURS, BEFORE, OTHER, AFTER)
    chain.wait_reasons(CROSSED)
    since = last_time(chain.daemon)
    chain.write(f"-D FORWARD {BEFORE}")
    chain.write(f"-I FORWARD {BEFORE}")
    (repair,) = wait_events(chain.daemon, bool, "repair", since=since)
    assert repair["reason"] == "displaced"
    chain.wait(OURS, BEFORE, OTHER, AFTER)
    chain.write(f"-D FORWARD {BEFORE}", f"-D FORWARD {AFTER}")
    chain.write(f"-A FORWARD {AFTER}", f"-I FORWARD {BEFORE}")
    chain.wait(OURS, BEFORE, OTHER, AFTER)
    assert not any(MISSING in event["message"] for event in events(chain.daemon) if event["time"] > since)


def test_one_that_stays_away_moves_ours_down_only_after_its_second(chain: Chain) -> None:
    chain.fill(BEFORE, OTHER, AFTER)
    chain.wait(OURS, BEFORE, OTHER, AFTER)
    chain.write(f"-D FORWARD {BEFORE}")
    assert chain.targets[0] == OURS
    chain.wait(OTHER, AFTER, OURS)
    chain.wait_reasons()


def test_with_one_side_gone_for_good_the_other_holds_and_nothing_is_wrong(chain: Chain) -> None:
    """Docker after a flush: what it lost is its own matter; there is nothing left to stand above."""
    chain.fill(OTHER, AFTER, OTHER)
    chain.wait(OTHER, AFTER, OURS, OTHER)
    chain.wait_reasons()
    chain.write(f"-A FORWARD {BEFORE}")
    chain.wait(OTHER, AFTER, OURS, OTHER, BEFORE)  # it stands right already
    chain.write(f"-I FORWARD {BEFORE}")
    chain.wait(OURS, BEFORE, OTHER, AFTER, OTHER, BEFORE)
    chain.wait_reasons(CROSSED)


def test_with_all_gone_for_hours_ours_stays_and_says_so_and_comes_to_its_place_when_one_is_back(chain: Chain) -> None:
    chain.write(f"-D FORWARD {AFTER}", f"-D FORWARD {BEFORE}", f"-I FORWARD {OTHER}", f"-A FORWARD {OTHER}")
    chain.wait_reasons(MISSING)
    assert chain.targets == [OTHER, OURS, OTHER]
    chain.fill(OTHER, OTHER)
    chain.wait(OURS, OTHER, OTHER)  # put in anew, where `early` would
    chain.wait_reasons(MISSING)
    assert ask(chain.daemon, "status")["state"] == "degraded"
    chain.write(f"-A FORWARD {AFTER}")
    chain.wait(OTHER, OTHER, AFTER, OURS)
    chain.wait_reasons()


def test_for_one_that_was_renamed_the_new_name_is_shown(chain: Chain) -> None:
    chain.fill(OTHER, RENAMED)
    chain.wait_reasons(f"none of its anchors is in the chain ({AFTER}, {BEFORE}; there is {RENAMED})")


def test_doubled_ones_count_from_the_last_after_to_the_first_before(chain: Chain) -> None:
    chain.fill(AFTER, OTHER, AFTER, OTHER, BEFORE, OTHER, BEFORE)
    chain.wait(AFTER, OTHER, AFTER, OTHER, OURS, BEFORE, OTHER, BEFORE)
    chain.wait_reasons()
    chain.write(f"-A FORWARD {AFTER}")
    chain.wait_reasons(CROSSED)
    assert chain.targets == [AFTER, OTHER, AFTER, OTHER, OURS, BEFORE, OTHER, BEFORE, AFTER]


def test_crossed_ones_keep_ours_above_before_until_they_are_in_order_again(chain: Chain) -> None:
    chain.write(f"-D FORWARD {AFTER}", f"-A FORWARD {AFTER}")
    chain.wait(OURS, BEFORE, AFTER)
    chain.wait_reasons(CROSSED)
    assert ask(chain.daemon, "status")["state"] == "degraded"
    chain.write(f"-D FORWARD {AFTER}", f"-I FORWARD {AFTER}")
    chain.wait_reasons()
    chain.wait(AFTER, OURS, BEFORE)
