"""The control socket: where a running daemon is asked, and tells.

Laws: only root (or the daemon's own user) is answered, by the kernel's word and not only by the file's mode.
No client can harm the daemon or another client: requests are bounded in size and time, places are few, and
streams take at most half of them. A handler runs in the thread of its client; whatever it touches must be
safe for that.
"""

import contextlib
import errno
import select
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import structlog

from nodewalld.service import wire
from nodewalld.service.instance import Instance
from nodewalld.service.wire import Peer, Refused

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asks, and who it is."""

    command: str
    args: Mapping[str, Any]
    peer: Peer


Handler = Callable[[Request], Any]
"""Returns the reply's value; or an iterator of values, each sent as one reply, where None sends nothing and
only lets the server look whether the client is still there (at least one a second, please). Raises Refused to
say no.
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a client may take: places, and seconds."""

    clients: int = 16
    request: float = 5.0
    """For a whole request to arrive, and for the next one to follow a reply."""
    send: float = 10.0
    close: float = 2.0
    """How long `close` waits for handlers that are still at work."""


class ControlServer:
    """Answers on `control.sock` in the folder of `instance`, whose lock makes any socket found there a dead
    one's."""

    def __init__(
        self,
        instance: Instance,
        handle: Handler,
        *,
        limits: Limits = Limits(),
        peer_of: Callable[[socket.socket], Peer] = wire.peer_of,
    ) -> None:
        self.path = instance.folder / wire.SOCKET_NAME
        self._handle = handle
        self._limits = limits
        self._peer_of = peer_of
        self._stopping = threading.Event()
        self._guard = threading.Lock()
        self._clients: dict[socket.socket, threading.Thread] = {}
        self._streams = 0
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.bind(str(self.path))
            self.path.chmod(0o600)
            self._listener.listen(limits.clients)
        except OSError as error:
            self._listener.close()
            why = f"the control socket can't be made: {error.strerror or error}"
            raise OSError(error.errno or errno.EINVAL, why, str(self.path)) from error
        self._thread = threading.Thread(target=self._accept, name="control", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """Take no more requests, let replies on their way go out, and remove the socket."""
        self._stopping.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        if self._thread.ident is not None:
            self._thread.join()
        self._listener.close()
        self.path.unlink(missing_ok=True)
        deadline = time.monotonic() + self._limits.close
        for how in (socket.SHUT_RD, socket.SHUT_RDWR):  # no more requests; then, out of time, no more replies
            with self._guard:
                clients = dict(self._clients)
            for connection in clients:
                with contextlib.suppress(OSError):
                    connection.shutdown(how)
            for thread in clients.values():
                thread.join(max(0.1, deadline - time.monotonic()))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if not self._stopping.is_set():
                    _log.warning("The control socket can't take a client", error=str(error))
                    self._stopping.wait(0.2)  # out of descriptors, perhaps: not in a hot loop
                continue
            self._admit(connection)

    def _admit(self, connection: socket.socket) -> None:
        thread = threading.Thread(target=self._serve, args=(connection,), name="control client", daemon=True)
        with self._guard:
            full = len(self._clients) >= self._limits.clients
            if not full:
                self._clients[connection] = thread
        if full:
            connection.setblocking(False)
            with contextlib.suppress(OSError), connection:
                connection.send(_no(f"busy: {self._limits.clients} clients are being served"))
            return
        try:
            thread.start()
        except RuntimeError as error:  # the system gives no more threads
            _log.warning("The control socket can't serve a client", error=str(error))
            self._forget(connection)

    def _forget(self, connection: socket.socket) -> None:
        with self._guard:
            del self._clients[connection]
        connection.close()

    def _serve(self, connection: socket.socket) -> None:
        try:
            peer = self._peer_of(connection)
            if peer.trusted:
                self._converse(connection, peer)
            else:
                self._send(connection, _no("only root may ask nodewalld"))
        except OSError:
            pass  # the client has gone, or does not read: its loss
        finally:
            self._forget(connection)

    def _converse(self, connection: socket.socket, peer: Peer) -> None:
        lines = wire.Lines(connection, wire.REQUEST_MAX)
        while not self._stopping.is_set():
            try:
                line = lines.read(self._limits.request)
            except TimeoutError:
                return self._send(connection, _no(f"no request within {self._limits.request:g} s"))
            except wire.TooLong:
                return self._send(connection, _no(f"a request may have {wire.REQUEST_MAX} bytes"))
            if line is None:
                return None
            if line.strip() and not self._answer(connection, line, peer):
                return None
        return None

    def _answer(self, connection: socket.socket, line: bytes, peer: Peer) -> bool:
        """Whether there may be another request: a stream ends with its connection."""
        try:
            request = _parse(line, peer)
        except ValueError as error:
            self._send(connection, _no(f"the request is {error}"))
            return True
        reply = self._reply(request)
        if isinstance(reply, bytes):
            self._send(connection, reply)
            return True
        with contextlib.closing(reply):
            for one in reply:
                if one is not None:
                    self._send(connection, one)
                if self._stopping.is_set() or _gone(connection):
                    break
        return False

    def _reply(self, request: Request) -> bytes | Generator[bytes | None, None, None]:
        try:
            value = self._handle(request)
            return self._stream(request, value) if isinstance(value, Iterator) else _yes(value)
        except Exception as error:  # the top of this thread's loop: a bad command must not end the others
            return _sorry(request, error)

    def _stream(self, request: Request, values: Iterator[Any]) -> Generator[bytes | None, None, None]:
        try:
            with self._stream_place():
                for value in values:
                    yield None if value is None else _yes(value)
        except Exception as error:  # as in _reply
            yield _sorry(request, error)

    @contextlib.contextmanager
    def _stream_place(self) -> Generator[None, None, None]:
        with self._guard:
            if self._streams >= max(1, self._limits.clients // 2):
                raise Refused(f"busy: {self._streams} clients are following")
            self._streams += 1
        try:
            yield
        finally:
            with self._guard:
                self._streams -= 1

    def _send(self, connection: socket.socket, reply: bytes) -> None:
        connection.settimeout(self._limits.send)
        connection.sendall(reply)


def _parse(line: bytes, peer: Peer) -> Request:
    """Raises ValueError with the end of the sentence "the request is ..."."""
    args = wire.decode(line)
    command = args.pop("command", None)
    if not isinstance(command, str):
        raise ValueError('without a "command"')
    return Request(command, args, peer)


def _sorry(request: Request, error: Exception) -> bytes:
    """The answer to a request that failed; what is no refusal is our fault, and logged."""
    if isinstance(error, Refused):
        return _no(error.error, error.problems)
    _log.error("A control command failed", command=request.command, exc_info=error)
    return _no(f"internal error: {type(error).__name__}: {error}")


def _yes(value: object) -> bytes:
    return wire.encode({"ok": True, "value": value})


def _no(error: str, problems: tuple[str, ...] = ()) -> bytes:
    return wire.encode({"ok": False, "error": error, "problems": list(problems)})


def _gone(connection: socket.socket) -> bool:
    """Whether the client has closed; one that has only ended its requests (`nc -N`) still listens."""
    poll = select.poll()
    poll.register(connection, 0)
    return any(what & (select.POLLHUP | select.POLLERR) for _, what in poll.poll(0))
