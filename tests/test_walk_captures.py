"""Real rulesets are understood: nearly every packet to what they name is decided, and quickly."""

import ipaddress
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from captured import CAPTURES
from rulesets import services
from worlds import number, packet, routes

from nodewalld.core.words import Backend, Family
from nodewalld.walk import TCP, UDP, World, judge, read

_ADDRESS = re.compile(
    r"(?:-[sd]|--to-destination|--to-source|--ctorigdst) \[?([0-9a-f.:]+[0-9a-f])(?:\]?:\d+)?(?:/(\d+))?\b"
)
_PORT = re.compile(r"--(?:dport|dports|ctorigdstport) ([\d,:]+)")
_MOST = 40  # packets a capture

# The nodes that the captures were made on: the kubelet's and Docker's usual networks.
_LINKS = {
    Family.IPV4: {"ens18": ("10.90.0.1/24",), "cni0": ("10.42.0.1/24",), "docker0": ("172.17.0.1/16",)},
    Family.IPV6: {"ens18": ("fd90::1/64",), "cni0": ("fd42::1/64",), "docker0": ("fd00:d0c::1/64",)},
}
_ALL_HOSTS = {Family.IPV4: "224.0.0.1", Family.IPV6: "ff02::1"}
_STRANGER = {Family.IPV4: "203.0.113.9", Family.IPV6: "2001:db8:c::9"}


def captures(folder: Path) -> list[Path]:
    """What iptables-save printed, in a folder."""
    return sorted(path for path in folder.iterdir() if path.suffix in {".save", ".rules"})


def named(text: str, family: Family) -> Iterator[tuple[str, int]]:
    """The addresses of a ruleset, each with some of its ports; and the node's own."""
    addresses = dict.fromkeys(_LINKS[family]["ens18"][0].split("/")[:1])
    for address, length in _ADDRESS.findall(text):
        try:
            network = ipaddress.ip_network(f"{address}/{length}" if length else address, strict=False)
        except ValueError:
            continue
        if network.version == family.version and not network.is_loopback and not network.is_unspecified:
            addresses[str(network[1] if network.num_addresses > 1 else network[0])] = None
    ports = dict.fromkeys(int(port) for words in _PORT.findall(text) for port in re.split("[,:]", words) if port)
    chosen = [*ports, 80][:: max(1, len(ports) // 8)]
    pairs = [(address, port) for address in addresses for port in chosen]
    yield from pairs[:: max(1, len(pairs) // _MOST)]


def undecided(path: Path) -> tuple[int, int]:
    """How many packets of a stranger to what a capture names are walked, and how many of them aren't decided."""
    text = path.read_text()
    family = Family.IPV6 if ".v6." in path.name else Family.IPV4
    backend = Backend.LEGACY if "legacy" in path.name else Backend.NFT
    groups = {"ens18": frozenset({number(_ALL_HOSTS[family])})}
    world = World(family, {backend: read(text)}, routes(_LINKS[family], default="ens18"), groups=groups)
    verdicts = [
        judge(packet(_STRANGER[family], address, port, protocol), world).passes
        for address, port in named(text, family)
        for protocol in (TCP, UDP)
    ]
    return len(verdicts), verdicts.count(None)


def shares(folder: Path) -> dict[str, tuple[int, int]]:
    """The figures of every capture in a folder."""
    return {path.name: undecided(path) for path in captures(folder)}


def test_nearly_every_packet_to_what_a_capture_names_is_decided() -> None:
    found = shares(CAPTURES)
    asked, open_ = (sum(figures) for figures in zip(*found.values(), strict=True))
    worst = {name: figures for name, figures in found.items() if figures[1]}
    assert asked > 1500
    assert open_ <= asked * 0.05, worst


@pytest.mark.parametrize("family", Family)
def test_of_500_services_one_is_explained_in_less_than_a_second(family: Family) -> None:
    text = services(500, family)
    start = time.process_time()
    world = World(family, {Backend.NFT: read(text)}, routes(_LINKS[family], default="ens18"))
    verdict = judge(packet(_STRANGER[family], _LINKS[family]["ens18"][0].split("/")[0], 30000 + 499), world)
    took = time.process_time() - start
    assert verdict.passes
    assert {path.state.destination for path in verdict.paths} == {
        number(f"10.42.1.{n}" if family is Family.IPV4 else f"fd42::1:{n:x}") for n in (249, 250)
    }
    assert took < 0.5
