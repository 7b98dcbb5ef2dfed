"""kube-router: forces its jumps to number 1, reads the whole filter table, and some time later writes it back."""

import time
from typing import ClassVar

from lab.played.player import TOOLS, Played, words
from lab.rivals import POD1, PORTS


class KubeRouter(Played):
    """kube-router's network policies, as k3s has them."""

    comm = "kube-router"
    _TOP: ClassVar = {
        "INPUT": '-m comment --comment "kube-router netpol - 4IA2OSFRMVNDXBVV" -j KUBE-ROUTER-INPUT',
        "FORWARD": '-m comment --comment "kube-router netpol - TEMCG2JMHZYE7H7T" -j KUBE-ROUTER-FORWARD',
        "OUTPUT": '-m comment --comment "kube-router netpol - VEAAIY32XVBHCSCY" -j KUBE-ROUTER-OUTPUT',
    }
    _ACCEPT = (
        '-m comment --comment "KUBE-ROUTER rule to explicitly ACCEPT traffic that comply to network policies" '
        "-m mark --mark 0x20000/0x20000 -j ACCEPT"
    )
    _POD = "KUBE-POD-FW-4BDGZEWEU32YM75H"
    _BETWEEN = 0.05
    """Seconds from its save to its restore; with thousands of pods they are more."""

    def start(self) -> None:
        """As its class says."""
        self.sync()

    def tick(self) -> None:
        """As its class says."""
        self.sync()

    def sync(self) -> None:
        """Number 1 first, then the whole table."""
        for tool in TOOLS:
            self._force(tool)
            saved = self.read(f"{tool}-save", "-t", "filter") or ""
            time.sleep(self._BETWEEN / self._clock)
            self.write(f"{tool}-restore", "-w", "-T", "filter", text=self._edited(tool, saved))
        self.due_in(300.0)

    def _force(self, tool: str) -> None:
        for chain, rule in self._TOP.items():
            jump = words(rule)
            if self.read(tool, "-w", "-S", jump[-1]) is None:
                self.write(tool, "-w", "-N", jump[-1])
            rules = self.chain(tool, "filter", chain)
            places = [number for number, text in enumerate(rules, start=1) if text == rule]
            if places[:1] != [1]:
                self.write(tool, "-w", "-I", chain, "1", *jump)
                places = [place + 1 for place in places]
            for place in sorted(places, reverse=True):
                if place != 1:
                    self.write(tool, "-w", "-D", chain, str(place))
        if self._ACCEPT not in self.chain(tool, "filter", "FORWARD"):
            self.write(tool, "-w", "-A", "FORWARD", *words(self._ACCEPT))

    def _edited(self, tool: str, saved: str) -> str:
        own = (f":{self._POD}", f"-A {self._POD}", "-A KUBE-ROUTER-FORWARD")
        lines = [line for line in saved.splitlines() if not line.startswith((*own, "COMMIT", "#"))]
        told = "rule to jump traffic destined to POD name:web namespace: shop to chain " + self._POD
        pod = f"-A {self._POD}"
        lines.insert(1, f":{self._POD} - [0:0]")
        lines += [
            f'-A KUBE-ROUTER-FORWARD -d {POD1[tool]} -m comment --comment "{told}" -j {self._POD}',
            f"{pod} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
            f"{pod} -p udp -m multiport --dports {','.join(map(str, PORTS))} -j MARK --set-xmark 0x10000/0x10000",
            f"{pod} -m mark ! --mark 0x10000/0x10000 -j REJECT",
            f"{pod} -j MARK --set-xmark 0x0/0x10000",
            f"{pod} -j MARK --set-xmark 0x20000/0x20000",
            "COMMIT",
        ]
        return "\n".join(lines) + "\n"
