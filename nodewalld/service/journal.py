"""The log: to the systemd journal in its native protocol, with fields; to anything else as lines for people.

Law: logging never stops or blocks the daemon. A journal that can't take an entry at once does not get it, and
is told with the next one how many were lost (NODEWALLD_LOST). What strangers choose (names of processes,
texts of rules) reaches no terminal and no field unescaped. Protocol:
https://systemd.io/JOURNAL_NATIVE_PROTOCOL/
"""

import array
import errno
import fcntl
import logging
import os
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import structlog

from nodewalld.core.events import Event, Kind, printable

SOCKET = Path("/run/systemd/journal/socket")

MESSAGE_IDS: Mapping[Kind, str] = {
    Kind.START: "1389db6425d0435ea70d994d2243d028",
    Kind.STOP: "093ec9a62cde4b3ca695938049bbff8a",
    Kind.REPAIR: "7e18e71c2cf944d0887af85b9184ab39",
    Kind.RELOAD: "b85f062b8f0e4b81a67b6a27b8ff8239",
    Kind.REFUSED: "5285265a83404af7990ad8eedda09205",
    Kind.CONTENTION: "9e7acea4c1d84138b08e3d5936b297e8",
    Kind.PEACE: "948f79dfc2eb454e8b7fcc01af6b1106",
    Kind.DEGRADED: "b65ee5b98b294d88a39d384869fd9c96",
    Kind.RECOVERED: "4450316f7ba5412bb77e1fb0b19ad4e6",
    Kind.REMOVE: "e89c6228f4c74869a7e35c1aa62e6093",
    Kind.SET: "88d3ae6a1b554e80bc21735e71595faa",
    Kind.NEIGHBOUR: "893007a157ce44688608ab05840697e6",
    Kind.HEALED: "28b6bb41e8a74d00a973f1591e6c3827",
}
"""One for ever: catalogs and people's filters refer to them."""

_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_COLOURS = {"debug": "2", "warning": "33", "error": "31", "critical": "1;31"}
_NAME_MAX = 64  # journald drops fields with longer names

Entry = MutableMapping[str, Any]


def announce(event: Event) -> None:
    """Log an event, with all its fields."""
    logger = structlog.get_logger("nodewalld")
    logger.log(_LEVELS[event.kind.level], event.sentence(), told=event)


def configure(
    stream_is_journal: bool | None = None,
    *,
    stream: TextIO | None = None,
    path: Path = SOCKET,
    env: Mapping[str, str] = os.environ,
) -> None:
    """Set structlog up for this process. Without `stream_is_journal`, `stream` (stderr) tells."""
    stream = sys.stderr if stream is None else stream
    if stream_is_journal is None:
        stream_is_journal = _is_journal(stream, env)
    render: Callable[[Any, str, Entry], bytes | str]
    sink: Callable[[Any], None]
    if stream_is_journal:
        journal = _Journal(path)
        render, sink = journal.render, journal.send
    else:
        render, sink = _Lines(coloured=wants_colour(stream, env)).render, _Console(stream).write
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, structlog.processors.add_log_level, render],
        wrapper_class=structlog.make_filtering_bound_logger("info"),
        logger_factory=lambda *_: _Sink(sink),
        cache_logger_on_first_use=False,
    )


def wants_colour(stream: TextIO, env: Mapping[str, str]) -> bool:
    """Whether this is a terminal whose user has not said no (https://no-color.org)."""
    try:
        terminal = stream.isatty()
    except ValueError:  # closed
        return False
    return terminal and not env.get("NO_COLOR") and env.get("TERM") != "dumb"


def _is_journal(stream: TextIO, env: Mapping[str, str]) -> bool:
    """JOURNAL_STREAM names the device and inode that systemd connected; a redirected stderr has others."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return env.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class _Sink:
    """A structlog logger whose levels all lead to one function."""

    def __init__(self, take: Callable[[Any], None]) -> None:
        self.msg = self.debug = self.info = self.warning = self.error = self.critical = take


class _Console:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, line: str) -> None:
        with suppress(OSError, ValueError):  # a full disk or a closed terminal
            self._stream.write(line)
            self._stream.flush()


class _Lines:
    """Entries as lines: the sentence, then what else is known. An event's sentence says all of it already."""

    def __init__(self, *, coloured: bool) -> None:
        self._coloured = coloured

    def render(self, _logger: Any, _method: str, entry: Entry) -> str:
        level, text, trace = entry.pop("level"), str(entry.pop("event")), _trace(entry)
        entry.pop("told", None)
        line = printable(text) + "".join(f" {key}={printable(str(value))}" for key, value in entry.items())
        if level != "info":
            line = f"{level}: {line}"
        if self._coloured and level in _COLOURS:
            line = f"\x1b[{_COLOURS[level]}m{line}\x1b[0m"
        return line + "\n" + (_multiline(trace) + "\n" if trace else "")


class _Journal:
    """Entries as datagrams of the native protocol."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._lost = 0

    def render(self, _logger: Any, _method: str, entry: Entry) -> bytes:
        return b"".join(_field(name, value) for name, value in _fields(entry))

    def send(self, entry: bytes) -> None:
        if self._lost:
            entry += _field("NODEWALLD_LOST", str(self._lost))
        try:
            self._deliver(entry)
            self._lost = 0
        except OSError:
            self._lost += 1

    def _deliver(self, entry: bytes) -> None:
        # Not connected: a journald that was restarted listens on a new socket at the old path.
        try:
            self._socket.sendto(entry, self._path)
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise
            self._deliver_by_memory(entry)

    def _deliver_by_memory(self, entry: bytes) -> None:
        """What is too large for a datagram goes as a sealed memory file (journald reads no other)."""
        fd = os.memfd_create("nodewalld-journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with open(fd, "wb", closefd=False) as file:
                file.write(entry)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
            self._socket.sendmsg([b""], rights, 0, self._path)
        finally:
            os.close(fd)


def _field(name: str, value: str) -> bytes:
    data = value.encode(errors="backslashreplace")
    if b"\n" in data:
        return name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
    return name.encode() + b"=" + data + b"\n"


def _fields(entry: Entry) -> Iterator[tuple[str, str]]:
    """The journal fields of a structlog entry."""
    trace, event = _trace(entry), entry.pop("told", None)
    text = _multiline(str(entry.pop("event")))
    yield "MESSAGE", f"{text}\n{_multiline(trace)}" if trace else text
    yield "PRIORITY", str(_PRIORITIES[entry.pop("level")])
    yield "SYSLOG_IDENTIFIER", "nodewalld"
    if isinstance(event, Event):
        yield from _event_fields(event)
    for key, value in entry.items():
        name = "".join(c if c.isascii() and c.isalnum() else "_" for c in f"NODEWALLD_{key.upper()}")
        yield name[:_NAME_MAX], _multiline(str(value))


def _event_fields(event: Event) -> Iterator[tuple[str, str]]:
    yield "MESSAGE_ID", MESSAGE_IDS[event.kind]
    yield "NODEWALLD_KIND", event.kind.value
    known = {
        "FAMILY": event.family,
        "TABLE": event.table,
        "CHAIN": event.chain,
        "REASON": event.reason,
        "BY_PID": event.by and event.by.pid,
        "BY_COMM": event.by and event.by.comm,
        "BY_NAME": event.by and event.by.name,
        "BY_PARENTS": event.by and " < ".join(str(parent) for parent in event.by.parents),
        "EXPOSED_USEC": event.exposed_ms is not None and round(event.exposed_ms * 1000),
        "LATENCY_USEC": event.latency_ms is not None and round(event.latency_ms * 1000),
        "FLOWS_DELETED": event.flows_deleted or None,
    }
    for name, value in known.items():
        if value is not None and value is not False and value != "":
            yield f"NODEWALLD_{name}", printable(str(value))
    for entry in event.entries:  # a journal field may come more than once
        yield "NODEWALLD_RULE", printable(entry)


def _multiline(text: str) -> str:
    """Every line printable; the ends of lines stay, they are safe in the binary form."""
    return "\n".join(printable(line.expandtabs()) for line in text.split("\n"))


def _trace(entry: Entry) -> str:
    """The traceback that a `log.exception()` asks for."""
    info = entry.pop("exc_info", None)
    if info is True:
        info = sys.exc_info()[1]
    elif isinstance(info, tuple):
        info = info[1]
    return "".join(traceback.format_exception(info)).rstrip() if isinstance(info, BaseException) else ""
