"""What systemd is told: a typed wrapper over `sdnotify`, which is silent where there is no systemd.

Law: telling systemd never blocks the daemon for long and never fails it.
"""

import os
import time
from collections.abc import Mapping

from sdnotify import SystemdNotifier

from nodewalld.core.events import printable

_STATUS_MAX = 1000  # systemd ignores a whole message of more than 4096 bytes
_SEND_LIMIT = 1.0


class Notifier:
    """The notification socket of this process. `env` is where systemd left its words."""

    def __init__(self, env: Mapping[str, str] = os.environ) -> None:
        self._env = env
        self._systemd = SystemdNotifier() if env.get("NOTIFY_SOCKET") else None
        if self._systemd is not None and self._systemd.socket is not None:
            self._systemd.socket.settimeout(_SEND_LIMIT)

    def ready(self, status: str) -> None:
        """In force (again): the end of starting, and of every reload that was announced."""
        self._send("READY=1", _status(status))

    def status(self, status: str) -> None:
        """A sentence for `systemctl status`."""
        self._send(_status(status))

    def reloading(self, status: str) -> None:
        """A reload begins; `ready` ends it, whatever came of it."""
        # Without the time systemd can't tell this reload's READY from an earlier one (sd_notify(3)).
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", _status(status))

    def stopping(self, status: str) -> None:
        """The end begins."""
        self._send("STOPPING=1", _status(status))

    def watchdog(self) -> None:
        """Alive."""
        self._send("WATCHDOG=1")

    @property
    def watchdog_interval(self) -> float | None:
        """Within how many seconds systemd wants to hear `watchdog`; None when it does not listen to us for
        it."""
        usec = self._env.get("WATCHDOG_USEC", "")
        pid = self._env.get("WATCHDOG_PID", str(os.getpid()))
        if pid != str(os.getpid()) or not usec.isascii() or not usec.isdigit() or int(usec) == 0:
            return None
        return int(usec) / 1_000_000

    def _send(self, *lines: str) -> None:
        if self._systemd is not None:
            # sdnotify encodes as Latin-1 and drops the message where that fails; so the UTF-8 that systemd
            # wants goes through it byte for byte.
            self._systemd.notify("\n".join(lines).encode().decode("latin-1"))


def _status(sentence: str) -> str:
    """One line, and short enough to arrive."""
    clipped = printable(sentence).encode()[:_STATUS_MAX].decode(errors="ignore")
    return f"STATUS={clipped}"
