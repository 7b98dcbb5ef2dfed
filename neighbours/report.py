"""What came of it, for people and programs: docs/neighbours.json, and the tables in docs/neighbours.md.

Laws: what was not measured now stays as it was, also what another process keeps in the same folder meanwhile; nothing
is left out because it looks bad.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from bench import machine
from bench.figures import median
from lab.node import BackendName
from neighbours.actions import NEIGHBOURS
from neighbours.actions.stage import Action, Neighbour
from neighbours.measure import PLACES, RATE, Run
from neighbours.shielded import DROPS, Shielded

BEGIN, BEGIN_SHIELD = "<!-- made by make neighbours -->", "<!-- made by make neighbours: the shield -->"
END = "<!-- end -->"
HEAD = (
    "| program | action | backend | runs | what it did to our rules | right again after: median, worst | "
    "passed FORWARD: with, without | DOCKER-USER | mangle |\n|---|---|---|---|---|---|---|---|---|\n"
)
HEAD_SHIELD = (
    "| program | action | backend | sent: with the shield, without | a second | passed a `[[port]]`: with, without | "
    "a `[[forward]]` |\n|---|---|---|---|---|---|---|\n"
)
FOR_GOOD, ALWAYS, NOTHING = "for good", "accepted above", "nothing"


def _key(neighbour: Neighbour, action: Action, backend: BackendName) -> str:
    return f"{neighbour.name} / {action.name} / {backend}"


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured of one action: runs with nodewalld and without, those with the shield and without, or both."""

    neighbour: Neighbour
    action: Action
    backend: BackendName
    guarded: Sequence[Run] = ()
    alone: Sequence[Run] = ()
    shielded: Shielded | None = None

    @property
    def key(self) -> str:
        """What tells it from others."""
        return _key(self.neighbour, self.action, self.backend)

    def kept(self) -> dict[str, Any]:
        """As it stands in the file."""
        name = self.neighbour.name + (" (played)" if self.neighbour.played else "")
        row: dict[str, Any] = {"program": name, "action": self.action.name, "backend": self.backend}
        if self.guarded:
            exposed = [run.exposed_ms for run in self.guarded if run.exposed_ms is not None]
            row |= {
                "runs": len(self.guarded),
                "did": did(self.guarded),
                "complains": any(run.complaint for run in self.guarded),
                "exposed_ms": [round(value, 1) for value in sorted(exposed)],
                "with": {place: _passed_with(self.guarded, place) for place in PLACES},
                "without": {place: _passed(self.alone, place) for place in PLACES},
            }
        if self.shielded:
            row["shield"] = self.shielded.kept()
        return row


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


def keep(rows: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Add rows, or parts of them, by `Row.key`, to neighbours.json and to the tables in neighbours.md."""
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        file, page = folder / "neighbours.json", folder / "neighbours.md"
        content: dict[str, Any] = json.loads(file.read_text())["rows"] if file.exists() else {}
        content |= {key: content.get(key, {}) | row for key, row in rows.items()}
        order = [_key(n, a, b) for n in NEIGHBOURS.values() for a in n.actions for b in get_args(BackendName)]
        kept = {"machine": machine.described(), "rows": {key: content[key] for key in order if key in content}}
        _replace(file, json.dumps(kept, indent=1) + "\n")
        text = page.read_text() if page.exists() else ""
        for begin, made in ((BEGIN, table(kept)), (BEGIN_SHIELD, shield_table(kept))):
            start, found, rest = text.partition(begin)
            text = start + f"{begin}\n\n{made}\n{END}" + (rest.partition(END)[2] if found else "\n")
        _replace(page, text)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Nobody else keeps anything there meanwhile."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(file: Path, text: str) -> None:
    """Whole or not at all, whenever this is ended."""
    new = file.with_name(f".{file.name}.new")
    new.write_text(text)
    new.replace(file)


def table(kept: dict[str, Any]) -> str:
    """All rows as a table in Markdown, with a line about the machine."""
    facts = kept["machine"]
    told = (
        f"Kernel {facts['kernel']}, iptables {facts['iptables']}, {facts['cores']} cores ({facts['processor']}); "
        f"{RATE:,.0f} packets a second to each of the three places, so a packet is about a millisecond."
    )
    return f"{told}\n\n{HEAD}" + "".join(line(row) for row in kept["rows"].values() if "runs" in row)


def shield_table(kept: dict[str, Any]) -> str:
    """The same of what the shield carries, with a line that has it all together."""
    rows = [row for row in kept["rows"].values() if "shield" in row]
    sums = []
    for side in ("with", "without"):
        sent = sum(row["shield"][side]["sent"] for row in rows)
        sums.append((sent, sum(sum(row["shield"][side]["passed"].values()) for row in rows)))
    told = (
        f"In all {sums[0][1]:,} of {sums[0][0]:,} packets passed with the shield, and {sums[1][1]:,} of {sums[1][0]:,} "
        "without it."
    )
    return f"{told}\n\n{HEAD_SHIELD}" + "".join(map(shield_line, rows))


def shield_line(row: dict[str, Any]) -> str:
    """One row of it."""
    sides = [row["shield"][side] for side in ("with", "without")]
    sent = "; ".join(f"{side['sent']:,}" for side in sides)
    rate = f"{min(side['a_second'] for side in sides):,}"
    passed = ("; ".join(f"{side['passed'][name]:,}" for side in sides) for name in DROPS)
    return f"| {' | '.join((row['program'], row['action'], row['backend'], sent, rate, *passed))} |\n"


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
