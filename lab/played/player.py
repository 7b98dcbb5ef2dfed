"""What they have in common: tools that are counted when they write, and a timetable."""

import json
import os
import re
import select
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TOOLS = ("iptables", "ip6tables")


class Played(ABC):
    """One of them."""

    comm: str

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self._spec = spec
        self._clock = float(spec["clock"])
        self._wrote = 0
        self._takes: list[tuple[float, str, str, str]] = []
        self._due = float("inf")
        Path("/proc/self/comm").write_text(self.comm)

    @abstractmethod
    def start(self) -> None:
        """What it does when it is started."""

    @abstractmethod
    def tick(self) -> None:
        """What it does when it is time."""

    def due_in(self, seconds: float) -> None:
        """Have `tick` called after so many of its seconds."""
        self._due = time.monotonic() + seconds / self._clock

    def read(self, *words: str) -> str | None:
        """What a tool prints; None when it fails."""
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        return done.stdout if done.returncode == 0 else None

    def write(self, *words: str, text: str | None = None, may_fail: bool = False) -> None:
        """Have a tool change the rules."""
        done = subprocess.run(words, input=text, capture_output=True, text=True, check=False)
        if done.returncode and not may_fail:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr}\n{text or ''}")
        self._wrote += 1

    def chain(self, tool: str, table: str, chain: str) -> list[str]:
        """The rules of a chain, without "-A CHAIN"."""
        printed = self.read(tool, "-w", "-t", table, "-S", chain) or ""
        head = f"-A {chain} "
        return [line.removeprefix(head) for line in printed.splitlines() if line.startswith(head)]

    def serve(self) -> None:
        """Do what standard input says, and what is due, until it ends."""
        os.set_blocking(0, False)
        buffer = b""
        while True:
            if select.select([0], [], [], max(0.0, min(self._due - time.monotonic(), 3600.0)))[0]:
                data = os.read(0, 4096)
                if not data:
                    return
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    word, *more = line.decode().split()
                    getattr(self, word)(*more)
                    print(json.dumps({"writes": self._wrote, "takes": self._takes}), flush=True)
            elif time.monotonic() >= self._due:
                self._due = float("inf")
                self.tick()

    def rest(self) -> None:
        """Do nothing; the answer tells of the writes."""
        return


def words(rule: str) -> list[str]:
    """A rule's words as arguments: what is quoted is one."""
    return [part.strip('"') for part in re.findall(r'"[^"]*"|\S+', rule)]
