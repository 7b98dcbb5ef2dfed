"""A flood of repairs is told in a few sentences, and nothing of it is lost."""

from datetime import UTC, datetime, timedelta

from nodewalld.core.events import Culprit, Event, Kind, Reason
from nodewalld.core.summary import FIRST_FEW, LONGEST, QUIET, Summary
from nodewalld.core.words import Family, Table

START = datetime(2026, 11, 21, tzinfo=UTC)


def repair(seconds: float, comm: str = "dockerd") -> Event:
    return Event(
        time=START + timedelta(seconds=seconds),
        kind=Kind.REPAIR,
        what="put right the jump to NODEWALL-FORWARD",
        family=Family.IPV4,
        table=Table.FILTER,
        chain="FORWARD",
        reason=Reason.DISPLACED,
        entries=("forward/a",),
        by=Culprit(812, comm),
        exposed_ms=seconds,
    )


def flood(summary: Summary, number: int, step: float = 0.1, **more: str) -> list[Event]:
    return [told for i in range(number) for told in summary.take(repair(i * step, **more), i * step)]


def test_a_few_repairs_are_told_one_by_one() -> None:
    assert len(flood(Summary(), FIRST_FEW)) == FIRST_FEW
    assert Summary().due == float("inf")


def test_the_rest_of_a_burst_is_one_sentence_when_it_is_over() -> None:
    summary = Summary()
    told = flood(summary, FIRST_FEW + 27)
    assert len(told) == FIRST_FEW
    last = (FIRST_FEW + 26) * 0.1
    assert summary.due == last + QUIET
    (summed,) = summary.flush(last + QUIET)
    assert summed.sentence().startswith("27 more repairs in 2.6 s, all by dockerd; 27 of them in filter FORWARD (IPv4)")
    assert summed.exposed_ms == last
    assert summed.entries == ("forward/a",)
    assert summary.flush(last + 100) == ()


def test_a_burst_that_goes_on_is_told_of_in_time() -> None:
    summary = Summary()
    told = flood(summary, 300)
    counted = sum(1 if "more repairs" not in event.what else int(event.what.split()[0]) for event in told)
    kept = summary.flush(1000.0)
    counted += sum(int(event.what.split()[0]) if "more repairs" in event.what else 1 for event in kept)
    assert counted == 300
    assert len(told) <= FIRST_FEW + 30 / LONGEST + 1


def test_several_culprits_are_counted() -> None:
    summary = Summary()
    flood(summary, FIRST_FEW)
    summary.take(repair(1.3, "kubelet"), 1.3)
    summary.take(repair(1.4, "dockerd"), 1.4)
    summary.take(repair(1.5, "dockerd"), 1.5)
    (summed,) = summary.flush(10.0)
    assert "2 by dockerd, 1 by kubelet" in summed.what
    assert summed.by is None


def test_other_events_are_told_at_once_and_in_order() -> None:
    summary = Summary()
    flood(summary, FIRST_FEW + 2)
    reload = Event(time=START, kind=Kind.RELOAD, what="the configuration was reloaded")
    told = summary.take(reload, 1.5)
    assert [event.kind for event in told] == [Kind.REPAIR, Kind.RELOAD]


def test_after_a_quiet_time_repairs_are_told_one_by_one_again() -> None:
    summary = Summary()
    flood(summary, FIRST_FEW + 5)
    summary.flush(100.0)
    assert len(summary.take(repair(200.0), 200.0)) == 1
