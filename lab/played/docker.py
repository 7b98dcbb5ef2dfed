"""dockerd 28 and 29: deletes its two jumps and inserts them again, at its start and for each network."""

from typing import ClassVar

from lab.played.player import TOOLS, Played
from lab.rivals import PORTS

_RANGE = f"{PORTS[0]}:{PORTS[-1]}"
_DOCKER_CHAINS = ("DOCKER", "DOCKER-BRIDGE", "DOCKER-CT", "DOCKER-FORWARD", "DOCKER-INTERNAL")


class Docker28(Played):
    """dockerd 28 and 29 with one container on docker0."""

    comm = "dockerd"
    _CONTAINER: ClassVar = {"iptables": "172.17.0.2", "ip6tables": "fd00:d0c::242:ac11:2"}

    def start(self) -> None:
        """As its class says."""
        for tool in TOOLS:
            for chain in ("DOCKER-USER", *_DOCKER_CHAINS):
                self.write(tool, "-w", "-N", chain, may_fail=True)
            for chain in _DOCKER_CHAINS:
                self.write(tool, "-w", "-F", chain)
            for line in (
                "DOCKER-FORWARD -j DOCKER-CT",
                "DOCKER-FORWARD -j DOCKER-INTERNAL",
                "DOCKER-FORWARD -j DOCKER-BRIDGE",
                "DOCKER-FORWARD -i docker0 -j ACCEPT",
                "DOCKER-BRIDGE -o docker0 -j DOCKER",
                "DOCKER-CT -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
                f"DOCKER -d {self._CONTAINER[tool]} ! -i docker0 -o docker0 -p udp --dport {_RANGE} -j ACCEPT",
                "DOCKER ! -i docker0 -o docker0 -j DROP",
            ):
                self.write(tool, "-w", "-A", *line.split())
        self.network()

    def tick(self) -> None:
        """It never looks."""

    def network(self) -> None:
        """A network is made: both jumps are deleted and inserted, one command after the other."""
        for tool in TOOLS:
            for chain in ("DOCKER-FORWARD", "DOCKER-USER"):
                if self.read(tool, "-w", "-C", "FORWARD", "-j", chain) is not None:
                    self.write(tool, "-w", "-D", "FORWARD", "-j", chain, may_fail=True)
                self.write(tool, "-w", "-I", "FORWARD", "-j", chain)
