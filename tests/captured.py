"""The captured rulesets, and how one is put in force beside what is there, as its program would."""

from pathlib import Path

from lab.node import TOOLS, Node

CAPTURES = Path(__file__).resolve().with_name("captures")


def restore(node: Node, family: str, text: str) -> None:
    """Put rules in force beside those that are there, as iptables-restore takes them."""
    node.run([f"{TOOLS[family]}-{node.backend}-restore", "-w", "--noflush"], stdin=text)


def add_capture(node: Node, stem: str) -> None:
    """The same with both families of a capture; "{backend}" in its stem stands for the node's."""
    for file in sorted(CAPTURES.glob(stem.format(backend=node.backend) + ".v[46].*")):
        restore(node, "ipv6" if ".v6." in file.name else "ipv4", file.read_text())
