"""The journal's native protocol against a real datagram socket, and the lines for people."""

import io
import os
import socket
import struct
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import structlog
from doubles import Terminal

from nodewalld.core.events import Culprit, Event, Kind, Process, Reason
from nodewalld.core.words import Family, Table
from nodewalld.service import journal

WHEN = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)
REPAIR = Event(
    time=WHEN,
    kind=Kind.REPAIR,
    what="put back the jump to NODEWALL-PREROUTING",
    family=Family.IPV4,
    table=Table.MANGLE,
    chain="PREROUTING",
    reason=Reason.FLUSHED,
    entries=("port/vault", "port/etcd"),
    by=Culprit(4711, "ev\x1b[31mil\nPRIORITY=0", (Process(4001, "dockerd"),)),
    exposed_ms=1.25,
    latency_ms=0.5,
)


class FakeJournal:
    """A socket as journald's, and a parser of what comes in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(20)

    def receive(self) -> dict[str, list[str]]:
        data, ancillary, _, _ = self.socket.recvmsg(1 << 20, socket.CMSG_SPACE(4))
        if ancillary:
            assert data == b""
            (fd,) = struct.unpack("i", ancillary[0][2])
            with os.fdopen(fd, "r+b") as file:
                with pytest.raises(OSError):
                    file.truncate(0)  # sealed, as journald demands
                data = os.pread(fd, 64 << 20, 0)
        return parse(data)


def parse(data: bytes) -> dict[str, list[str]]:
    """As journald does it: NAME=value lines, or NAME, a length, and so many bytes."""
    fields: dict[str, list[str]] = {}
    while data:
        line, _, rest = data.partition(b"\n")
        if b"=" in line:
            name, _, value = line.partition(b"=")
            data = rest
        else:
            name = line
            (length,) = struct.unpack_from("<Q", rest)
            value, data = rest[8 : 8 + length], rest[8 + length + 1 :]
            assert rest[8 + length : 9 + length] == b"\n"
        fields.setdefault(name.decode(), []).append(value.decode())
    return fields


@pytest.fixture(autouse=True)
def _unconfigured() -> Iterator[None]:
    yield
    structlog.reset_defaults()


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[FakeJournal]:
    fake = FakeJournal(tmp_path / "socket")
    journal.configure(True, path=fake.path)
    with fake.socket:
        yield fake


def test_an_event_has_its_sentence_and_its_fields(journald: FakeJournal) -> None:
    journal.announce(REPAIR)
    fields = journald.receive()
    assert fields["MESSAGE"] == [REPAIR.sentence()]
    assert fields["MESSAGE_ID"] == [journal.MESSAGE_IDS[Kind.REPAIR]]
    assert fields["SYSLOG_IDENTIFIER"] == ["nodewalld"]
    assert fields["PRIORITY"] == ["4"]
    told = {name.removeprefix("NODEWALLD_"): value for name, value in fields.items() if "NODEWALLD_" in name}
    assert told == {
        "KIND": ["repair"],
        "FAMILY": ["ipv4"],
        "TABLE": ["mangle"],
        "CHAIN": ["PREROUTING"],
        "REASON": ["flushed"],
        "RULE": ["port/vault", "port/etcd"],
        "BY_PID": ["4711"],
        "BY_COMM": [r"ev\x1b[31mil\nPRIORITY=0"],
        "BY_NAME": [r"ev\x1b[31mil\nPRIORITY=0"],
        "BY_PARENTS": ["dockerd (pid 4001)"],
        "EXPOSED_USEC": ["1250"],
        "LATENCY_USEC": ["500"],
    }


def test_an_exposure_of_nothing_is_told_and_an_unknown_one_is_not(journald: FakeJournal) -> None:
    journal.announce(Event(time=WHEN, kind=Kind.REPAIR, what="x", exposed_ms=0.0))
    fields = journald.receive()
    assert fields["NODEWALLD_EXPOSED_USEC"] == ["0"]
    assert "NODEWALLD_LATENCY_USEC" not in fields


@pytest.mark.parametrize("kind", list(Kind))
def test_every_kind_has_an_id_of_its_own_and_can_be_announced(journald: FakeJournal, kind: Kind) -> None:
    journal.announce(Event(time=WHEN, kind=kind, what="something"))
    (ident,) = journald.receive()["MESSAGE_ID"]
    assert len(ident) == 32
    assert int(ident, 16)
    assert list(journal.MESSAGE_IDS.values()).count(ident) == 1


def test_other_values_become_fields_and_lines_survive(journald: FakeJournal) -> None:
    structlog.get_logger().warning("two\nlines", path="a\nb=c\x07")
    fields = journald.receive()
    assert fields["MESSAGE"] == ["two\nlines"]
    assert fields["NODEWALLD_PATH"] == ["a\nb=c\\x07"]


def test_a_traceback_is_part_of_the_message(journald: FakeJournal) -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        structlog.get_logger().exception("It failed")
    fields = journald.receive()
    assert fields["MESSAGE"][0].startswith("It failed\nTraceback")
    assert fields["MESSAGE"][0].endswith("ValueError: broken")
    assert fields["PRIORITY"] == ["3"]


def test_an_entry_too_large_for_a_datagram_arrives_as_sealed_memory(journald: FakeJournal) -> None:
    text = "x" * (4 << 20)
    structlog.get_logger().info(text)
    assert journald.receive()["MESSAGE"] == [text]


def test_without_a_journal_nothing_fails_and_the_loss_is_told_later(tmp_path: Path) -> None:
    journal.configure(True, path=tmp_path / "socket")
    structlog.get_logger().info("lost")
    structlog.get_logger().info("lost too")
    fake = FakeJournal(tmp_path / "socket")
    structlog.get_logger().info("there")
    with fake.socket:
        fields = fake.receive()
    assert fields["MESSAGE"] == ["there"]
    assert fields["NODEWALLD_LOST"] == ["2"]


def test_a_journal_that_does_not_read_blocks_nobody(journald: FakeJournal) -> None:
    started = time.monotonic()
    for _ in range(2000):  # far more than a datagram queue takes
        structlog.get_logger().info("again")
    assert time.monotonic() - started < 20


def test_the_journal_is_found_by_device_and_inode(tmp_path: Path) -> None:
    fake = FakeJournal(tmp_path / "socket")
    with (tmp_path / "stream").open("w") as stream, fake.socket:
        status = os.fstat(stream.fileno())
        env = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        journal.configure(stream=stream, path=fake.path, env=env)
        structlog.get_logger().info("to the journal")
        assert fake.receive()["MESSAGE"] == ["to the journal"]
        journal.configure(stream=stream, path=fake.path, env={"JOURNAL_STREAM": "1:2"})
        structlog.get_logger().info("to the file")
    assert (tmp_path / "stream").read_text() == "to the file\n"


@pytest.mark.parametrize(
    ("stream", "env", "coloured"),
    [
        (Terminal(), {}, True),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {}, False),
    ],
)
def test_colour_is_for_terminals_whose_user_wants_it(stream: io.StringIO, env: dict[str, str], coloured: bool) -> None:
    journal.configure(stream=stream, env=env)
    journal.announce(REPAIR)
    assert ("\x1b[33m" in stream.getvalue()) is coloured
    assert "\x1b[31mil" not in stream.getvalue()
    assert REPAIR.sentence() in stream.getvalue()


def test_a_line_for_people_says_what_else_is_known() -> None:
    stream = io.StringIO()
    journal.configure(stream=stream, env={})
    structlog.get_logger().error("It failed", path="/x")
    structlog.get_logger().debug("unseen")
    assert stream.getvalue() == "error: It failed path=/x\n"


def test_a_closed_stderr_stops_nobody() -> None:
    stream = io.StringIO()
    journal.configure(stream=stream, env={})
    stream.close()
    structlog.get_logger().error("nobody hears")
