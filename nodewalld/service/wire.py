"""The words that `nodewallctl` and `nodewalld` exchange: one JSON object a line, over a Unix stream socket.

Request: {"command": NAME, ...arguments}. Reply: {"ok": true, "value": ...} or {"ok": false, "error": TEXT,
"problems": [TEXT, ...]}; a followed history goes on with further replies until one side closes. Both sides
ask the kernel who the other one is (SO_PEERCRED) and talk to root and to their own user only. Kept light:
`nodewallctl status` must start quickly.
"""

import json
import os
import socket
import struct
import time
from typing import Any, NamedTuple

SOCKET_NAME = "control.sock"
REQUEST_MAX = 8 << 20  # 100,000 addresses for a set are half of that
REPLY_MAX = 64 << 20

_CREDENTIALS = struct.Struct("3i")  # struct ucred of unix(7): pid, uid, gid


class ControlError(Exception):
    """The daemon was not asked, or did not do what it was asked; the text is fit for people."""


class NoDaemon(ControlError):
    """Nobody listens on the socket."""


class NoAnswer(ControlError):
    """Somebody listens, and does not answer in time, or not in our words."""


class Refused(ControlError):
    """The daemon said no: `error` in a sentence, `problems` line by line."""

    def __init__(self, error: str, problems: tuple[str, ...] = ()) -> None:
        super().__init__(error)
        self.error = error
        self.problems = problems


class TooLong(Exception):
    """A line is longer than its limit."""


class Peer(NamedTuple):
    """The process at the other end, as it was when it connected (or listened)."""

    pid: int
    uid: int

    @property
    def trusted(self) -> bool:
        """Root may do all this anyway, and a user to its own processes."""
        return self.uid in (0, os.geteuid())


def peer_of(connection: socket.socket) -> Peer:
    """Who is at the other end, told by the kernel."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _gid = _CREDENTIALS.unpack(raw)
    return Peer(pid, uid)


def encode(value: object) -> bytes:
    """One line."""
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """The object that a line holds. Raises ValueError, with a sentence, on anything else."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # deep nesting is no ValueError to json
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


class Lines:
    """The lines that arrive on a connection."""

    def __init__(self, connection: socket.socket, limit: int) -> None:
        self._connection = connection
        self._limit = limit
        self._buffer = bytearray()

    def read(self, timeout: float | None) -> bytes | None:
        """The next line without its end, None when the other side has closed; `timeout` is for the whole
        line.

        Raises TimeoutError, TooLong and whatever the connection raises.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > self._limit:
                raise TooLong
            chunk = self._receive(deadline)
            if not chunk:
                rest = bytes(self._buffer)
                self._buffer.clear()
                return rest or None
            self._buffer += chunk
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def _receive(self, deadline: float | None) -> bytes:
        remaining = None if deadline is None else deadline - time.monotonic()
        if remaining is not None and remaining <= 0:
            raise TimeoutError
        self._connection.settimeout(remaining)
        return self._connection.recv(65536)
