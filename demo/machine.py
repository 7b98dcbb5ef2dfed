"""The proof that a demo leaves no trace: of its node, and on the rules of the machine it ran on.

Law: only reading. Listing legacy rules would create the tables that it lists, so only those that are there already are
looked at.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lab.node import Node

_COUNTERS = re.compile(r" \[\d+:\d+\]$", re.MULTILINE)


def own_rules() -> dict[str, str]:
    """Rules of both backends and the names of all sets, as this machine has them, without counters."""
    rules = {
        "nft list ruleset": _printed("nft", "-s", "list", "ruleset"),
        "ipset list": _printed("ipset", "list", "-name"),
    }
    for tool, names in (("iptables", "ip_tables_names"), ("ip6tables", "ip6_tables_names")):
        path = Path("/proc/net") / names
        for table in sorted(path.read_text().split()) if path.exists() else []:
            saved = _printed(f"{tool}-legacy-save", "-t", table)
            lines = (line for line in saved.splitlines() if not line.startswith("#"))
            rules[f"{tool}-legacy-save -t {table}"] = _COUNTERS.sub("", "\n".join(lines))
    return rules


def _printed(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout


@dataclass(frozen=True, slots=True)
class Traces:
    """What a node consists of now: its processes by number and start, its network namespaces, its folder.

    Namespaces live as long as a process or a mount holds them, and all mounts of a node are within its own; their
    inode numbers are used again soon, so that a process in "the same" namespace may be anybody's.
    """

    processes: frozenset[tuple[int, str]]
    networks: int
    directory: Path

    def left(self) -> list[str]:
        """What is still there, in words; empty when all has gone."""
        found = [f"process {pid}" for pid, start in sorted(self.processes) if _start(pid) == start]
        return found + [f"folder {self.directory}"] * self.directory.exists()


def traces(node: Node) -> Traces:
    """What must be gone when this node is closed."""
    namespace = _pid_namespace(node.pid)
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    inside = frozenset((pid, _start(pid)) for pid in pids if namespace and _pid_namespace(pid) == namespace)
    return Traces(inside, len(node.namespaces), node.directory)


def _pid_namespace(pid: int) -> int:
    """The inode of a process's pid namespace; 0 when it has ended."""
    try:
        return Path(f"/proc/{pid}/ns/pid").stat().st_ino
    except OSError:
        return 0


def _start(pid: int) -> str:
    """When a process was started, in ticks since boot; "" when it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
