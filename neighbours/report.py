"""What came of it, for people and programs: docs/neighbours.json, and the table in docs/neighbours.md.

Law: what was not measured now stays as it was; nothing is left out because it looks bad.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine
from bench.figures import median
from lab.node import BackendName
from neighbours.actions import NEIGHBOURS
from neighbours.actions.stage import Action, Neighbour
from neighbours.measure import PLACES, RATE, Run

BEGIN, END = "<!-- made by make neighbours -->", "<!-- end -->"
HEAD = (
    "| program | action | backend | runs | what it did to our rules | right again after: median, worst | "
    "passed FORWARD: with, without | DOCKER-USER | mangle |\n|---|---|---|---|---|---|---|---|---|\n"
)
FOR_GOOD, ALWAYS, NOTHING = "for good", "accepted above", "nothing"


@dataclass(frozen=True, slots=True)
class Row:
    """All runs of one action."""

    neighbour: Neighbour
    action: Action
    backend: BackendName
    guarded: Sequence[Run]
    alone: Sequence[Run]

    @property
    def key(self) -> str:
        """What tells it from others."""
        return f"{self.neighbour.name} / {self.action.name} / {self.backend}"

    def kept(self) -> dict[str, Any]:
        """As it stands in the file."""
        exposed = [run.exposed_ms for run in self.guarded if run.exposed_ms is not None]
        return {
            "program": self.neighbour.name + (" (played)" if self.neighbour.played else ""),
            "action": self.action.name,
            "backend": self.backend,
            "runs": len(self.guarded),
            "did": did(self.guarded),
            "complains": any(run.complaint for run in self.guarded),
            "exposed_ms": [round(value, 1) for value in sorted(exposed)],
            "with": {place: _passed_with(self.guarded, place) for place in PLACES},
            "without": {place: _passed(self.alone, place) for place in PLACES},
        }


def did(runs: Sequence[Run]) -> str:
    """What was done to our rules in any of the runs, in words: chains of others by name, ours as "our chains"."""
    found: dict[str, set[str]] = {}
    for table, chain, reason in sorted({repair for run in runs for repair in run.repairs}):
        where = f"{table} {'our chains' if chain.startswith('NODEWALL') else chain}"
        found.setdefault(
            "flushed" if reason in {"flushed", "missing"} and len(tables(runs)) > 1 else reason, set()
        ).add(table if len(tables(runs)) > 1 else where)
    words = [f"{reason}: {', '.join(sorted(places))}" for reason, places in sorted(found.items())]
    return "; ".join(words) or NOTHING


def tables(runs: Sequence[Run]) -> set[str]:
    """The tables in which anything was put right."""
    return {table for run in runs for table, _, _ in run.repairs}


def _passed(runs: Sequence[Run], place: str) -> str | list[int]:
    """How many packets passed in each run, or in a word that there is no end of it."""
    if any(place in run.always for run in runs):
        return ALWAYS
    if any(place in run.lost for run in runs):
        return FOR_GOOD
    return sorted(run.passed[place] for run in runs)


def _passed_with(runs: Sequence[Run], place: str) -> str | list[int]:
    """The same with nodewalld, whose rules stood where they should at the end: what still passes is meant to."""
    passed = _passed(runs, place)
    return ALWAYS if passed == FOR_GOOD else passed


def keep(rows: Sequence[Row], folder: Path) -> None:
    """Write neighbours.json, and the table in neighbours.md."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "neighbours.json"
    before: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"rows": {}}
    content = before["rows"] | {row.key: row.kept() for row in rows}
    order = [f"{n.name} / {a.name} / {b}" for n in NEIGHBOURS.values() for a in n.actions for b in ("nft", "legacy")]
    kept = {"machine": machine.described(), "rows": {key: content[key] for key in order if key in content}}
    file.write_text(json.dumps(kept, indent=1) + "\n")
    page = folder / "neighbours.md"
    text = page.read_text() if page.exists() else f"{BEGIN}\n{END}\n"
    start, _, rest = text.partition(BEGIN)
    page.write_text(start + f"{BEGIN}\n\n{table(kept)}\n{END}" + rest.partition(END)[2])


def table(kept: dict[str, Any]) -> str:
    """All rows as a table in Markdown, with a line about the machine."""
    facts = kept["machine"]
    told = (
        f"Kernel {facts['kernel']}, iptables {facts['iptables']}, {facts['cores']} cores ({facts['processor']}); "
        f"{RATE:,.0f} packets a second to each of the three places, so a packet is about a millisecond."
    )
    return f"{told}\n\n{HEAD}" + "".join(line(row) for row in kept["rows"].values())


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    exposed = row["exposed_ms"]
    again = f"{median(exposed):.0f} ms, {exposed[-1]:.0f} ms" if exposed else "-"
    what = row["did"] + ("; its command fails" if row["complains"] else "")
    places = (f"{_shown(row['with'][place])}; {_shown(row['without'][place])}" for place in PLACES)
    return (
        f"| {' | '.join((row['program'], row['action'], row['backend'], str(row['runs']), what, again, *places))} |\n"
    )


def _shown(passed: str | list[int]) -> str:
    """The word; or the median and the worst where they differ."""
    if isinstance(passed, str):
        return passed
    low, high = int(median(passed)), passed[-1]
    return str(high) if low == high else f"{low} to {high}"
