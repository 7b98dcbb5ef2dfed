"""The command line: `python -m neighbours [--runs N] [--only TEXT,...] [--backend nft|legacy] [--out FOLDER]`."""

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from lab.node import BackendName, LabError, missing
from neighbours.actions import NEIGHBOURS
from neighbours.actions.stage import Neighbour
from neighbours.measure import alone, guarded
from neighbours.report import Row, keep, line
from neighbours.war import fought

DOCS = Path(__file__).resolve().parent.parent / "docs"
_ALONE = 3  # runs without nodewalld: what they show does not vary


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
        for backend in (options.backend,) if options.backend else get_args(BackendName):
            for position in ("early", "first"):
                print(fought(backend, position, options.war), flush=True)
        return 0
    begun, failed = time.monotonic(), 0
    for neighbour in chosen:
        for backend in (options.backend,) if options.backend else get_args(BackendName):
            rows, failures = measured(neighbour, backend, options.runs)
            failed += failures
            keep(rows, options.out)
    print(f"Kept in {options.out}; {time.monotonic() - begun:.0f} seconds.")
    return 1 if failed else 0


def measured(neighbour: Neighbour, backend: BackendName, runs: int) -> tuple[list[Row], int]:
    """Everything that it does, on one node; and how many actions could not be measured, which are told."""
    rows, failed = [], 0
    with neighbour.stage(backend) as stage:
        for action in neighbour.does(backend):
            try:
                without = alone(stage, action, min(runs, _ALONE))
                with guarded(stage) as guard:
                    row = Row(neighbour, action, backend, guard.runs(action, runs), without)
            except LabError as error:
                failed += 1
                print(f"✗ {neighbour.name}, {action.name}, {backend}: {error}", file=sys.stderr)
                continue
            rows.append(row)
            print(line(row.kept()), end="", flush=True)
    return rows, failed


if __name__ == "__main__":
    sys.exit(main())
