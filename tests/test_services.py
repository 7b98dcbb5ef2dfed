"""Built-in services: the contract's list is there, each name means something, and the manual tells the same."""

import re
from pathlib import Path

import pytest

from nodewalld.configuration.services import BUILT_IN

CONTRACT = {
    "ssh": "22/tcp",
    "http": "80/tcp",
    "https": "443/tcp",
    "dns": "53/tcp, 53/udp",
    "kube-apiserver": "6443/tcp",
    "kubelet": "10250/tcp",
    "kube-scheduler-secure": "10259/tcp",
    "kube-controller-manager-secure": "10257/tcp",
    "etcd-client": "2379/tcp",
    "etcd-server": "2380/tcp",
    "kube-nodeport-services": "30000-32767/tcp, 30000-32767/udp",
    "bgp": "179/tcp",
    "wireguard": "51820-51821/udp",
    "docker-swarm": "2377/tcp, 7946/tcp, 7946/udp, 4789/udp",
    "flannel-vxlan": "8472/udp",
    "flannel-udp": "8285/udp",
    "calico-vxlan": "4789/udp",
    "calico-ipip": "ipip",
    "calico-typha": "5473/tcp",
    "cilium-health": "4240/tcp",
    "rke2-supervisor": "9345/tcp",
    "node-exporter": "9100/tcp",
    "vrrp": "vrrp",
    "ipsec": "500/udp, 4500/udp, esp, ah",
    # Those of firewalld that stand for a part of a cluster.
    "kube-control-plane-secure": "2379/tcp, 2380/tcp, 6443/tcp, 10257/tcp, 10259/tcp",
    "kube-worker": "10250/tcp, 30000-32767/tcp, 30000-32767/udp",
}
NUMBERS = {"4": "ipip", "47": "gre", "112": "vrrp"}


def told(name: str) -> str:
    """A service as the manual writes it."""
    service = BUILT_IN[name]
    parts = []
    for each in service.ports:
        last = "" if each.ports.last == each.ports.first else f"-{each.ports.last}"
        parts.append(f"{each.ports.first}{last}/{each.protocol}")
    return ", ".join([*parts, *(NUMBERS.get(protocol, protocol) for protocol in service.protocols)])


@pytest.mark.parametrize("name", CONTRACT)
def test_the_services_of_the_contract_mean_what_it_says(name: str) -> None:
    assert told(name) == CONTRACT[name]


def test_the_manual_lists_every_service_with_what_it_means() -> None:
    manual = (Path(__file__).parents[1] / "docs/configuration.md").read_text()
    table = manual.partition("| service | ports |\n|---|---|\n")[2].partition("\n\n")[0]
    listed = dict(re.findall(r"^\| (\S+) \| (.+) \|$", table, re.MULTILINE))
    assert listed == {name: told(name) for name in sorted(BUILT_IN)}
