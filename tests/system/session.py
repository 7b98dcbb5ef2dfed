"""Somebody's shell on the machine, over TCP from the peer: what a person loses who shuts the own way in.

Copied to the machine and run there as well: `session.py serve PORT` gives a shell to whoever connects, with
SSH_CONNECTION as sshd leaves it; `session.py join ADDRESS PORT` ties one to stdin and stdout.
"""

import contextlib
import os
import selectors
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

SCRIPT = Path(__file__)
WAY_IN = 22


def serve(port: int) -> None:
    """For ever; a shell lives as long as its connection."""
    listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    while True:
        connection, (client, client_port, *_) = listener.accept()
        server = connection.getsockname()[0]
        told = f"{client} {client_port} {server} {port}".replace("::ffff:", "")
        environment = {**os.environ, "SSH_CONNECTION": told}
        with connection:
            subprocess.Popen(["/bin/sh"], stdin=connection, stdout=connection, stderr=connection, env=environment)


def join(address: str, port: int) -> None:
    """Until either end has had enough."""
    connection = socket.create_connection((address, port), timeout=3)
    connection.settimeout(None)
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ, lambda: connection.sendall(os.read(0, 4096) or sys.exit()))
    selector.register(connection, selectors.EVENT_READ, lambda: os.write(1, connection.recv(4096) or sys.exit()))
    while True:
        for key, _ in selector.select():
            key.data()


class Session:
    """One shell, from the peer; `entered` is the command that leads into the peer."""

    def __init__(self, entered: list[str], script: str, address: str) -> None:
        command = [*entered, "python3", script, "join", address, str(WAY_IN)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self._seen = b""
        self._number = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # it ends by itself then: who kills nsenter leaves its child
        try:
            self._process.wait(5)
        finally:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()

    def say(self, command: str, timeout: float = 10.0) -> str | None:
        """What a command answers, with its exit status in a last line; None when no answer comes in time."""
        self._number += 1
        end = f"-- {self._number}: ".encode()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(f"{{ {command}\n}} 2>&1; echo '{end.decode()}'$?\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:  # no connection was to be had
            return None
        deadline = time.monotonic() + timeout
        os.set_blocking(self._process.stdout.fileno(), False)
        while end not in self._seen or not self._seen.endswith(b"\n"):
            if time.monotonic() > deadline or self._process.poll() is not None:
                return None
            self._seen += self._process.stdout.read() or b""
            time.sleep(0.01)
        answer, self._seen = self._seen, b""
        return answer.decode(errors="replace").replace(end.decode(), "")


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "serve":
        serve(int(arguments[0]))
    else:
        join(arguments[0], int(arguments[1]))
