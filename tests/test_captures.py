"""Beside every real ruleset ours are placed, foreign rules stay byte for byte as they were, and nothing is left to do.

A daemon runs while one captured ruleset after another replaces all tables under it, as a restore at boot would. A node
without a daemon takes the same and shows what the foreign rules look like alone.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from captured import CAPTURES
from entries import DOCKER_USER, FRIENDS, RELAY, VAULT
from live import wait_in_force

from lab.daemon import Daemon
from lab.layout import FAMILIES
from lab.node import TOOLS, BackendName, Node
from lab.saved import sets_of

pytestmark = pytest.mark.kernel


CONFIG = f"""{FRIENDS}
[zone.internal]
sources = ["@friends"]
services = ["ssh"]
target = "reject"
{VAULT}{RELAY}
[[forward]]
name = "transit"
destination = ["10.42.0.0/16", "fd42::/48"]
action = "reject"
position = {{ after = ["cali-FORWARD", "KUBE-FORWARD", "DOCKER*"], before = ["ACCEPT"] }}

[[rule]]
name = "last-word"
table = "filter"
chain = "FORWARD"
rule = "-m conntrack --ctstate INVALID -j DROP"
position = "last"
{DOCKER_USER}"""


class Pair:
    """A guarded node and one without a daemon, to which the same is done."""

    def __init__(self, guarded: Node, alone: Node, daemon: Daemon) -> None:
        self.guarded, self.alone, self.daemon = guarded, alone, daemon

    def stand(self, capture: Path) -> None:
        """Load a ruleset into both, and see ours in force without any change of the foreign rules."""
        self.alone.load(capture)
        # What the [[jump]] asks for is foreign in name.
        for family in FAMILIES:
            tool = TOOLS[family]
            self.alone.run(
                f"{tool} -N DOCKER-USER; {tool} -C FORWARD -j DOCKER-USER || {tool} -A FORWARD -j DOCKER-USER"
            )
        self.guarded.load(capture)
        wait_in_force(self.daemon)
        assert foreign(self.guarded) == foreign(self.alone)
        forward = self.guarded.chain("filter", "FORWARD")
        assert forward.count("-j DOCKER-USER") == 1
        assert len([rule for rule in forward if "nodewalld:" in rule]) >= 3


@pytest.fixture(scope="module", params=["nft", "legacy"])
def pair(laboratory: None, request: pytest.FixtureRequest) -> Iterator[Pair]:
    backend: BackendName = request.param
    config = f'[daemon]\nbackend = "{backend}"\n{CONFIG}'
    with Node(backend) as guarded, Node(backend) as alone, Daemon(guarded, config) as daemon:
        daemon.wait_ready()
        yield Pair(guarded, alone, daemon)


def foreign(node: Node) -> list[str]:
    """All foreign rules; the one jump to DOCKER-USER stands where it is asked for, and is looked at by itself."""
    return [line for line in node.snapshot().splitlines() if line != "-A FORWARD -j DOCKER-USER"]


def rulesets(folder: Path) -> list[list[Path]]:
    """The rulesets below a folder, whatever they are called: the files of both families of one step together."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in {".rules", ".save"}:
            found.setdefault(re.sub(r"\.v[46]\.\w+$", "", str(path)), []).append(path)
    return list(found.values())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All of tests/captures, or all below `--captures FOLDER`."""
    if "ruleset" in metafunc.fixturenames:
        found = rulesets(metafunc.config.getoption("--captures") or CAPTURES)
        metafunc.parametrize("ruleset", found, ids=[re.sub(r"\.v[46]\.", ".", files[0].name) for files in found])


def test_ours_stand_beside_a_real_ruleset_that_stays_as_it_is(pair: Pair, ruleset: list[Path], tmp_path: Path) -> None:
    for path in ruleset:
        six = ".v6." in path.name or "ipv6" in path.name or "ip6tables-1" in path.name
        (tmp_path / f"one.v{6 if six else 4}.rules").write_text(taken(pair, path, "ip6tables" if six else "iptables"))
    pair.stand(tmp_path / "one")


def taken(pair: Pair, path: Path, tool: str) -> str:
    """The ruleset without the lines that this kernel has no modules for, which the node without a daemon finds out."""
    lines = path.read_text().splitlines()
    if sets := sets_of(path.read_text(), "ipv6" if tool == "ip6tables" else "ipv4"):
        for node in (pair.alone, pair.guarded):
            node.run(["ipset", "restore", "-exist"], stdin=sets)
    dropped: list[str] = []
    while True:
        text = "\n".join(lines) + "\n"
        done = pair.alone.run([f"{tool}-{pair.alone.backend}-restore", "--test"], stdin=text, check=False)
        failed = re.search(r"line:? (\d+)", done.stderr)
        if done.returncode == 0 or failed is None:
            break
        dropped.append(lines.pop(int(failed[1]) - 1))
    assert len(dropped) < len(lines) / 10, (done.stderr, dropped)
    print(path.name, "without", dropped)
    return text
