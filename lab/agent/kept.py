"""Connections that stay open between requests, each known by its number."""

import selectors
import socket
import time
from collections.abc import Callable
from typing import Any

from lab.agent.loop import Loop
from lab.agent.words import error_name

ATTEMPTS = 3
"""How often something is sent before silence counts."""


class Kept:
    """The open connections."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._sockets: dict[int, socket.socket] = {}
        self._number = 0

    def keep(self, sock: socket.socket) -> int:
        """Leave a connection open and number it."""
        self._number += 1
        self._sockets[self._number] = sock
        self._loop.pause(sock)
        return self._number

    def hang_up(self, number: int) -> None:
        """Close it."""
        self._loop.forget(self._sockets.pop(number))

    def echo(self, number: int, line: bytes, timeout: float, answer: Callable[[dict[str, Any]], None]) -> None:
        """Send a line over a connection, and answer when it has come back, or can't, or the time is over."""
        sock = self._sockets[number]
        received = bytearray()
        done = False
        started = time.monotonic()

        def end(error: str) -> None:
            nonlocal done
            if not done:
                done = True
                self._loop.pause(sock)
                answer({"alive": not error, "error": error, "seconds": time.monotonic() - started})

        def read() -> None:
            try:
                data = sock.recv(65536)
            except BlockingIOError:
                return
            except OSError as error:
                end(error_name(error))
                return
            received.extend(data)
            if line in received:
                end("")
            elif not data and sock.type == socket.SOCK_STREAM:
                end("closed")

        def send() -> None:
            if done:
                return
            try:
                sock.send(line)
            except OSError as error:
                end(error_name(error))

        self._loop.watch(sock, selectors.EVENT_READ, read)
        send()
        if sock.type == socket.SOCK_DGRAM:
            for attempt in range(1, ATTEMPTS):
                self._loop.after(timeout * attempt / ATTEMPTS, send)
        self._loop.after(timeout, lambda: end("timeout"))
