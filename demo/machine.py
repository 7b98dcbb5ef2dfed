"""The proof that a demo leaves no trace: of its node, and on the rules of the machine it ran on.

Law: only reading. Listing legacy rules would create the tables that it lists, so only those that are there already are
looked at.
"""

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lab.node import Node

_KINDS = ("net", "mnt", "pid")
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
    """What a node consists of: its namespaces by inode, its folder, and how many processes run in it now."""

    namespaces: frozenset[int]
    networks: int
    processes: int
    directory: Path

    def left(self) -> list[str]:
        """What is still there, in words; empty when all has gone."""
        found = [f"process {pid}" for pid in _inside(self.namespaces)]
        return found + [f"folder {self.directory}"] * self.directory.exists()


def traces(node: Node) -> Traces:
    """What must be gone when this node is closed."""
    root = Path(f"/proc/{node.pid}")
    networks = {(root / "root/run/netns" / name).stat().st_ino for name in node.namespaces if name != "node"}
    own = {kind: (root / "ns" / kind).stat().st_ino for kind in _KINDS}
    namespaces = frozenset({*networks, *own.values()})
    return Traces(namespaces, len(networks) + 1, len(_inside(namespaces)), node.directory)


def _inside(namespaces: frozenset[int]) -> list[int]:
    """The processes in any of these namespaces."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                inodes = {os.stat(entry / "ns" / kind).st_ino for kind in _KINDS}
            except OSError:  # it has ended meanwhile
                continue
            if inodes & namespaces:
                found.append(int(entry.name))
    return found
