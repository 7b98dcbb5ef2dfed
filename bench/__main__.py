"""Measures, prints a table, and writes it as JSON: `python -m bench [--json FILE] [--count N]`.

Law: nothing is compared with another run, another day or another machine; a figure stands beside its reference.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lab.daemon import Daemon
from lab.node import BackendName, Node

CONFIG = """
[daemon]
resync = "1h"

[[port]]
name = "vault"
ports = [31002]
allow = ["10.90.0.7", "fd90::7"]
"""
FOREIGN = 100_000
_RULES_EACH = 4  # of a Service: its chain, its endpoints


@dataclass(frozen=True, slots=True)
class Row:
    """A figure beside its reference, both in `unit`s; `goal` is the highest ratio of the two that will do."""

    what: str
    value: float
    reference: float
    against: str
    goal: float
    unit: str = "ms"

    @property
    def ratio(self) -> float:
        """The figure as a multiple of its reference."""
        return self.value / self.reference


def main() -> int:
    """See the module; 0 whatever the figures are."""
    parser = argparse.ArgumentParser(prog="bench", description="nodewalld's figures, each beside its reference")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument("--count", type=int, default=200, help="disturbances for each figure")
    asked = parser.parse_args()
    rows = []
    for row in measure(asked.count):
        rows.append(row)
        print(_line(row), flush=True)
    if asked.json:
        told = {"machine": machine(), "rows": [asdict(row) | {"ratio": row.ratio} for row in rows]}
        asked.json.write_text(json.dumps(told, indent=2) + "\n")
    return 0


def _line(row: Row) -> str:
    met = "met" if row.ratio <= row.goal else "NOT MET"
    return (
        f"{row.what:62} {row.value:9.3f} {row.unit:4} {row.ratio:7.3f} x {row.against} "
        f"({row.reference:.3f}), goal {row.goal:g}: {met}"
    )


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    version = subprocess.run(["iptables", "-V"], capture_output=True, text=True, check=True).stdout.strip()
    return {
        "kernel": platform.release(),
        "iptables": version,
        "python": platform.python_version(),
        "cores": str(os.cpu_count()),
    }


def measure(count: int) -> Iterator[Row]:
    """Every row; the slow world last."""
    with Node("nft") as node:
        node.run("iptables-nft -t mangle -N MOVED; iptables-nft -t mangle -A OUTPUT -j MOVED; iptables-nft -N NOISE")
        with Daemon(node, CONFIG) as daemon:
            daemon.wait_ready()
            moved = _seconds(node, "reference", count)
            once, against = statistics.median(moved), "iptables-nft-restore that moves a jump"
            foreign = _seconds(node, "tool", count)
            yield Row("nft: deleted by iptables -> right again, median", _ms(foreign), once * 1e3, against, 0.05)
            yield Row("nft: the same, 99th percentile", _ms(foreign, 0.99), once * 1e3, against, 2.5)
            kept = _seconds(node, "raw", count)
            yield Row("nft: writer keeps its socket open, median", _ms(kept), once * 1e3, against, 0.05)
            yield Row("nft: the same, 99th percentile", _ms(kept, 0.99), once * 1e3, against, 0.1)
            empty = _cpu_per_noise(node, daemon, count)
            node.run(["iptables-nft-restore", "--noflush"], stdin=_many(FOREIGN), timeout=300)
            time.sleep(1)
            moved = _seconds(node, "reference", count)
            foreign = _seconds(node, "tool", count)
            once = statistics.median(moved)
            what = f"nft: {FOREIGN:,} foreign rules, deleted -> right again, median"
            yield Row(what, _ms(foreign), once * 1e3, against, 0.3)
            full = _cpu_per_noise(node, daemon, count)
            listed = _cpu_of_listing(node)
            what = f"CPU per foreign transaction elsewhere, {FOREIGN:,} foreign rules"
            yield Row(what, full * 1e3, listed * 1e3, "iptables-nft -S FORWARD (CPU)", 0.3)
            yield Row("the same, against no foreign rules", full * 1e3, empty * 1e3, "no foreign rules", 1.5)
            yield Row("resident memory", _resident(daemon), 40.0, "40 MiB", 1.0, "MiB")
            yield _start(node)
    with Node("legacy") as node:
        node.run("iptables-legacy -t raw -N MOVED; iptables-legacy -t raw -A OUTPUT -j MOVED")
        with Daemon(node, CONFIG) as daemon:
            daemon.wait_ready()
            moved = _seconds(node, "reference", count)
            foreign = _seconds(node, "tool", count)
            what, against = "legacy: the deleting tool's exit -> right again, median", "iptables-legacy-restore"
            yield Row(what, _ms(foreign), statistics.median(moved) * 1e3, against, 4.0)


def _seconds(node: Node, what: str, count: int) -> list[float]:
    backend: BackendName = node.backend
    command = [node.python(), "-m", "bench.worker", backend, what, str(count)]
    return list(json.loads(node.run(command, timeout=300).stdout))


def _ms(seconds: Sequence[float], share: float = 0.5) -> float:
    return sorted(seconds)[min(len(seconds) - 1, int(len(seconds) * share))] * 1e3


def _many(rules: int) -> str:
    """A nat table such as kube-proxy's: a chain for each Service, and nothing that leads there but one jump each."""
    chains = range(rules // _RULES_EACH)
    heads = [":THEIRS - [0:0]", *(f":SVC-{number:06} - [0:0]" for number in chains)]
    lines = [
        f"-A THEIRS -d 10.96.{n >> 8 & 255}.{n & 255} -p tcp --dport {n % 60000 + 1} -j SVC-{n:06}" for n in chains
    ]
    lines += [
        f"-A SVC-{number:06} -p tcp --dport {port} -j RETURN" for number in chains for port in range(1, _RULES_EACH)
    ]
    return "\n".join(("*nat", *heads, *lines, "COMMIT", ""))


def _cpu_per_noise(node: Node, daemon: Daemon, count: int) -> float:
    """Seconds of the daemon's CPU for one foreign transaction that does not concern it."""

    def used() -> int:
        return int(Path(f"/proc/{daemon.pid}/schedstat").read_text().split()[0])

    before = used()
    _seconds(node, "noise", count)
    return (used() - before) / 1e9 / count


def _cpu_of_listing(node: Node, count: int = 20) -> float:
    """Seconds of CPU of one `iptables-nft -S FORWARD`."""
    code = (
        "import resource, subprocess\n"
        f"for _ in range({count}): subprocess.run(['iptables-nft', '-S', 'FORWARD'], stdout=subprocess.DEVNULL)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        f"print((used.ru_utime + used.ru_stime) / {count})"
    )
    return float(node.run([node.python(), "-c", code]).stdout)


def _resident(daemon: Daemon) -> float:
    status = Path(f"/proc/{daemon.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def _start(node: Node) -> Row:
    """A second daemon's start, its rules already in the kernel, against that of an interpreter that does nothing."""
    begun = time.perf_counter()
    node.run([node.python(), "-c", "pass"])
    bare = time.perf_counter() - begun
    begun = time.perf_counter()
    with Daemon(node, CONFIG, name="second") as second:
        second.wait_ready()
        took = time.perf_counter() - begun
    return Row("start to READY, rules in the kernel", took * 1e3, (bare + 0.5) * 1e3, "python3 -c pass + 0.5 s", 1.0)


if __name__ == "__main__":
    sys.exit(main())
