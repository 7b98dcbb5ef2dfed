"""The command line: `python -m bench [--scale full|quick|tiny] [--only ROW,...] [--long] [--out FOLDER]`."""

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.report import Report
from bench.results import SCALES
from bench.rows import LONG, ROWS
from bench.stage import Stage
from lab.node import missing
from lab.waiting import LabError

DOCS = Path(__file__).resolve().parent.parent / "docs"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report; 0 when everything could be measured, whether or not the goals are met."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measures nodewalld beside the tools, in throw-away network namespaces. Needs root.",
        epilog=f"Rows: {', '.join((*ROWS, *LONG))}. A whole run at full scale is kept in docs/.",
    )
    parser.add_argument("--scale", choices=SCALES, default="full", help="how much is measured (full)")
    parser.add_argument("--quick", action="store_const", const="quick", dest="scale", help="the same as --scale quick")
    parser.add_argument("--only", metavar="ROW,...", default="", help="these rows and no others")
    parser.add_argument("--long", action="store_true", help="the endurance run instead")
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="keep the results there")
    options = parser.parse_args(argv)
    rows = LONG if options.long else ROWS
    chosen = [name for name in options.only.split(",") if name] or list(rows)
    if unknown := [name for name in chosen if name not in ROWS | LONG]:
        parser.error(f"no row {unknown[0]!r}; there are {', '.join((*ROWS, *LONG))}")
    if lacking := missing():
        print(f"The bench builds network namespaces, for which it lacks {', '.join(lacking)}.", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    whole = options.scale == "full" and not options.only
    keep = options.out or (DOCS if whole else None)
    return _measure(chosen, options.scale, keep)


def _measure(chosen: Sequence[str], scale: str, keep: Path | None) -> int:
    report, stage, begun = Report(scale), Stage(), time.monotonic()
    print(report.head())
    try:
        for name in chosen:
            row_begun = time.monotonic()
            try:
                outcome = (ROWS | LONG)[name](stage, SCALES[scale])
            except LabError as error:
                report.failed(name, str(error))
                print(f"✗ {name} could not be measured: {error}", file=sys.stderr)
                continue
            print(report.add(name, outcome, time.monotonic() - row_begun), flush=True)
    except KeyboardInterrupt:
        print("\nStopped. The nodes and all that ran in them are gone.", file=sys.stderr)
        return 130
    finally:
        stage.close()
    print(report.foot(time.monotonic() - begun))
    if keep:
        report.keep(keep)
        print(f"Kept in {keep}.")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
