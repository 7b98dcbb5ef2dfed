"""The bench: every row measures, at a tiny scale, and what it shows is what it measured."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from bench.crowd import sync
from bench.figures import fitted, median, percentile
from bench.picture import drawn
from bench.report import BEGIN, END, Report
from bench.results import Outcome, Result, compared
from bench.rows import LONG, ROWS

ROOT = Path(__file__).resolve().parent.parent
ALIKE = {"hot-open", "hot-crowded", "idle", "repair-growth", "cost-growth"}  # what they call, others call
SYSTEM = {"memory"}  # wants a Debian with firewalld: see tests/system/test_bench_memory.py


@pytest.mark.kernel
@pytest.mark.slow
@pytest.mark.parametrize(
    "rows",
    [["hot", "legacy", "exposure", "transaction", "sync"], ["check", "start", "reload", "beside", "shield"]],
)
def test_every_row_measures_something(laboratory: None, tmp_path: Path, rows: list[str]) -> None:
    command = [sys.executable, "-m", "bench", "--scale", "tiny", "--only", ",".join(rows), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    kept = json.loads((tmp_path / "bench.json").read_text())
    assert list(kept) == rows
    for row in rows:
        for result in kept[row]["results"]:
            assert result["figure"] >= 0
            assert result["figure"] > 0 or row == "exposure"
            assert result["reference"] is None or result["reference"] > 0
            assert result["what"] in done.stdout
    text = json.dumps(kept)
    assert os.uname().nodename not in text.replace(os.uname().sysname, "")
    assert str(ROOT) not in text
    table = (tmp_path / "bench.md").read_text()
    assert table.count("\n| ") == 1 + sum(len(kept[row]["results"]) for row in rows)


def test_every_row_is_tried_somewhere() -> None:
    here = (row for mark in test_every_row_measures_something.pytestmark for row in _rows(mark))
    assert {*here, *SYSTEM, *ALIKE} == set(ROWS)
    assert set(LONG) == {"endurance"}


def _rows(mark: pytest.Mark) -> list[str]:
    return [row for rows in mark.args[1] for row in rows] if mark.name == "parametrize" else []


def test_a_crowd_has_as_many_rules_as_it_was_asked_for() -> None:
    lines = sync(1000).splitlines()
    assert sum(line.startswith("-A ") for line in lines) == 1000
    assert sum(line.startswith(":KUBE-S") for line in lines) == 401
    assert sync(0) == ""


def test_percentiles_are_values_of_the_sample() -> None:
    sample = [float(n) for n in range(100, 0, -1)]
    assert (median(sample), percentile(sample, 99), percentile(sample, 100)) == (50.0, 99.0, 100.0)
    assert percentile([7.0], 99) == 7.0


def test_a_line_rises_only_beyond_chance_and_beyond_what_is_seen() -> None:
    rising = fitted([(float(n), 3.0 + 2.0 * n + (n % 2) * 0.1) for n in range(100)])
    assert rising.slope == pytest.approx(2.0, abs=0.01)
    assert rising.start == pytest.approx(3.0, abs=0.2)
    assert rising.rises(100.0, unseen=100.0)
    assert not rising.rises(100.0, unseen=300.0)
    noise = fitted([(float(n), (n * 7919) % 101) for n in range(100)])
    assert noise.error > 0
    assert not noise.rises(100.0, unseen=0.0)


def outcome(figure: float) -> Outcome:
    result = compared("hot", "what", figure, 10.0, unit="ms", limit=0.05, of="a tool", events=9)
    return Outcome([result], {"ours": [figure, 1.0]}, {"grows": [(0, 1.0), (1000, 2.0)]})


def test_a_goal_that_is_missed_is_shown_as_plainly_as_one_that_is_met() -> None:
    report = Report("full")
    assert "✓ hot: what" in report.add("hot", outcome(0.4), 1.0)
    assert "1 of 1 goals met" in report.foot(1.0)
    assert "✗ hot: what" in report.add("hot", outcome(0.6), 1.0)
    report.failed("legacy", "why")
    assert re.search(r"\*\*not met\*\* \| what \| 0.6 ms \| 10 ms \(a tool\) \| 0.06", report.foot(1.0))
    assert "0 of 1 goals met; not measured: legacy" in report.foot(1.0)


def test_a_figure_that_has_no_reference_is_held_against_its_limit() -> None:
    assert Result("memory", "what", 39.0, "MiB", "below 40", 39.0, 40.0).met
    assert not Result("memory", "what", 41.0, "MiB", "below 40", 41.0, 40.0).met


def test_what_is_kept_replaces_the_table_and_no_word_beside_it(tmp_path: Path) -> None:
    page = tmp_path / "bench.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for figure in (0.4, 0.6):
        report = Report("full")
        report.add("hot", outcome(figure), 1.0)
        report.keep(tmp_path)
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert text.count("**not met**") == 1


def test_rows_that_were_not_measured_now_are_kept(tmp_path: Path) -> None:
    for row in ("hot", "legacy"):
        report = Report("full")
        report.add(row, outcome(0.4), 1.0)
        report.keep(tmp_path)
    assert list(json.loads((tmp_path / "bench.json").read_text())) == ["hot", "legacy"]


def test_the_picture_shows_every_series_by_name() -> None:
    picture = drawn({"ours & theirs": [0.1, 0.2, 30.0]}, {"cost": [(0, 0.5), (1000, 4.0)]})
    root = ET.fromstring(picture)  # noqa: S314 - our own
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"ours & theirs", "cost", "0", "1,000"} <= set(words)
    lines = [element.get("points", "") for element in root.iter("{http://www.w3.org/2000/svg}polyline")]
    assert [len(points.split()) for points in lines] == [3, 2]
    heights = [float(point.split(",")[1]) for point in lines[1].split()]
    assert heights[0] > heights[1]  # more is higher
    assert ET.fromstring(drawn({}, {})) is not None  # noqa: S314


def test_an_unknown_row_is_refused_with_the_names_of_all() -> None:
    command = [sys.executable, "-m", "bench", "--only", "hut"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no row 'hut'; there are hot, " in done.stderr
