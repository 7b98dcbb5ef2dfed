"""nodewalld as it is on a user's machine: the programs on PATH, every folder in its usual place, commands as typed.

Law: /etc, /var/lib, /root and /tmp have an upper half of their own, so nothing that is written there is seen outside of
the node. One of them to a node.
"""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
from collections.abc import Mapping

from lab.node import Node
from lab.processes import kill_entered
from lab.waiting import LabError, wait_for

FOLDER = "/root/work"
"""Where commands are typed; `./nodewalld` there is a copy of the configuration."""

_FOLDERS = """
mount -t tmpfs upper /mnt
mkdir /mnt/here
mount --bind $HERE /mnt/here
for place in etc var/lib root tmp; do
  mkdir -p /mnt/$place /mnt/work/$place
  mount -t overlay over -o lowerdir=/$place,upperdir=/mnt/$place,workdir=/mnt/work/$place /$place
done
mount --bind /run/alternatives /etc/alternatives
mount --bind /mnt/here $HERE
rm -rf /etc/nodewalld /var/lib/nodewalld
mkdir -p /etc/nodewalld /etc/iptables $FOLDER
cat > /etc/nodewalld/nodewalld.toml
cp -r /etc/nodewalld $FOLDER/
chmod -R go-w /etc/nodewalld $FOLDER
"""


class Installed:
    """A node with nodewalld installed, which `start` starts."""

    def __init__(self, node: Node, config: str) -> None:
        self.node = node
        self._process: subprocess.Popen[str] | None = None
        programs = node.directory / "bin"
        programs.mkdir()
        self.env = {"PATH": f"{programs}:{node.environment()['PATH']}"}
        for name, module in (("nodewallctl", "ctl"), ("nodewalld", "daemon")):
            path = programs / name
            path.write_text(f'#!/bin/sh\nexec {node.python()} -m nodewalld.commands.{module} "$@"\n')
            path.chmod(0o755)
        node.run(f"set -e\nHERE={node.directory}\nFOLDER={FOLDER}\n{_FOLDERS}", stdin=config)

    def start(self) -> None:
        """Start the daemon, and wait until everything is in force."""
        self._process = self.node.popen(["nodewalld"], log="nodewalld", env=self.env)
        enforcing = "nodewallctl status >/dev/null 2>&1"
        wait_for(lambda: self.run(enforcing, check=False).returncode == 0, what="nodewalld to enforce")

    def stop(self) -> None:
        """Let the daemon end; the rules stay."""
        if self._process is None:
            raise LabError("nodewalld was not started")
        kill_entered(self._process, signal.SIGTERM)
        self._process.wait(20)

    def run(self, line: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command line as a shell takes it, to its end; LabError when it fails and `check` is on."""
        return self.node.run(f"cd {FOLDER} && {line}", check=check, env=self.env)

    def popen(self, line: str) -> subprocess.Popen[str]:
        """A command that is left running, with its output in a pipe."""
        command = ["/bin/sh", "-c", f"cd {FOLDER} && exec {line}"]
        return self.node.popen(command, stdout=subprocess.PIPE, env=self.env)

    def typed(
        self, line: str, *, columns: int = 80, env: Mapping[str, str] | None = None, timeout: float = 60.0
    ) -> str:
        """What a command line prints on a terminal of so many columns, colours and all.

        LabError when nothing comes for `timeout` seconds.
        """
        near, far = pty.openpty()
        try:
            fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
            command = ["/bin/sh", "-c", f"cd {FOLDER} && {line}"]
            process = self.node.popen(command, stdout=far, env={**self.env, "TERM": "xterm", **(env or {})})
        finally:
            os.close(far)
        out = b""
        try:
            while more := self._read(near, timeout):
                out += more
        finally:
            os.close(near)
        process.wait(timeout)
        return out.decode().replace("\r\n", "\n")

    @staticmethod
    def _read(terminal: int, timeout: float) -> bytes:
        if not select.select([terminal], [], [], timeout)[0]:
            raise LabError(f"nothing was printed for {timeout:g} s")
        try:
            return os.read(terminal, 65536)
        except OSError:  # EIO is the end of a terminal
            return b""
