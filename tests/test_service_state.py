"""The state folder: what can't be read is absent, what can't be written is no disaster; and the history."""

import os
import stat
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from nodewalld.core.events import Event, Kind
from nodewalld.service.history import History
from nodewalld.service.state import StateFolder


def test_what_was_written_is_read_and_for_nobody_else(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "state")
    assert folder.write("last", {"generation": 3})
    assert folder.read("last") == {"generation": 3}
    assert stat.S_IMODE((tmp_path / "state" / "last.json").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["last.json"]


def test_what_was_never_written_is_absent_without_a_word(tmp_path: Path) -> None:
    with capture_logs() as logs:
        assert StateFolder(tmp_path / "nowhere").read("last") is None
    assert logs == []


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"null", b"\xff\xfe{}", b"[" * 100_000],
    ids=["empty", "half", "list", "null", "bytes", "deep"],
)
def test_damaged_state_is_absent_with_a_warning(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "last.json").write_bytes(content)
    with capture_logs() as logs:
        assert StateFolder(tmp_path).read("last") is None
    assert [entry["log_level"] for entry in logs] == ["warning"]


def test_unreadable_state_is_absent_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "last.json").mkdir()
    with capture_logs() as logs:
        assert StateFolder(tmp_path).read("last") is None
    assert [entry["log_level"] for entry in logs] == ["warning"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_costs_the_new_state_and_not_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = StateFolder(tmp_path)
    folder.write("last", {"generation": 1})
    real = os.open

    def full(path: os.PathLike[str], flags: int, mode: int = 0o777) -> int:
        return real("/dev/full" if str(path).endswith(".new") else path, flags & ~os.O_TRUNC, mode)

    monkeypatch.setattr(os, "open", full)
    with capture_logs() as logs:
        assert not folder.write("last", {"generation": 2})
    assert "No space left" in logs[0]["event"]
    assert StateFolder(tmp_path).read("last") == {"generation": 1}


def test_a_folder_that_cannot_be_made_is_no_disaster(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with capture_logs() as logs:
        assert not StateFolder(tmp_path / "file" / "state").write("last", {})
    assert [entry["log_level"] for entry in logs] == ["error"]


def test_a_crash_in_the_middle_of_a_write_does_not_stop_the_next_one(tmp_path: Path) -> None:
    (tmp_path / ".last.json.new").write_bytes(b'{"a much longer value that was never finis')
    folder = StateFolder(tmp_path)
    assert folder.write("last", {})
    assert folder.read("last") == {}


def test_removed_state_is_absent(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path)
    folder.write("last", {})
    assert folder.remove("last")
    assert folder.remove("last")
    assert folder.read("last") is None


def event(number: int, kind: Kind = Kind.REPAIR) -> Event:
    return Event(time=datetime(2026, 1, 1, tzinfo=UTC), kind=kind, what=f"event {number}")


def test_the_ring_forgets_and_the_counters_do_not() -> None:
    history = History(size=3)
    for number in range(5):
        history.add(event(number))
    history.add(event(5, Kind.RELOAD))
    assert [one.what for one in history.last()] == ["event 3", "event 4", "event 5"]
    assert [one.what for one in history.last(1)] == ["event 5"]
    assert history.last(0) == ()
    assert len(history.last(99)) == 3
    assert history.count(Kind.REPAIR) == 5
    assert history.last_repair == event(4)


def test_the_last_repair_outlives_its_place_in_the_ring() -> None:
    history = History(size=1)
    history.add(event(1))
    history.add(event(2, Kind.RELOAD))
    assert history.last_repair == event(1)


def test_a_follower_gets_the_past_once_and_then_everything_in_order() -> None:
    history = History()
    history.add(event(0))
    history.add(event(1))
    follower = history.follow(1, tick=20)
    assert [one["what"] for one in next(follower) or []] == ["event 1"]
    writer = threading.Thread(target=lambda: [history.add(event(number)) for number in range(2, 50)])
    writer.start()
    assert [next(follower)["what"] for _ in range(48)] == [f"event {number}" for number in range(2, 50)]
    writer.join()


def test_a_quiet_history_ticks() -> None:
    follower = History().follow(tick=0.01)
    assert next(follower) == []
    assert next(follower) is None


def test_a_slow_follower_misses_what_has_left_the_ring_and_holds_up_nobody() -> None:
    history = History(size=2)
    follower = history.follow(tick=20)
    next(follower)
    for number in range(10):
        history.add(event(number))
    assert [next(follower)["what"] for _ in range(2)] == ["event 8", "event 9"]
