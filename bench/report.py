"""What was measured, for people and programs: lines while it goes on, a table at the end, and files in docs/.

Law: a row that was not measured is said to be missing; a goal that is not met is shown as plainly as one that is.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import machine
from bench.picture import drawn
from bench.results import Outcome, Result

BEGIN, END = "<!-- made by make bench -->", "<!-- end -->"
_HEAD = "| | what | figure | reference | ratio | goal |\n|---|---|---|---|---|---|\n"


class Report:
    """Collects outcomes."""

    def __init__(self, scale: str) -> None:
        self._scale = scale
        self._machine = machine.described() | {"load": f"{machine.load():.1f}"}
        self._rows: dict[str, dict[str, Any]] = {}
        self.failures: dict[str, str] = {}

    def head(self) -> str:
        """What is measured where."""
        return f"nodewalld beside the tools, scale {self._scale}; {_machine_line(self._machine)}\n"

    def failed(self, row: str, why: str) -> None:
        """A row could not be measured."""
        self.failures[row] = why

    def add(self, row: str, outcome: Outcome, seconds: float) -> str:
        """Take what a row yielded; returns it as lines of text."""
        self._rows[row] = {
            "scale": self._scale,
            "machine": self._machine,
            "seconds": round(seconds, 1),
            "results": [_kept(result) for result in outcome.results],
            "samples": {name: [round(each, 3) for each in sorted(values)] for name, values in outcome.samples.items()},
            "growth": {name: [[x, round(y, 4)] for x, y in points] for name, points in outcome.growth.items()},
        }
        lines = [_told(self._rows[row]["results"][n]) for n in range(len(outcome.results))]
        lines += [f"  {name}: {_points(points)}" for name, points in outcome.growth.items()]
        return "\n".join(lines)

    def foot(self, seconds: float) -> str:
        """The table, and how many goals are met."""
        results = _results(self._rows)
        met = sum(result["met"] for result in results)
        missing = f"; not measured: {', '.join(self.failures)}" if self.failures else ""
        return f"\n{table(self._rows)}\n{met} of {len(results)} goals met{missing}; {seconds:.0f} seconds"

    def keep(self, folder: Path) -> None:
        """Write bench.json, bench.svg and the table in bench.md; rows that were not measured now stay as they were."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "bench.json"
        rows: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
        rows |= self._rows
        file.write_text(json.dumps(rows, indent=1) + "\n")
        samples = {name: values for row in rows.values() for name, values in row["samples"].items()}
        growth = {name: points for row in rows.values() for name, points in row["growth"].items()}
        (folder / "bench.svg").write_text(drawn(samples, growth))
        page = folder / "bench.md"
        text = page.read_text() if page.exists() else f"{BEGIN}\n{END}\n"
        before, _, rest = text.partition(BEGIN)
        content = f"{BEGIN}\n\n{_machine_line(self._machine)}.\n\n{table(rows)}\n"
        page.write_text(before + content + END + rest.partition(END)[2])


def table(rows: dict[str, dict[str, Any]]) -> str:
    """All results as a table in Markdown."""
    lines = []
    for result in _results(rows):
        beside = ("", "")
        if result["reference"] is not None:
            reference = f"{_number(result['reference'])} {result['unit']} ({result['reference_what']})"
            beside = (reference, _number(result["measured"]))
        cells = (
            "met" if result["met"] else "**not met**",
            result["what"],
            f"{_number(result['figure'])} {result['unit']}",
            *beside,
            result["goal"],
        )
        lines.append(f"| {' | '.join(cells)} |")
    return _HEAD + "\n".join(lines) + "\n"


def _results(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [result for row in rows.values() for result in row["results"]]


def _kept(result: Result) -> dict[str, Any]:
    return asdict(result) | {"met": result.met}


def _told(result: dict[str, Any]) -> str:
    figure = f"{_number(result['figure'])} {result['unit']}"
    if result["reference"] is not None:
        figure += f" beside {_number(result['reference'])} ({result['reference_what']}): {_number(result['measured'])}"
    more = ", ".join(f"{name} {_number(value)}" for name, value in result["more"].items())
    facts = "; ".join(filter(None, (figure, f"goal {result['goal']}", f"n = {result['events']:,}", more)))
    return f"{'✓' if result['met'] else '✗'} {result['row']}: {result['what']}\n    {facts}"


def _points(points: Any) -> str:
    return ", ".join(f"{_number(y)} at {x:,}" for x, y in points)


def _number(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _machine_line(facts: dict[str, str]) -> str:
    return (
        f"kernel {facts['kernel']}, iptables {facts['iptables']}, Python {facts['python']}, {facts['cores']} cores "
        f"({facts['processor']}), {facts['memory']}; load before the run {facts['load']}"
    )
