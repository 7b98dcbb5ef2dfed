"""A burst is answered move by move; a war is slowed down, never given up, and forgotten when it is over."""

from nodewalld.core.pacing import BUSY_SECONDS, FIRST_WAIT, LAST_WAIT, WINDOW, Pacer
from nodewalld.core.words import Table

FORWARD = (Table.FILTER, "FORWARD")


def war(pacer: Pacer, seconds: int, start: float = 100.0) -> float:
    now = start
    for _ in range(seconds):
        now += 1.0 + pacer.wait(FORWARD, now + 1.0)
        pacer.moved(FORWARD, now)
    return now


def test_a_restart_of_a_neighbour_is_no_war() -> None:
    pacer = Pacer()
    for step in range(100):
        now = 100.0 + step * 0.02
        assert pacer.wait(FORWARD, now) == 0.0
        pacer.moved(FORWARD, now)
    assert not pacer.contests(102.0)


def test_a_chain_taken_back_second_after_second_is_contention_and_waits_double() -> None:
    pacer = Pacer()
    now = war(pacer, BUSY_SECONDS)
    assert pacer.wait(FORWARD, now) == FIRST_WAIT
    now += FIRST_WAIT
    assert pacer.wait(FORWARD, now) == 0.0
    pacer.moved(FORWARD, now)
    assert pacer.wait(FORWARD, now) == FIRST_WAIT * 2
    assert pacer.contests(now)[FORWARD].moves == BUSY_SECONDS + 1


def test_waits_end_at_a_limit_so_the_rule_is_never_given_up() -> None:
    pacer = Pacer()
    now = war(pacer, BUSY_SECONDS + 20)
    assert pacer.wait(FORWARD, now) == LAST_WAIT


def test_one_chain_s_war_does_not_slow_another() -> None:
    pacer = Pacer()
    now = war(pacer, BUSY_SECONDS)
    assert pacer.wait((Table.FILTER, "INPUT"), now) == 0.0


def test_peace_is_recognised_by_itself() -> None:
    pacer = Pacer()
    now = war(pacer, BUSY_SECONDS)
    later = now + WINDOW + FIRST_WAIT + 0.1
    assert not pacer.contests(later)
    assert pacer.wait(FORWARD, later) == 0.0
