"""A machine that boots a real systemd: a throw-away container over root trees that are never written.

The laws: it has a network, mounts and cgroups of its own, and nothing of it outlives `stop()` or the process that
made it; no wait is unbounded.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PEER = {"ipv4": "10.99.0.2", "ipv6": "fd99::2"}
HOST = {"ipv4": "10.99.0.1", "ipv6": "fd99::1"}

# Both hierarchies where cgroup v1 and v2 are mixed, else the one.
_MIXED = [Path("/sys/fs/cgroup") / name for name in ("systemd", "unified")]
_CGROUPS = [path for path in _MIXED if path.is_dir()] or [Path("/sys/fs/cgroup")]
_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LC_ALL": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
}
# It enters its cgroups before it becomes nspawn, so that --keep-unit finds a place that is its own.
_LAUNCH = """
set -e
for cgroup in $CGROUPS; do mkdir "$cgroup"; echo $$ > "$cgroup/cgroup.procs"; done
mount -t overlay -o "lowerdir=$LOWER,upperdir=$FOLDER/upper,workdir=$FOLDER/work" overlay "$FOLDER/root"
mkdir -p /run/systemd/nspawn
mount -t tmpfs tmpfs /run/systemd/nspawn
exec systemd-nspawn -q -D "$FOLDER/root" -M "$NAME" --boot --private-network --register=no --keep-unit \
    --link-journal=no --console=pipe
"""
_PEER = f"""
ip netns add peer
ip link add up0 type veth peer name eth0 netns peer
ip address add {HOST["ipv4"]}/24 dev up0
ip address add {HOST["ipv6"]}/64 dev up0 nodad
ip link set up0 up
ip -n peer address add {PEER["ipv4"]}/24 dev eth0
ip -n peer address add {PEER["ipv6"]}/64 dev eth0 nodad
ip -n peer link set eth0 up
"""


class MachineError(Exception):
    """The machine itself failed, or a command on it; or a wait was in vain."""


def wait_for(predicate: Callable[[], Any], timeout: float = 10.0, what: str = "") -> Any:
    """The first true value of `predicate`; MachineError after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not (last := predicate()):
        if time.monotonic() > end:
            raise MachineError(f"waited {timeout:g} s in vain for {what or predicate}; last seen: {last!r}")
        time.sleep(0.02)
    return last


class Machine:
    """Booted by `with`; `layers` are root trees, the upper ones first."""

    def __init__(self, folder: Path, layers: Sequence[Path]) -> None:
        self.name = re.sub(r"[^a-z0-9]+", "-", f"nw-{folder.name.lower()}")[:48].strip("-") + f"-{os.getpid()}"
        self.folder = folder
        self._layers = layers
        self._cgroups = [path / self.name for path in _CGROUPS]
        self._process: subprocess.Popen[bytes] | None = None
        self._init = 0

    @property
    def layer(self) -> Path:
        """What was changed on the machine; a layer for others once it is stopped."""
        return self.folder / "upper"

    def __enter__(self) -> Self:
        try:
            self.boot()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def boot(self) -> None:
        """Until every unit has been started."""
        for name in ("upper", "work", "root"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        environment = {
            **_ENVIRONMENT,
            "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
            "NAME": self.name,
            "FOLDER": str(self.folder),
            "LOWER": ":".join(map(str, self._layers)),
            "CGROUPS": " ".join(map(str, self._cgroups)),
        }
        # setpriv: dead with the process that booted it, and nspawn's init with nspawn.
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "-m", "--propagation", "private", "sh", "-c", _LAUNCH]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self._init = wait_for(self._find_init, 20, "an init")
        wait_for(lambda: self._state() in {"running", "degraded"}, 30, "the end of the boot")

    @property
    def _log(self) -> Path:
        return self.folder / "console.log"

    def _find_init(self) -> int:
        assert self._process is not None
        if self._process.poll() is not None:
            raise MachineError(f"{self.name} did not start:\n{self._log.read_text(errors='replace')}")
        with contextlib.suppress(OSError):  # helpers of nspawn come and go
            children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
            for child in children:
                if Path(f"/proc/{child}/exe").readlink().name == "systemd":
                    return int(child)
        return 0

    def _state(self) -> str:
        return self.run("systemctl is-system-running", check=False).stdout.strip()

    def power_off(self) -> None:
        """In good order: every unit is stopped. `stop()` then ends what is left, and `boot()` boots it again."""
        assert self._process is not None
        self.run("systemctl poweroff --no-block", check=False)
        self._process.wait(30)

    def stop(self) -> None:
        """Kill everything of it, whatever state it is in, and wait until it is gone."""
        for cgroup in self._cgroups:
            with contextlib.suppress(OSError):
                (cgroup / "cgroup.kill").write_text("1")
        if self._process is not None:
            self._process.kill()
            self._process.wait(20)
            self._process = None
        for cgroup in self._cgroups:
            wait_for(lambda cgroup=cgroup: _remove_cgroup(cgroup), 10, f"the end of {cgroup}")
        for name in ("work", "root"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    # --- what one does on it --------------------------------------------------------------------------------

    def run(self, command: str, *, check: bool = True, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run a shell command to its end, as root and outside of every unit; MachineError when it fails."""
        done = subprocess.run(
            self.entered("/bin/sh", "-c", command),
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            timeout=timeout,
            env=_ENVIRONMENT,
        )
        if check and done.returncode:
            raise MachineError(f"{command!r} exited {done.returncode}\n{done.stdout}{done.stderr}\n{self._journal()}")
        return done

    def entered(self, *command: str) -> list[str]:
        """A command that runs another one on the machine."""
        return ["nsenter", "-t", str(self._init), "-m", "-u", "-i", "-n", "-p", "-C", "-r", "-w", "--", *command]

    def _journal(self) -> str:
        return self.run("journalctl --sync; journalctl --no-pager -n 40", check=False).stdout

    def path(self, inside: str) -> Path:
        """A file of the machine, as seen from outside."""
        return Path(f"/proc/{self._init}/root{inside}")

    def put(self, source: Path) -> str:
        """Copy a file to the machine; where it is there."""
        shutil.copyfile(source, self.path(f"/root/{source.name}"))
        return f"/root/{source.name}"

    def show(self, unit: str, *names: str) -> Mapping[str, str]:
        """Properties of a unit."""
        lines = self.run(f"systemctl show {unit} -p {','.join(names)}").stdout.splitlines()
        return dict(line.split("=", 1) for line in lines)

    def property(self, unit: str, name: str) -> str:
        """One property of a unit."""
        return self.show(unit, name)[name]

    def journal(self, matches: str = "") -> list[dict[str, Any]]:
        """The entries of the journal, with all their fields."""
        text = self.run(f"journalctl --sync; journalctl --no-pager -o json --all {matches}").stdout
        return [json.loads(line) for line in text.splitlines()]

    def add_peer(self) -> None:
        """A second host beside it, in a network namespace of its own: "peer", at the other end of link up0."""
        self.run(f"set -e\n{_PEER}")


def _remove_cgroup(cgroup: Path) -> bool:
    for folder, _, _ in sorted(os.walk(cgroup), reverse=True):
        with contextlib.suppress(OSError):
            Path(folder).rmdir()
    return not cgroup.exists()
