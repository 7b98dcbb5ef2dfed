"""The second table of docs/neighbours.md: a flood that the shield holds back from all; and how rows are kept.

What the shield must show is measured by `make neighbours` for every action; here for a flush, on each backend.
"""

import fcntl
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from lab.node import BackendName
from lab.waiting import LabError
from neighbours.actions import NEIGHBOURS
from neighbours.measure import PLACES, Run
from neighbours.report import BEGIN_SHIELD, END, HEAD, HEAD_SHIELD, Row, keep, shield_table
from neighbours.shielded import DROPS, shielded

pytestmark = pytest.mark.neighbours

DOCS = Path(__file__).resolve().parent.parent / "docs"
PERSON = NEIGHBOURS["a person"]
FLUSH = next(action for action in PERSON.actions if action.name == "iptables -F, every table")


def rows_of(folder: Path) -> dict[str, Any]:
    rows: dict[str, Any] = json.loads((folder / "neighbours.json").read_text())["rows"]
    return rows


@pytest.mark.kernel
def test_a_flush_lets_packets_pass_without_the_shield_and_none_with_it(
    laboratory: None, backend: BackendName, tmp_path: Path
) -> None:
    with PERSON.stage(backend) as stage:
        row = Row(PERSON, FLUSH, backend, shielded=shielded(stage, FLUSH, 2))
    found = row.kept()["shield"]
    assert found["with"]["passed"] == dict.fromkeys(DROPS, 0)
    assert all(found["without"]["passed"][name] > 0 for name in DROPS), found
    assert min(side["sent"] for side in found.values()) > 2000
    # Both tables have the row, whichever part of it was kept first.
    keep({row.key: row.kept()}, tmp_path)
    run = Run(dict.fromkeys(PLACES, 0), frozenset())
    keep({row.key: Row(PERSON, FLUSH, backend, [run], [run]).kept()}, tmp_path)
    assert rows_of(tmp_path)[row.key]["shield"] == found
    lines = [line for line in (tmp_path / "neighbours.md").read_text().splitlines() if FLUSH.name in line]
    assert [line.count("|") for line in lines] == [
        HEAD.splitlines()[0].count("|"),
        HEAD_SHIELD.splitlines()[0].count("|"),
    ]
    assert f"0; {found['without']['passed']['port']:,}" in lines[1]


@pytest.mark.kernel
def test_where_nothing_passes_anyhow_nothing_is_measured(laboratory: None) -> None:
    with PERSON.stage("nft") as stage:
        stage.tools(f"-t raw -A PREROUTING -p udp --dport {DROPS['forward']} -j DROP")
        with pytest.raises(LabError, match="nothing that a forward should drop passes without us"):
            shielded(stage, FLUSH, 1)


def test_the_page_has_what_was_measured_and_nothing_passed_the_shield() -> None:
    rows = {key: row["shield"] for key, row in rows_of(DOCS).items() if "shield" in row}
    assert rows
    assert {key for key, row in rows.items() if any(row["with"]["passed"].values())} == set()
    flushes = [row for key, row in rows.items() if "iptables -F" in key]
    assert all(row["without"]["passed"][name] > 0 for row in flushes for name in DROPS)
    page = (DOCS / "neighbours.md").read_text()
    content = json.loads((DOCS / "neighbours.json").read_text())
    assert page.split(BEGIN_SHIELD)[1].split(END)[0].strip() == shield_table(content).strip()


def test_rows_that_another_process_keeps_meanwhile_are_not_lost(tmp_path: Path) -> None:
    sides = {
        side: {"runs": 3, "sent": 9, "a_second": 3, "passed": dict.fromkeys(DROPS, 0)} for side in ("with", "without")
    }
    ours, theirs = (
        {f"a person / {name} / nft": {"program": "a person", "action": name, "backend": "nft", "shield": sides}}
        for name in ("iptables -F, every table", "iptables -F; -X, every table")
    )
    held = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    keeper = threading.Thread(target=keep, args=(ours, tmp_path))
    keeper.start()
    keeper.join(0.3)
    assert keeper.is_alive()
    (tmp_path / "neighbours.json").write_text(json.dumps({"rows": theirs}))
    os.close(held)
    keeper.join(20)
    assert rows_of(tmp_path) == ours | theirs
    assert sorted(file.name for file in tmp_path.iterdir()) == ["neighbours.json", "neighbours.md"]
