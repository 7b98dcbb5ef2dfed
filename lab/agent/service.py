"""Requests in, answers out, one JSON object a line; several may be under way."""

import json
import os
import selectors
import sys
from functools import partial
from typing import Any

from lab.agent.calls import Calls
from lab.agent.kept import Kept
from lab.agent.loop import Loop
from lab.agent.namespaces import Namespaces
from lab.agent.servers import Servers
from lab.agent.words import say


class Agent:
    """Reads standard input and does what it says, until it ends."""

    def __init__(self) -> None:
        self.loop = Loop()
        namespaces = Namespaces()
        self._servers = Servers(namespaces, self.loop)
        self._kept = Kept(self.loop)
        self._calls = Calls(namespaces, self.loop, self._kept)
        self._buffer = b""
        os.set_blocking(0, False)
        self.loop.watch(0, selectors.EVENT_READ, self._read)

    def _answer(self, number: int, content: dict[str, Any]) -> None:
        say({"id": number, **content})

    def _read(self) -> None:
        data = os.read(0, 1 << 20)
        if not data:
            sys.exit(0)
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            request = json.loads(line)
            try:
                getattr(self, "do_" + request["do"])(request)
            except Exception as error:
                self._answer(request["id"], {"failed": f"{type(error).__name__}: {error}"})

    def do_listen(self, request: dict[str, Any]) -> None:
        """Listen on ports."""
        for protocol, port in request["ports"]:
            self._servers.listen(request["ns"], protocol, port)
        self._answer(request["id"], {})

    def do_close(self, request: dict[str, Any]) -> None:
        """Listen no more on ports."""
        for protocol, port in request["ports"]:
            self._servers.close(request["ns"], protocol, port)
        self._answer(request["id"], {})

    def do_call(self, request: dict[str, Any]) -> None:
        """Reach for somebody."""
        self._calls.make(request, partial(self._answer, request["id"]))

    def do_hangup(self, request: dict[str, Any]) -> None:
        """Close a kept connection."""
        self._kept.hang_up(request["connection"])
        self._answer(request["id"], {})

    def do_echo(self, request: dict[str, Any]) -> None:
        """Send a line over a kept connection and wait for it to come back."""
        line = f"echo-{request['id']}\n".encode()
        self._kept.echo(request["connection"], line, request["timeout"], partial(self._answer, request["id"]))
