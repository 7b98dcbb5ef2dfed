"""Fixtures of the whole suite: throw-away nodes, and the proof that the machine itself was left alone."""

import json
import subprocess
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import cast

import pytest
from captured import CAPTURES
from packets import Guarded
from written import Write

from lab.layout import FAMILIES, FamilyName
from lab.node import BackendName, Node, missing

_LOG_LINES = 60
_SYSCTLS = (
    "net/ipv4/ip_forward",
    "net/ipv4/conf/all/route_localnet",
    "net/ipv4/conf/all/rp_filter",
    "net/ipv4/icmp_ratelimit",
    "net/ipv6/conf/all/forwarding",
    "net/ipv6/conf/all/accept_dad",
    "net/ipv6/conf/all/disable_ipv6",
    "net/netfilter/nf_conntrack_max",
    "kernel/hostname",
    "kernel/keys/maxkeys",
    "vm/overcommit_memory",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """What test_chaos.py takes, and test_captures.py."""
    parser.addoption("--chaos-seconds", default="8", help="how long chaos reigns, for each backend")
    parser.addoption("--chaos-seed", default=None, help="the number that a failed run has printed")
    parser.addoption("--captures", type=Path, metavar="FOLDER", help="captured rulesets to try, instead of our own")


def _printed(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        return ""
    return result.stdout


def _machine() -> dict[str, str]:
    """What of this machine's own network no test may change.

    Listing legacy rules creates the tables that it lists, so only tables that are there already are looked at.
    """
    state = {
        "nft ruleset": _printed("nft", "list", "ruleset"),
        "sets": _printed("ipset", "list", "-name"),
        "links": "\n".join(sorted(link["ifname"] for link in json.loads(_printed("ip", "-j", "link") or "[]"))),
        "addresses": _printed("ip", "-br", "address"),
        "routes": _printed("ip", "route") + _printed("ip", "-6", "route"),
        "namespaces": _printed("ip", "netns", "list"),
        "alternatives": str(Path("/etc/alternatives/iptables").resolve()),
    }
    for tool, names in (("iptables", "ip_tables_names"), ("ip6tables", "ip6_tables_names")):
        path = Path("/proc/net") / names
        tables = sorted(path.read_text().split()) if path.exists() else []
        state[f"{tool} legacy tables"] = " ".join(tables)
        for table in tables:
            saved = _printed(f"{tool}-legacy-save", "-t", table)
            state[f"{tool} legacy {table}"] = "".join(
                line for line in saved.splitlines(keepends=True) if not line.startswith(("#", ":"))
            )
    for key in _SYSCTLS:
        path = Path("/proc/sys") / key
        state[key] = path.read_text().strip() if path.exists() else ""
    return state


@pytest.fixture(scope="session", autouse=True)
def machine_is_left_alone() -> Iterator[None]:
    """Rules, sets, links, routes and sysctls of this machine are the same before and after the suite."""
    before = _machine()
    yield
    after = _machine()
    changed = [name for name in before | after if before.get(name) != after.get(name)]
    if changed:
        told = "\n".join(f"{name}:\n{before.get(name)}\n->\n{after.get(name)}" for name in changed)
        pytest.fail(f"a test has changed this machine's own network:\n{told}")


@pytest.fixture(scope="session")
def laboratory() -> None:
    """Root and the tools that nodes are made of; a suite without them proves nothing, so it fails."""
    if lacking := missing():
        pytest.fail("tests with real kernels need " + ", ".join(lacking), pytrace=False)


@pytest.fixture
def captures() -> Path:
    """The folder of captured rulesets."""
    return CAPTURES


@pytest.fixture(scope="module", params=["nft", "legacy"])
def backend(request: pytest.FixtureRequest) -> BackendName:
    """Each backend in turn; of the whole module, so that a node can be."""
    return cast("BackendName", request.param)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> FamilyName:
    """Each family in turn."""
    return cast("FamilyName", request.param)


@pytest.fixture
def node(laboratory: None, backend: BackendName) -> Iterator[Node]:
    """A throw-away node with empty tables, once with each backend."""
    with Node(backend) as made:
        yield made


@pytest.fixture(scope="module")
def guarded(node: Node) -> Guarded:
    """The daemon of a module whose node serves all of its tests."""
    return Guarded(node)


@pytest.fixture
def kube_node(node: Node) -> Node:
    """The same with kube-proxy's captured rules in force: NodePorts 31002 and 30001."""
    node.load(CAPTURES / "kp126-{backend}-3svc")
    return node


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Makes a configuration's folder from texts: the main file, and files of conf.d by name."""

    def make(main: str | bytes | None = "", **more: str | bytes) -> Path:
        folder = tmp_path / "etc"
        (folder / "conf.d").mkdir(parents=True)
        texts = {"nodewalld.toml": main, **{f"conf.d/{name}.toml": text for name, text in more.items()}}
        for name, text in texts.items():
            if text is not None:
                (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        return folder

    return make


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the last lines of every daemon of the nodes of a failed test."""
    report = yield
    if report.failed:
        nodes = [value for value in getattr(item, "funcargs", {}).values() if isinstance(value, Node)]
        for name, path in {name: path for made in nodes for name, path in made.logs.items()}.items():
            if path.exists() and (lines := path.read_text(errors="replace").splitlines()[-_LOG_LINES:]):
                report.sections.append((f"log of {name}", "\n".join(lines)))
    return report
