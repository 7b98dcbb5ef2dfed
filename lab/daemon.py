"""nodewalld running inside a node, started the way systemd starts it: its notices are read and kept with times.

Each daemon has its own configuration, runtime and state folders, so that several run side by side. nodewallctl
is run with the same folders, within the same network namespace.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lab.node import Node
from lab.processes import inner_pid, kill_entered
from lab.waiting import LabError, wait_for

_MARK = b"\0mark"
_END = b"\0end"


@dataclass(frozen=True, slots=True)
class Notice:
    """One assignment of an sd_notify message ("READY=1", "STATUS=..."), and when it came (monotonic)."""

    when: float
    key: str
    value: str


class Daemon:
    """A nodewalld in a node. `config` is the text of nodewalld.toml, or files by their relative names.

    `watchdog` is the WatchdogSec that systemd would set, in seconds; `env` goes to nodewallctl too. The daemon
    is started at once; `wait_ready()` waits for READY=1. Its output is in `log_text()`, and in `node.logs[name]`
    for the fixture that shows the logs of failed tests.
    """

    def __init__(
        self,
        node: Node,
        config: str | Mapping[str, str],
        *,
        args: Sequence[str] = (),
        name: str = "nodewalld",
        ns: str = "node",
        watchdog: float | None = None,
        env: Mapping[str, str] | None = None,
        start: bool = True,
    ) -> None:
        self.node = node
        self.name = name
        self.ns = ns
        self.args = list(args)
        self.watchdog = watchdog
        self.env = dict(env or {})
        self.notices: list[Notice] = []
        self._marks: deque[threading.Event] = deque()
        base = node.directory / name
        base.mkdir(mode=0o700)
        self.config_directory = base / "etc"
        self.runtime_directory = base / "run"
        self.state_directory = base / "lib"
        for directory in (self.config_directory, self.runtime_directory, self.state_directory):
            directory.mkdir(mode=0o700)
        self._process: subprocess.Popen[str] | None = None
        self.pid = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.bind(str(base / "notify"))
        self._listener = threading.Thread(target=self._listen, name=f"{name} notices", daemon=True)
        self._listener.start()
        node.on_close(self._hang_up)
        self.configure(config)
        if start:
            self.start()

    # --- life -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start it; notices of an earlier life are forgotten."""
        if self.running:
            raise LabError(f"{self.name} runs already")
        self._settle()
        self.notices = []
        environment = {"NOTIFY_SOCKET": str(self.config_directory.parent / "notify"), **self.env}
        if self.watchdog is not None:
            environment["WATCHDOG_USEC"] = str(round(self.watchdog * 1e6))
        self._process = self.node.popen(
            [self.node.python(), "-m", "nodewalld.commands.daemon", *self.args, *self._folders()],
            ns=self.ns,
            log=self.name,
            env=environment,
        )
        self.pid = 0
        with contextlib.suppress(LabError):  # it may end at once: whoever waits for it is told
            self.pid = inner_pid(self._process)

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        if self._process is None:
            raise LabError(f"{self.name} was not started")
        kill_entered(self._process, number)

    def wait(self, *, timeout: float = 30.0) -> int:
        """Wait for its end; its exit status, negative for the signal that killed it."""
        if self._process is None:
            raise LabError(f"{self.name} was not started")
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise LabError(f"{self.name} did not end within {timeout:g} s{self._tail()}") from error

    def kill9(self) -> None:
        """SIGKILL, and wait until it is dead."""
        self.signal(signal.SIGKILL)
        self.wait()

    def stop(self, *, timeout: float = 30.0) -> int:
        """SIGTERM; the exit status. The rules stay, as the contract says."""
        self.signal(signal.SIGTERM)
        return self.wait(timeout=timeout)

    def restart(self, *, timeout: float = 30.0) -> None:
        """Stop it if it runs, start it, and wait until it is ready."""
        if self.running:
            self.stop()
        self.start()
        self.wait_ready(timeout=timeout)

    # --- notices ----------------------------------------------------------------------------------------

    def _listen(self) -> None:
        while True:
            try:
                data = self._socket.recv(65536)
            except OSError:
                return
            if data == _END:
                return
            if data == _MARK:
                self._marks.popleft().set()
                continue
            now = time.monotonic()
            for line in data.decode(errors="replace").splitlines():
                key, _, value = line.partition("=")
                self.notices.append(Notice(now, key, value))

    def _tell_listener(self, word: bytes) -> None:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.sendto(word, str(self.config_directory.parent / "notify"))

    def _settle(self) -> None:
        """Let the listener hear everything that was sent before now: the socket keeps the order."""
        if self._listener.is_alive():
            mark = threading.Event()
            self._marks.append(mark)
            self._tell_listener(_MARK)
            if not mark.wait(10):
                raise LabError(f"the listener of {self.name} is stuck")

    def _hang_up(self) -> None:
        self._tell_listener(_END)
        self._listener.join(5)
        self._socket.close()

    def noticed(self, key: str) -> list[Notice]:
        """The notices of one kind since the start: "READY", "STATUS", "RELOADING", "STOPPING", "WATCHDOG"."""
        self._settle()
        return [notice for notice in list(self.notices) if notice.key == key]

    @property
    def status_text(self) -> str:
        """The last STATUS= sentence."""
        return ([""] + [notice.value for notice in self.noticed("STATUS")])[-1]

    def wait_notice(self, key: str, *, after: float = 0.0, timeout: float = 30.0) -> Notice:
        """Wait for a notice of that kind later than `after`; LabError at once when the daemon dies."""

        def seen() -> Notice | None:
            running = self.running  # asked first: what a dying daemon has said is still heard
            for notice in self.noticed(key):
                if notice.when > after:
                    return notice
            if not running:
                raise LabError(f"{self.name} has ended with {self.wait()}{self._tail()}")
            return None

        try:
            found = wait_for(seen, timeout=timeout, what=f"{key}= of {self.name}")
        except LabError as error:
            raise LabError(f"{error}; status: {self.status_text!r}{self._tail()}") from error
        if found is None:  # wait_for returns only what is true
            raise LabError(f"{self.name} gave no {key}=")
        return found

    def wait_ready(self, *, timeout: float = 30.0) -> Self:
        """Wait for READY=1."""
        self.wait_notice("READY", timeout=timeout)
        return self

    # --- configuration and control ----------------------------------------------------------------------

    def configure(self, config: str | Mapping[str, str]) -> None:
        """Replace the configuration files; the daemon is not told."""
        files = {"nodewalld.toml": config} if isinstance(config, str) else dict(config)
        for old in self.config_directory.iterdir():
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old)
            else:
                old.unlink()
        for name, text in files.items():
            path = self.config_directory / name
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o600)

    def _folders(self) -> list[str]:
        return [
            "--config",
            str(self.config_directory),
            "--runtime-dir",
            str(self.runtime_directory),
            "--state-dir",
            str(self.state_directory),
        ]

    def ctl(
        self, *args: str, timeout: float = 60.0, stdin: str | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run nodewallctl with this daemon's folders; any exit status is an answer."""
        command = [self.node.python(), "-m", "nodewalld.commands.ctl", *args, *self._folders()]
        environment = {**self.env, **(env or {})}
        return self.node.run(command, ns=self.ns, check=False, timeout=timeout, stdin=stdin, env=environment)

    def popen_ctl(self, *args: str) -> subprocess.Popen[str]:
        """Start nodewallctl and leave it running, its output in a pipe: for `history -f`, `status --watch`."""
        command = [self.node.python(), "-m", "nodewalld.commands.ctl", *args, *self._folders()]
        return self.node.popen(command, ns=self.ns, log=f"{self.name}-ctl", stdout=subprocess.PIPE, env=self.env)

    def status(self) -> dict[str, Any]:
        """`nodewallctl status --json`, whatever its exit status."""
        parsed = json.loads(self._output("status", "--json"))
        if not isinstance(parsed, dict):
            raise LabError(f"status --json printed no object: {parsed!r}")
        return parsed

    def history(self, *args: str) -> list[dict[str, Any]]:
        """`nodewallctl history --json`: one event a line, oldest first as the command prints them."""
        return [json.loads(line) for line in self._output("history", "--json", *args).splitlines() if line]

    def _output(self, *args: str) -> str:
        result = self.ctl(*args)
        if not result.stdout.strip() and (result.returncode or args[0] != "history"):
            raise LabError(f"nodewallctl {' '.join(args)} exited {result.returncode}: {result.stderr}{self._tail()}")
        return result.stdout

    def wait_status(self, *, timeout: float = 10.0, **wanted: object) -> dict[str, Any]:
        """Wait until the status has these values: `wait_status(state="enforcing")`."""

        def reached() -> dict[str, Any] | None:
            status = self.status()
            return status if all(status.get(key) == value for key, value in wanted.items()) else None

        return wait_for(reached, timeout=timeout, what=f"status {wanted} of {self.name}") or {}

    def reload(
        self, config: str | Mapping[str, str] | None = None, *, timeout: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Write the new configuration, if one is given, and `nodewallctl reload`: 0 taken, 1 refused."""
        if config is not None:
            self.configure(config)
        return self.ctl("reload", timeout=timeout)

    # --- what it said and what it costs -----------------------------------------------------------------

    @property
    def log(self) -> Path:
        """The file with everything that it printed, over all its lives."""
        return self.node.logs[self.name]

    def log_text(self) -> str:
        """Everything that it printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def _tail(self, lines: int = 30) -> str:
        return "\n" + "\n".join(self.log_text().splitlines()[-lines:])

    def cpu_seconds(self) -> float:
        """Processor time used by the process and the children that it has waited for."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(int(ticks) for ticks in fields[11:15]) / os.sysconf("SC_CLK_TCK")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.running:
            self.kill9()
