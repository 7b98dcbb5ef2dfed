"""The players behind `lab.rivals`: run within the node, under the name of whom they play.

Laws: every write is one process of iptables, as theirs is; what only they would know (chains, comments) is theirs,
letter for letter; nobody knows of nodewalld. Standard input says what to do now, a line each; each is answered with the
number of writes so far, and with every place that was taken by them.
"""

import json
import os
import re
import select
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lab.rivals import POD1, PODS, PORTS

TOOLS = ("iptables", "ip6tables")


class Played(ABC):
    """What they have in common: tools that are counted when they write, and a timetable."""

    comm: str

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self._spec = spec
        self._clock = float(spec["clock"])
        self._wrote = 0
        self._takes: list[tuple[float, str, str, str]] = []
        self._due = float("inf")
        Path("/proc/self/comm").write_text(self.comm)

    @abstractmethod
    def start(self) -> None:
        """What it does when it is started."""

    @abstractmethod
    def tick(self) -> None:
        """What it does when it is time."""

    def due_in(self, seconds: float) -> None:
        """Have `tick` called after so many of its seconds."""
        self._due = time.monotonic() + seconds / self._clock

    def read(self, *words: str) -> str | None:
        """What a tool prints; None when it fails."""
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        return done.stdout if done.returncode == 0 else None

    def write(self, *words: str, text: str | None = None, may_fail: bool = False) -> None:
        """Have a tool change the rules."""
        done = subprocess.run(words, input=text, capture_output=True, text=True, check=False)
        if done.returncode and not may_fail:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr}\n{text or ''}")
        self._wrote += 1

    def chain(self, tool: str, table: str, chain: str) -> list[str]:
        """The rules of a chain, without "-A CHAIN"."""
        printed = self.read(tool, "-w", "-t", table, "-S", chain) or ""
        head = f"-A {chain} "
        return [line.removeprefix(head) for line in printed.splitlines() if line.startswith(head)]

    def serve(self) -> None:
        """Do what standard input says, and what is due, until it ends."""
        os.set_blocking(0, False)
        buffer = b""
        while True:
            if select.select([0], [], [], max(0.0, min(self._due - time.monotonic(), 3600.0)))[0]:
                data = os.read(0, 4096)
                if not data:
                    return
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    word, *more = line.decode().split()
                    getattr(self, word)(*more)
                    print(json.dumps({"writes": self._wrote, "takes": self._takes}), flush=True)
            elif time.monotonic() >= self._due:
                self._due = float("inf")
                self.tick()

    def rest(self) -> None:
        """Do nothing; the answer tells of the writes."""
        return


# --- kube-proxy


class KubeProxy(Played):
    """kube-proxy 1.26 with three NodePorts by UDP."""

    comm = "kube-proxy"
    _NEW = "-m conntrack --ctstate NEW "
    _JUMPS = (
        (
            "filter",
            "INPUT",
            "EXTERNAL-SERVICES",
            f'{_NEW}-m comment --comment "kubernetes externally-visible service portals"',
        ),
        (
            "filter",
            "FORWARD",
            "EXTERNAL-SERVICES",
            f'{_NEW}-m comment --comment "kubernetes externally-visible service portals"',
        ),
        ("filter", "INPUT", "NODEPORTS", '-m comment --comment "kubernetes health check service ports"'),
        ("filter", "FORWARD", "SERVICES", f'{_NEW}-m comment --comment "kubernetes service portals"'),
        ("filter", "OUTPUT", "SERVICES", f'{_NEW}-m comment --comment "kubernetes service portals"'),
        ("filter", "FORWARD", "FORWARD", '-m comment --comment "kubernetes forwarding rules"'),
        ("filter", "INPUT", "PROXY-FIREWALL", f'{_NEW}-m comment --comment "kubernetes load balancer firewall"'),
        ("filter", "OUTPUT", "PROXY-FIREWALL", f'{_NEW}-m comment --comment "kubernetes load balancer firewall"'),
        ("filter", "FORWARD", "PROXY-FIREWALL", f'{_NEW}-m comment --comment "kubernetes load balancer firewall"'),
        ("nat", "OUTPUT", "SERVICES", '-m comment --comment "kubernetes service portals"'),
        ("nat", "PREROUTING", "SERVICES", '-m comment --comment "kubernetes service portals"'),
        ("nat", "POSTROUTING", "POSTROUTING", '-m comment --comment "kubernetes postrouting rules"'),
    )
    _CANARY_TABLES = ("mangle", "nat", "filter")
    _CANARY = "KUBE-PROXY-CANARY"

    def start(self) -> None:
        """As its class says."""
        self.sync()
        self._hatch()

    def _hatch(self) -> None:
        for tool in TOOLS:
            for table in self._CANARY_TABLES:
                if self.read(tool, "-w", "-t", table, "-S", self._CANARY) is None:
                    self.write(tool, "-w", "-t", table, "-N", self._CANARY)
        self.due_in(30.0)

    def tick(self) -> None:
        """As its class says."""
        if any(self.read(tool, "-w", "-t", "mangle", "-S", self._CANARY) is None for tool in TOOLS):
            self.sync()
        self._hatch()

    def sync(self) -> None:
        """Jumps where they are missing, then all in one restore for each family."""
        for tool in TOOLS:
            for table, chain, name, match in self._JUMPS:
                self._ensure(tool, table, chain, f"KUBE-{name}", match)
            for table in ("filter", "nat"):
                self.read(f"{tool}-save", "-t", table)
            self.write(f"{tool}-restore", "-w", "5", "--noflush", "--counters", text=self._whole(tool))

    def _ensure(self, tool: str, table: str, chain: str, name: str, match: str) -> None:
        if self.read(tool, "-w", "-t", table, "-S", name) is None:
            self.write(tool, "-w", "-t", table, "-N", name, may_fail=True)
        words = [*re.sub(r'"([^"]*)"', lambda found: found[1].replace(" ", "\0"), match).split(), "-j", name]
        words = [word.replace("\0", " ") for word in words]
        if self.read(tool, "-w", "-t", table, "-C", chain, *words) is None:
            self.write(tool, "-w", "-t", table, "-I", chain, *words)

    @staticmethod
    def _whole(tool: str) -> str:
        pod = POD1[tool] if tool == "iptables" else f"[{POD1[tool]}]"
        lines = ["*filter", *(f":KUBE-{name} - [0:0]" for name in _FILTER_CHAINS)]
        lines += ["-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP"]
        rule = '-A KUBE-FORWARD -m comment --comment "kubernetes forwarding'
        lines += [f'{rule} rules" -m mark --mark 0x00004000/0x00004000 -j ACCEPT']
        lines += [f'{rule} conntrack rule" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT', "COMMIT", "*nat"]
        names = [f"{kind}-{port}" for port in PORTS for kind in ("EXT", "SVC", "SEP")]
        lines += [f":KUBE-{name} - [0:0]" for name in ("SERVICES", "NODEPORTS", "POSTROUTING", "MARK-MASQ", *names)]
        lines += ["-A KUBE-POSTROUTING -m mark ! --mark 0x00004000/0x00004000 -j RETURN"]
        lines += ["-A KUBE-POSTROUTING -j MARK --xor-mark 0x00004000"]
        masquerade = '-m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully'
        lines += [f"-A KUBE-POSTROUTING {masquerade}", "-A KUBE-MARK-MASQ -j MARK --or-mark 0x00004000"]
        for port in PORTS:
            told = f'-m comment --comment "shop/{port}:p"'
            lines += [
                f"-A KUBE-NODEPORTS {told} -m udp -p udp --dport {port} -j KUBE-EXT-{port}",
                f"-A KUBE-EXT-{port} -j KUBE-MARK-MASQ",
                f"-A KUBE-EXT-{port} -j KUBE-SVC-{port}",
                f"-A KUBE-SVC-{port} -j KUBE-SEP-{port}",
                f"-A KUBE-SEP-{port} {told} -m udp -p udp -j DNAT --to-destination {pod}:{port}",
            ]
        last = '-m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain"'
        lines += [f"-A KUBE-SERVICES {last} -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS", "COMMIT"]
        return "\n".join(lines) + "\n"


_FILTER_CHAINS = ("SERVICES", "EXTERNAL-SERVICES", "FORWARD", "NODEPORTS", "PROXY-FIREWALL")


# --- Felix


class Felix(Played):
    """Felix 3.26.4 with the top-level rules of a capture, whose own chains must be loaded already.

    Options: `mode` ("Insert" or "Append"), `capture` (a path without ".v4.save").
    """

    comm = "calico-felix"
    _REFRESH = 90.0
    _AFTER_WRITE = (1.0, 2.0, 4.0)

    def __init__(self, spec: Mapping[str, Any]) -> None:
        super().__init__(spec)
        self._insert = spec["mode"] == "Insert"
        self._wanted = {
            tool: _top_level(Path(f"{spec['capture']}.v{number}.save"))
            for tool, number in zip(TOOLS, "46", strict=True)
        }
        self._looks: list[float] = []

    def start(self) -> None:
        """As its class says."""
        self.refresh()

    def refresh(self) -> None:
        """Look at everything, and write what is not as it wants it."""
        wrote = self._wrote
        for tool in TOOLS:
            self._apply(tool)
        if self._wrote > wrote:
            self._looks = list(self._AFTER_WRITE)
        self.due_in(self._looks.pop(0) if self._looks else self._REFRESH)

    def tick(self) -> None:
        """As its class says."""
        self.refresh()

    def _apply(self, tool: str) -> None:
        for table, chains in self._wanted[tool].items():
            saved = _rules(self.read(f"{tool}-save", "-t", table) or "")
            moved: dict[str, list[str]] = {}
            for chain, (first, last) in chains.items():
                lead, end = (first, last) if self._insert else ([], first + last)
                moved[chain] = list(_moved(chain, saved.get(chain, []), lead, end))
            if lines := [line for each in moved.values() for line in each]:
                text = "\n".join([f"*{table}", *lines, "COMMIT", ""])
                self._takes += [(time.time(), tool, table, chain) for chain, each in moved.items() if each]
                self.write(f"{tool}-restore", "--noflush", "--verbose", "-w", "10", text=text)


def _moved(chain: str, present: Sequence[str], lead: Sequence[str], end: Sequence[str]) -> Iterator[str]:
    """The lines that delete by value and write again what is not in its place; none when all is."""
    ours = [rule for rule in present if "cali:" in rule]
    right = [*present[: len(lead)]] == [*lead] and [*present[len(present) - len(end) :]] == [*end]
    if right and len(ours) == len(lead) + len(end):
        return
    yield from (f"-D {chain} {rule}" for rule in ours)
    yield from (f"-I {chain} {rule}" for rule in reversed(lead))
    yield from (f"-A {chain} {rule}" for rule in end)


def _rules(saved: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in saved.splitlines():
        text = re.sub(r"^\[\d+:\d+\] ", "", line)
        if text.startswith("-A "):
            _, chain, rule = text.split(" ", 2)
            found.setdefault(chain, []).append(rule)
    return found


def _top_level(capture: Path) -> dict[str, dict[str, tuple[list[str], list[str]]]]:
    """By table and chain: Calico's rules in built-in chains, those that lead and those that end."""
    found: dict[str, dict[str, tuple[list[str], list[str]]]] = {}
    for part in re.split(r"^\*", capture.read_text(), flags=re.MULTILINE)[1:]:
        chains = {}
        for chain, rules in _rules(part).items():
            ours = [rule for rule in rules if "cali:" in rule]
            if chain.isupper() and ours:
                chains[chain] = (
                    [rule for rule in ours if "-j cali-" in rule],
                    [rule for rule in ours if "-j cali-" not in rule],
                )
        if chains:
            found[part.split("\n")[0]] = chains
    return found


# --- kube-router


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
            words = _words(rule)
            if self.read(tool, "-w", "-S", words[-1]) is None:
                self.write(tool, "-w", "-N", words[-1])
            rules = self.chain(tool, "filter", chain)
            places = [number for number, text in enumerate(rules, start=1) if text == rule]
            if places[:1] != [1]:
                self.write(tool, "-w", "-I", chain, "1", *words)
                places = [place + 1 for place in places]
            for place in sorted(places, reverse=True):
                if place != 1:
                    self.write(tool, "-w", "-D", chain, str(place))
        if self._ACCEPT not in self.chain(tool, "filter", "FORWARD"):
            self.write(tool, "-w", "-A", "FORWARD", *_words(self._ACCEPT))

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


def _words(rule: str) -> list[str]:
    return [part.strip('"') for part in re.findall(r'"[^"]*"|\S+', rule)]


# --- flannel


class Flannel(Played):
    """flannel's two sets of rules, of which one rule that is missing makes it append all again."""

    comm = "flanneld"
    _TOLD = '-m comment --comment "flanneld'

    def _rules(self, tool: str) -> list[tuple[str, str, str]]:
        pods = PODS[tool]
        forward, masq = f'{self._TOLD} forward"', f'{self._TOLD} masq"'
        return [
            ("filter", "FORWARD", f"{forward} -j FLANNEL-FWD"),
            ("filter", "FLANNEL-FWD", f"-s {pods} {forward} -j ACCEPT"),
            ("filter", "FLANNEL-FWD", f"-d {pods} {forward} -j ACCEPT"),
            ("nat", "POSTROUTING", f"{masq} -j FLANNEL-POSTRTG"),
            ("nat", "FLANNEL-POSTRTG", f"-s {pods} -d {pods} {masq} -j RETURN"),
        ]

    def start(self) -> None:
        """As its class says."""
        self.tick()

    def tick(self) -> None:
        """As its class says."""
        for tool in TOOLS:
            rules = self._rules(tool)
            if all(
                self.read(tool, "-w", "-t", table, "-C", chain, *_words(rule)) is not None
                for table, chain, rule in rules
            ):
                continue
            for table, chain in (("filter", "FLANNEL-FWD"), ("nat", "FLANNEL-POSTRTG")):
                if self.read(tool, "-w", "-t", table, "-S", chain) is None:
                    self.write(tool, "-w", "-t", table, "-N", chain)
            for table, chain, rule in rules:
                self.write(tool, "-w", "-t", table, "-D", chain, *_words(rule), may_fail=True)
                self.write(tool, "-w", "-t", table, "-A", chain, *_words(rule))
        self.due_in(5.0)


# --- Docker 28 and 29


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


_RANGE = f"{PORTS[0]}:{PORTS[-1]}"
_DOCKER_CHAINS = ("DOCKER", "DOCKER-BRIDGE", "DOCKER-CT", "DOCKER-FORWARD", "DOCKER-INTERNAL")

PLAYED: dict[str, type[Played]] = {
    "kube-proxy": KubeProxy,
    "felix": Felix,
    "kube-router": KubeRouter,
    "flannel": Flannel,
    "docker28": Docker28,
}


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    PLAYED[told["name"]](told).serve()
