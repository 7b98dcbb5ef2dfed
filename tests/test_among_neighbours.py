"""Every program of docs/neighbours.md does here what it does there, with nodewalld and without; and the war with Felix.

The page itself is made by `make neighbours`, which repeats each action; here each is done once, half of the programs
with each backend.
"""

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from lab.node import BackendName
from neighbours.actions import NEIGHBOURS
from neighbours.measure import PLACES, alone, configuration, guarded
from neighbours.report import ALWAYS, BEGIN, END, FOR_GOOD, HEAD, NOTHING, Row, table
from neighbours.war import FORWARD, war
from nodewalld.core.pacing import ROUNDS

pytestmark = pytest.mark.neighbours

DOCS = Path(__file__).resolve().parent.parent / "docs"
SCHEDULING = 4.0
"""Milliseconds from the kernel's events until a process that waits for them runs, all of a burst together."""
BACKENDS: tuple[BackendName, ...] = ("nft", "legacy")


def kept() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((DOCS / "neighbours.json").read_text())
    return content


def test_the_page_holds_everything_that_everybody_does_and_is_what_was_measured() -> None:
    wanted = [
        f"{neighbour.name} / {action.name} / {backend}"
        for neighbour in NEIGHBOURS.values()
        for backend in BACKENDS
        for action in neighbour.does(backend)
    ]
    assert sorted(kept()["rows"]) == sorted(wanted)
    page = (DOCS / "neighbours.md").read_text()
    assert page.split(BEGIN)[1].split(END)[0].strip() == table(kept()).strip()
    assert page.count(HEAD) == 1


def test_nothing_on_the_page_passes_for_good_with_nodewalld_but_what_is_meant_to() -> None:
    """Those are jumps that "early" leaves above: what they accept is accepted, and mangle is not concerned."""
    for key, row in kept()["rows"].items():
        accepted = [place for place in PLACES if row["with"][place] == ALWAYS]
        assert FOR_GOOD not in row["with"].values(), key
        assert not accepted or (
            accepted == ["FORWARD", "DOCKER-USER"] and row["program"].startswith(("Felix", "kube-r"))
        )


@pytest.mark.kernel
@pytest.mark.slow
@pytest.mark.parametrize("name", NEIGHBOURS)
def test_everybody_does_what_the_page_says(laboratory: None, name: str) -> None:
    neighbour = NEIGHBOURS[name]
    backend = BACKENDS[list(NEIGHBOURS).index(name) % 2]
    there = kept()["rows"]
    with neighbour.stage(backend) as stage:
        actions = {f"{name} / {action.name} / {backend}": action for action in neighbour.does(backend)}
        # What leaves our rules alone has nothing to show without us.
        without = {key: alone(stage, action, 1) for key, action in actions.items() if there[key]["did"] != NOTHING}
        with guarded(stage, configuration(backend)) as guard:
            rows = [Row(neighbour, a, backend, guard.runs(a, 1), without.get(key, ())) for key, a in actions.items()]
    # What the flush of one action leaves undone, because we are back before it is through, the next one does.
    steady = not any(row["complains"] for row in there.values() if row["program"] == name)
    for row in rows:
        here, wanted = row.kept(), there[row.key]
        if wanted["did"] == NOTHING and steady:
            assert here["did"] == NOTHING, row.key
        for place in PLACES:
            for side in ("with", "without") if row.alone else ("with",):
                words = [word for word in (here[side][place], wanted[side][place]) if isinstance(word, str)]
                assert words[:1] * 2 == words, (row.key, side, place, here, wanted)


@pytest.mark.kernel
def test_early_and_felix_in_insert_mode_leave_each_other_alone(laboratory: None, backend: BackendName) -> None:
    """Ten minutes of its refreshes, 150 times as fast; and it is at work all the time: a foreign rule is answered."""
    with war(backend, "early", clock=150.0) as between:
        end = between.until(lambda score: score.seconds > 4, 4.0)
        assert (end.repairs, end.writes, end.contended) == (0, 0, ())
        between.daemon.node.run("iptables -I FORWARD -p tcp --dport 9 -j DROP")
        answered = between.until(lambda score: score.writes > 0, 20.0)
        assert [len(answered.fronts[where].theirs) for where in FORWARD] == [1, 0]


@pytest.mark.kernel
def test_first_and_felix_in_insert_mode_fight_and_status_tells_of_it(laboratory: None, backend: BackendName) -> None:
    """In each family within three rounds, by a Felix that looks 0.2 s after a write; `make war` has ten minutes."""
    with war(backend, "first", clock=5.0) as between:
        told = between.until(lambda score: all(score.fronts[where].rounds for where in FORWARD), 30.0)
        rounds = {where: front.rounds for where, front in told.fronts.items()}
        assert rounds == dict.fromkeys(FORWARD, ROUNDS)
        for what in told.contended:
            assert "FORWARD" in what
            assert "calico-felix" in what or backend == "legacy"
            assert "ChainInsertMode: Append" in what
            assert "mangle" in what
        assert len(told.contended) == len(FORWARD)
        assert between.daemon.status()["state"] in {"enforcing", "degraded"}


@pytest.mark.kernel
def test_whenever_packets_passed_an_exposure_is_told(laboratory: None) -> None:
    """dockerd's start is a burst of some thirty commands: it displaces anew while the last time is put right.

    On nft. A legacy tool lets go of its lock, which is all that is heard of it, only after its rules are in force.
    """
    neighbour = NEIGHBOURS["dockerd 20.10"]
    (restart,) = (action for action in neighbour.actions if action.name == "dockerd restart")
    with neighbour.stage("nft") as stage, guarded(stage, configuration("nft")) as guard:
        runs = guard.runs(restart, 6)
    assert all(run.repairs for run in runs)
    assert median(run.untold_ms for run in runs) <= SCHEDULING  # a machine that others use stands still now and then
