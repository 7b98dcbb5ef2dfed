"""The command line: `python -m neighbours [--runs N] [--only TEXT,...] [--backend ...] [--part ...] [--out FOLDER]`."""

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import get_args

from lab.node import BackendName, missing
from lab.waiting import LabError
from neighbours.actions import NEIGHBOURS
from neighbours.actions.stage import Action, Neighbour, Stage
from neighbours.measure import alone, configuration, guarded
from neighbours.report import Row, keep, line, shield_line
from neighbours.shielded import shielded
from neighbours.war import HEAD, fought

DOCS = Path(__file__).resolve().parent.parent / "docs"
_FEW = 3  # runs without nodewalld, and with the shield: what they show does not vary


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and keep; 0 when everything could be measured."""
    parser = argparse.ArgumentParser(
        prog="python -m neighbours",
        description="Measures what other programs do to our rules, in throw-away network namespaces. Needs root.",
        epilog=f"Programs: {'; '.join(NEIGHBOURS)}.",
    )
    parser.add_argument("--runs", type=int, default=20, help="runs of each action with nodewalld (20)")
    parser.add_argument("--only", default="", metavar="TEXT,...", help="programs whose name contains one of these")
    parser.add_argument("--backend", choices=get_args(BackendName), help="only this one")
    parser.add_argument("--part", choices=PARTS, help="only this one of the two tables")
    parser.add_argument("--out", type=Path, default=DOCS, metavar="FOLDER", help="keep the results there (docs)")
    parser.add_argument(
        "--war", type=float, metavar="SECONDS", help="so long a war with Felix instead, told and not kept"
    )
    options = parser.parse_args(argv)
    parts = [part for part in options.only.split(",") if part]
    chosen = [each for each in NEIGHBOURS.values() if not parts or any(part in each.name for part in parts)]
    if not chosen:
        parser.error(f"no program {options.only!r}; there are {'; '.join(NEIGHBOURS)}")
    if lacking := missing():
        print(f"Nodes are network namespaces, for which this lacks {', '.join(lacking)}.", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    if options.war:
        print(HEAD, end="", flush=True)
        for backend in (options.backend,) if options.backend else get_args(BackendName):
            for position in ("early", "first"):
                print(fought(backend, position, options.war), end="", flush=True)
        return 0
    begun, failed = time.monotonic(), 0
    measures = [PARTS[part] for part in PARTS if options.part in (None, part)]
    for neighbour in chosen:
        for backend in (options.backend,) if options.backend else get_args(BackendName):
            for row in measured(neighbour, backend, measures, options.runs):
                failed += row is None
                if row:
                    keep({row.key: row.kept()}, options.out)
    print(f"Kept in {options.out}; {time.monotonic() - begun:.0f} seconds.")
    return 1 if failed else 0


def repairs(stage: Stage, neighbour: Neighbour, action: Action, runs: int) -> Row:
    """What it does to our rules, how soon these are right again, and what passes meanwhile."""
    backend = stage.node.backend
    without = alone(stage, action, min(runs, _FEW))
    with guarded(stage, configuration(backend)) as guard:
        row = Row(neighbour, action, backend, guard.runs(action, runs), without)
    print(line(row.kept()), end="", flush=True)
    return row


def shield(stage: Stage, neighbour: Neighbour, action: Action, runs: int) -> Row:
    """What passes the drops that the shield carries, with it and without."""
    row = Row(neighbour, action, stage.node.backend, shielded=shielded(stage, action, min(runs, _FEW)))
    print(shield_line(row.kept()), end="", flush=True)
    return row


Part = Callable[[Stage, Neighbour, Action, int], Row]
PARTS: dict[str, Part] = {"repairs": repairs, "shield": shield}


def measured(neighbour: Neighbour, backend: BackendName, parts: Sequence[Part], runs: int) -> Iterator[Row | None]:
    """These parts of everything that it does, on one node; None for what could not be measured, which is told."""
    where = neighbour.name
    try:
        with neighbour.stage(backend) as stage:
            for action, part in product(neighbour.does(backend), parts):
                where = f"{neighbour.name}, {action.name}"
                try:
                    yield part(stage, neighbour, action, runs)
                except LabError as error:
                    print(f"✗ {where}, {backend}: {error}", file=sys.stderr)
                    yield None
    except LabError as error:
        print(f"✗ {where}, {backend}: {error}", file=sys.stderr)
        yield None


if __name__ == "__main__":
    sys.exit(main())
