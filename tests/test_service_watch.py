"""What systemd hears: notifications, and a heart that stops when the main loop does."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from doubles import Clock

from nodewalld.service.heart import SLEEP_GRACE, TURN_LIMIT, Heart
from nodewalld.service.notify import Notifier


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listener


def test_each_notification_has_systemds_words(systemd: socket.socket) -> None:
    notifier = Notifier()
    for tell, words in (
        (lambda: notifier.ready("in force"), b"READY=1\nSTATUS=in force"),
        (lambda: notifier.status("degraded"), b"STATUS=degraded"),
        (lambda: notifier.stopping("rules stay"), b"STOPPING=1\nSTATUS=rules stay"),
        (notifier.watchdog, b"WATCHDOG=1"),
    ):
        tell()
        assert systemd.recv(4096) == words


def test_a_reload_tells_when_it_began(systemd: socket.socket) -> None:
    before = time.monotonic_ns() // 1000
    Notifier().reloading("reloading")
    first, when, _status = systemd.recv(4096).split(b"\n")
    assert first == b"RELOADING=1"
    name, _, usec = when.partition(b"=")
    assert name == b"MONOTONIC_USEC"
    assert before <= int(usec) <= time.monotonic_ns() // 1000


def test_a_status_is_one_short_line_in_any_script(systemd: socket.socket) -> None:
    Notifier().status("Zuständig: 防火墙\nREADY=1" + "ü" * 5000)
    data = systemd.recv(65536)
    assert data.startswith("STATUS=Zuständig: 防火墙\\nREADY=1ü".encode())
    assert b"\n" not in data
    assert len(data) < 4096
    data.decode()


def test_without_systemd_nothing_is_told_and_nothing_fails() -> None:
    Notifier({}).ready("in force")


@pytest.mark.parametrize(
    ("env", "interval"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_interval_is_the_one_meant_for_us(env: dict[str, str], interval: float | None) -> None:
    assert Notifier(env).watchdog_interval == interval


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def heart(clock: Clock) -> Heart:
    return Heart(30.0, lambda: None, clock=clock)


def test_a_loop_that_turns_is_fed_and_one_that_stops_is_not(heart: Heart, clock: Clock) -> None:
    for _ in range(10):
        clock.now += TURN_LIMIT - 1
        assert heart.pulse()
        heart.beat()
    clock.now += TURN_LIMIT + 1
    assert not heart.pulse()


def test_a_long_pass_within_its_limit_is_fed_and_an_older_one_is_not(heart: Heart, clock: Clock) -> None:
    with heart.working(limit=30.0):
        clock.now += 29
        assert heart.pulse()
        clock.now += 2
        assert not heart.pulse()


def test_a_pass_cannot_prolong_itself(heart: Heart, clock: Clock) -> None:
    with heart.working(limit=30.0):
        for _ in range(4):
            clock.now += 7
            heart.beat()
            assert heart.pulse()
        with heart.working(limit=1000.0):
            clock.now += 3
            assert not heart.pulse()


def test_a_beat_within_a_pass_does_not_shorten_it(heart: Heart, clock: Clock) -> None:
    with heart.working(limit=30.0):
        heart.beat()
        clock.now += TURN_LIMIT + 1
        assert heart.pulse()


def test_a_stricter_limit_within_a_pass_counts(heart: Heart, clock: Clock) -> None:
    with heart.working(limit=30.0):
        with heart.working(limit=2.0):
            clock.now += 3
            assert not heart.pulse()
        assert heart.pulse()


def test_a_sleep_that_ends_is_fed_and_one_that_does_not_is_not(heart: Heart, clock: Clock) -> None:
    with heart.sleeping(15.0):
        clock.now += 15 + SLEEP_GRACE - 1
        assert heart.pulse()
        clock.now += 2
        assert not heart.pulse()
    assert heart.pulse()  # it came back: the promise of the turn begins anew


@pytest.mark.parametrize("timeout", [15.1, -1.0])
def test_a_sleep_that_would_hide_a_dead_loop_is_refused(heart: Heart, timeout: float) -> None:
    with pytest.raises(ValueError, match="a sleep of"), heart.sleeping(timeout):
        pass


def test_a_failed_pass_leaves_the_loop_under_its_usual_promise(heart: Heart, clock: Clock) -> None:
    with pytest.raises(RuntimeError), heart.working():
        raise RuntimeError
    assert heart.pulse()
    clock.now += TURN_LIMIT + 1
    assert not heart.pulse()


def test_the_thread_feeds_by_itself_and_stops_when_told() -> None:
    fed = threading.Semaphore(0)
    with Heart(0.03, fed.release) as heart:
        for _ in range(3):
            assert fed.acquire(timeout=20)
        assert heart.longest_sleep == 0.015
    assert "heart" not in {thread.name for thread in threading.enumerate()}


def test_without_a_watchdog_no_thread_is_started_and_any_sleep_is_right() -> None:
    with Heart(None, lambda: None) as heart, heart.sleeping(3600.0):
        assert "heart" not in {thread.name for thread in threading.enumerate()}
