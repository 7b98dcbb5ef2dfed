"""Asking a running daemon. Every way in which that can fail is a `ControlError` with a sentence."""

import socket
from collections.abc import Generator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from nodewalld.service import wire
from nodewalld.service.wire import NoAnswer, NoDaemon, Refused


def call(path: Path, request: Mapping[str, object], timeout: float) -> Any:
    """Ask once and return the value of the reply; `timeout`, in seconds, is for the reply.

    Raises NoDaemon, NoAnswer, and Refused when the daemon or the socket's mode says no.
    """
    with closing(stream(path, request, timeout)) as values:
        return next(values)


def stream(path: Path, request: Mapping[str, object], timeout: float) -> Generator[Any, None, None]:
    """As `call`, then each further value until the daemon closes; only the first has a `timeout`."""
    with _connect(path, timeout) as connection:
        lines = wire.Lines(connection, wire.REPLY_MAX)
        line: bytes | None = _exchange(connection, lines, wire.encode(request), timeout)
        while line is not None:
            yield _value(line)
            line = _next(lines, None)


def _connect(path: Path, timeout: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout)
        connection.connect(str(path))
        if not wire.peer_of(connection).trusted:
            raise Refused(f"the process that listens on {path} is not root's")
    except BaseException as error:
        connection.close()
        raise _told(error, path) from error
    return connection


def _told(error: BaseException, path: Path) -> BaseException:
    """The same failure in our words."""
    match error:
        case FileNotFoundError() | ConnectionRefusedError() | NotADirectoryError():
            return NoDaemon(f"nodewalld is not running (nobody listens on {path})")
        case PermissionError():
            return Refused(f"only root may ask nodewalld ({path})")
        case TimeoutError() | BlockingIOError():  # a full backlog is EAGAIN for Unix sockets
            return NoAnswer("nodewalld is running and does not answer")
        case OSError():
            return NoAnswer(f"{path} can't be reached: {error.strerror or error}")
        case _:
            return error


def _exchange(connection: socket.socket, lines: wire.Lines, request: bytes, timeout: float) -> bytes:
    try:
        connection.sendall(request)
    except TimeoutError as error:
        raise NoAnswer("nodewalld does not take the request") from error
    except OSError:
        pass  # it may have refused and closed before reading: then its reply says why
    line = _next(lines, timeout)
    if line is None:
        raise NoAnswer("nodewalld closed the connection without an answer")
    return line


def _next(lines: wire.Lines, timeout: float | None) -> bytes | None:
    try:
        return lines.read(timeout)
    except TimeoutError as error:
        raise NoAnswer(f"nodewalld did not answer within {timeout:g} s") from error
    except wire.TooLong as error:
        raise NoAnswer("nodewalld's answer is too long") from error
    except ConnectionResetError:
        return None


def _value(line: bytes) -> Any:
    try:
        reply = wire.decode(line)
    except ValueError as error:
        raise NoAnswer(f"nodewalld's answer is {error}") from error
    if reply.get("ok") is True:
        return reply.get("value")
    problems = reply.get("problems")
    texts = tuple(str(problem) for problem in problems) if isinstance(problems, list) else ()
    raise Refused(str(reply.get("error", "refused without a reason")), texts)
