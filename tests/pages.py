"""docs/examples.md as data: for each example its table of packets, and the commands that are typed by hand.

The page is the truth that the tests hold to, so that what users read was seen. A section is named by its file in
etc/examples. Its table has a row for each attempt: who, to what, and how it ends in each state of the node. The first
state is the node as it is; the last is nodewalld with the example; those between are reached, one after the other, by
the section's blocks of commands ("```sh STATE").
"""

import re
from pathlib import Path
from typing import NamedTuple

from packets import dial

from lab.layout import (
    ALLOWED,
    BEYOND,
    CLUSTER_NODE,
    LOOPBACK,
    NEIGHBOUR,
    NODE,
    POD1,
    REMOTE_POD,
    STRANGER,
    STRANGER_2,
    WEB_SERVICE,
    Address,
)
from lab.traffic import Probe, Protocol, Verdict

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "etc/examples"
PAGE = ROOT / "docs/examples.md"
NODEWALLD = "nodewalld"

SOURCES = {
    "stranger": STRANGER,
    "office": STRANGER_2,
    "private host": ALLOWED,
    "cluster node": CLUSTER_NODE,
    "neighbour": NEIGHBOUR,
    "remote pod": REMOTE_POD,
}
"""Who is played by the client, by one of its addresses."""
INSIDE = {"node": "node", "pod": "pod1", "server": "beyond", "container": "web"}
"""Who is a namespace of its own."""
PLACES = {
    "node": NODE,
    "loopback": LOOPBACK,
    "pod": POD1,
    "Service": WEB_SERVICE,
    "server": BEYOND,
    "mapped server": Address("192.0.2.2", "2001:db8:a::2"),
    "neighbour": NEIGHBOUR,
}


class Row(NamedTuple):
    """One attempt, how it ends in each state (IPv4, IPv6), and the number of the note that explains a difference."""

    source: str
    to: str
    ends: dict[str, tuple[str, str]]
    note: str

    def probe(self, family: str) -> Probe:
        """The attempt in one family."""
        place, port, protocol = _target(self.to)
        if self.source in SOURCES:
            return dial(SOURCES[self.source], family, PLACES[place], port, protocol)
        return Probe(INSIDE[self.source], (PLACES[place].of(family), port), "", protocol)


class Section(NamedTuple):
    """What the page says about one example: `typed` are the commands that lead to each state, in their order."""

    name: str
    states: list[str]
    rows: list[Row]
    typed: dict[str, str]
    notes: dict[str, str]


_TARGET = re.compile(r"(?P<place>[A-Za-z ]+) (?P<port>\d+)/(?P<protocol>tcp|udp)(?: \(.*\))?")
_BLOCK = re.compile(r"^```sh (?P<state>.+)\n(?P<text>(?:.*\n)*?)```$", re.MULTILINE)
_NOTE = re.compile(r"^(?P<number>\d+)\. (?P<text>.+)$", re.MULTILINE)


def _target(text: str) -> tuple[str, int, Protocol]:
    found = _TARGET.fullmatch(text)
    assert found, f"{text!r} is no target: PLACE PORT/PROTOCOL"
    protocol: Protocol = "tcp" if found["protocol"] == "tcp" else "udp"
    return found["place"], int(found["port"]), protocol


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _ends(cell: str) -> tuple[str, str]:
    first, _, second = cell.partition("/")
    return first.strip(), (second or first).strip()


def section(name: str) -> Section:
    """One example's section."""
    parts = dict(re.findall(r"^## (\S+)\n((?:(?!^## ).*\n?)*)", PAGE.read_text(), flags=re.MULTILINE))
    text = parts[name]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    head = _cells(lines[0])
    states = [title for title in head[2:] if title != "note"]
    rows = []
    for cells in map(_cells, lines[2:]):
        ends = {state: _ends(cell) for state, cell in zip(states, cells[2:], strict=False)}
        rows.append(Row(cells[0], cells[1], ends, cells[-1] if head[-1] == "note" else ""))
    typed = {block["state"]: block["text"] for block in _BLOCK.finditer(text)}
    return Section(name, states, rows, typed, {note["number"]: note["text"] for note in _NOTE.finditer(text)})


def sections() -> list[str]:
    """The names of all sections that have a table of packets."""
    return re.findall(r"^## (\S+)$", PAGE.read_text(), flags=re.MULTILINE)


def compared(rows: list[Row], state: str, seen: list[tuple[Verdict, Verdict]]) -> str:
    """The attempts that ended otherwise than the page says, side by side; nothing when all is as it says."""
    lines = [
        f"{row.source:14} {row.to:36} {' / '.join(row.ends[state]):22} {' / '.join(ended)}"
        for row, ended in zip(rows, seen, strict=True)
        if row.ends[state] != tuple(map(str, ended))
    ]
    title = f"{'from':14} {'to':36} {'expected':22} seen"
    return "\n".join([f"{state}, IPv4 / IPv6:", title, *lines]) if lines else ""
