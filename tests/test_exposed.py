"""What `status` says of a day: how often something was open, for how long, and by whom."""

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from nodewalld.core.events import Culprit, Event, Kind, Process
from nodewalld.core.exposed import add_up
from nodewalld.service.history import History

NOW = datetime(2026, 1, 2, 12, tzinfo=UTC)
DAY = timedelta(days=1)


def repair(ago: float, exposed_ms: float | None, comm: str = "") -> Event:
    """A repair that ended so many seconds ago."""
    by = Culprit(2, "iptables", (Process(1, comm),)) if comm else None
    return Event(
        time=NOW - timedelta(seconds=ago), kind=Kind.REPAIR, what="put back the jump", exposed_ms=exposed_ms, by=by
    )


def test_several_repairs_of_one_disturbance_count_once() -> None:
    found = add_up([repair(10, 20.0, "sh"), repair(10, 15.0, "sh"), repair(9.999, 2.0, "dockerd")], NOW - DAY)
    assert (found.count, found.total_ms, found.longest_ms) == (1, 21.0, 21.0)
    assert found.by == ("sh", "dockerd")


def test_apart_they_add_up() -> None:
    found = add_up([repair(50, 20.0), repair(40, 1.5), repair(30, None)], NOW - DAY)
    assert (found.count, found.total_ms, found.longest_ms, found.by) == (2, 21.5, 20.0, ())


def test_of_what_began_before_the_day_only_the_rest_counts() -> None:
    day = DAY.total_seconds()
    found = add_up([repair(day + 1, 500.0), repair(day - 1, 5000.0)], NOW - DAY)
    assert (found.count, found.total_ms) == (1, 1000.0)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0.1, 10_000)), max_size=8))
def test_the_whole_is_no_more_than_its_parts_and_no_less_than_the_longest(parts: list[tuple[float, float]]) -> None:
    found = add_up([repair(ago, ms) for ago, ms in parts], NOW - DAY)
    lengths = [ms for _, ms in parts]
    assert max(lengths, default=0.0) - 0.01 <= found.longest_ms <= found.total_ms + 0.01
    assert found.total_ms <= sum(lengths) + 0.01


def test_the_history_tells_from_when_it_knows() -> None:
    history = History(size=2)
    assert history.exposures(NOW).since == NOW - DAY
    history.add(repair(100, 1000.0))
    found = history.exposures(NOW)
    assert (found.since, found.count, found.total_ms) == (NOW - timedelta(seconds=101), 1, 1000.0)
    for _ in range(2):
        history.add(repair(50, None))
    assert history.exposures(NOW).since == NOW - timedelta(seconds=50)
    assert history.exposures(NOW).to_json() == {
        "since": "2026-01-02T11:59:10.000000Z",
        "count": 0,
        "total_ms": 0.0,
        "longest_ms": 0.0,
        "by": [],
    }
