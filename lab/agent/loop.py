"""What comes in is handled before time counts."""

import contextlib
import heapq
import selectors
import socket
import time
from collections.abc import Callable
from typing import NoReturn


class Loop:
    """Readiness before time: a timer fires only when no socket has anything left to say."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def watch(self, sock: socket.socket | int, events: int, call: Callable[[], None]) -> None:
        """Call whenever the socket is ready; a second call replaces the first."""
        try:
            self._selector.modify(sock, events, call)
        except KeyError:
            self._selector.register(sock, events, call)

    def pause(self, sock: socket.socket) -> None:
        """Watch no more."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(sock)

    def forget(self, sock: socket.socket) -> None:
        """Watch no more, and close."""
        self.pause(sock)
        sock.close()

    def after(self, delay: float, call: Callable[[], None]) -> None:
        """Call once, not before `delay` seconds have passed."""
        self._count += 1
        heapq.heappush(self._timers, (time.monotonic() + delay, self._count, call))

    def run(self) -> NoReturn:
        """Turn until the process is killed or its standard input ends."""
        while True:
            due = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
            ready = self._selector.select(due)
            for _ in range(1000):  # a packet may cause others: empty the sockets before time counts
                if not ready:
                    break
                for key, _ in ready:
                    if self._selector.get_map().get(key.fd) == key:  # what came before may have closed it
                        key.data()
                ready = self._selector.select(0)
            now = time.monotonic()
            while self._timers and self._timers[0][0] <= now:
                heapq.heappop(self._timers)[2]()
