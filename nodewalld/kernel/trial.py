"""Tries rules for real where they can harm nobody: in a network namespace that is made for it and thrown away.

Law: iptables' own --test is no check (it accepts what the commit refuses), so a rule text is good when a private kernel
namespace took it. Without root that takes a user namespace; where the system forbids both, nothing is claimed.
"""

import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nodewalld.core.desired import Desired, DesiredTable, Line
from nodewalld.core.ruletext import split
from nodewalld.core.words import Backend, Family, Table
from nodewalld.kernel.firewall import tool
from nodewalld.kernel.lockwatch import LOCK_FILE_VARIABLE
from nodewalld.kernel.process import ProgramError, Result, run

# How many parts an element of a foreign set has decides its type: --match-set NAME src,dst wants two.
_SET_TYPES = {1: "hash:net", 2: "hash:net,port", 3: "hash:ip,port,net"}


class NoTrialError(Exception):
    """The system doesn't allow a private namespace; the text says why."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An entry that the kernel or its tool refused, with its own words."""

    entry: str
    family: Family
    words: str


@dataclass(frozen=True, slots=True)
class _Room:
    """A private network namespace, held open by a process."""

    enter: tuple[str, ...]
    environment: Mapping[str, str]

    def run(self, argv: Sequence[str], stdin: str) -> Result:
        return run([*self.enter, *argv], stdin=stdin, env=self.environment)


def attempt(desired: Mapping[Family, Desired], backend: Backend) -> tuple[Refusal, ...]:
    """Load everything into a private namespace; what it refuses. Raises NoTrialError where there is none."""
    with _room() as room:
        refusals: list[Refusal] = []
        for family, wanted in desired.items():
            _make_sets(room, family, wanted)
            for table, content in wanted.tables.items():
                refusals.extend(_Trial(room, family, backend, table, content).refusals())
        return tuple(refusals)


@contextmanager
def _room() -> Iterator[_Room]:
    # Root keeps its user namespace: inside another one, uids that it doesn't map can't be matched (-m owner).
    flags, enter = (["-n"], ["-n"]) if os.geteuid() == 0 else (["-Urn"], ["-U", "-n", "--preserve-credentials"])
    with tempfile.TemporaryDirectory(prefix="nodewalld-") as folder:
        try:
            holder = subprocess.Popen(
                ["unshare", *flags, "sh", "-c", "echo ready; exec cat"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        except OSError as error:
            raise NoTrialError(f"unshare can't be started: {error.strerror}") from error
        with holder:
            if holder.stdout is None or holder.stdout.readline() != "ready\n":
                said = holder.stderr.read().strip() if holder.stderr else ""
                raise NoTrialError(f"this system forbids private namespaces: {said or 'unshare failed'}")
            lock = {LOCK_FILE_VARIABLE: str(Path(folder) / "xtables.lock")}
            yield _Room(("nsenter", "-t", str(holder.pid), *enter, "--"), lock)


def _make_sets(room: _Room, family: Family, desired: Desired) -> None:
    known = {entry.name for entry in desired.sets}
    wanted = dict.fromkeys(known, 1)
    for table in desired.tables.values():
        for line in (line for chain in table.chains for line in chain.lines):
            words = split(line.text)
            for index, word in enumerate(words[:-2]):
                if word == "--match-set":
                    wanted.setdefault(words[index + 1], words[index + 2].count(",") + 1)
    inet = "inet" if family is Family.IPV4 else "inet6"
    script = "".join(f"create {name} {_SET_TYPES.get(n, 'hash:net')} family {inet}\n" for name, n in wanted.items())
    if script:
        room.run(["ipset", "restore", "-exist"], script)


class _Trial:
    """One table of one family."""

    def __init__(self, room: _Room, family: Family, backend: Backend, table: Table, content: DesiredTable) -> None:
        self.room, self.family, self.table, self.content = room, family, table, content
        self.restore = tool(family, backend, "restore")

    def refusals(self) -> Iterator[Refusal]:
        """Everything at once; and when that is refused, by halves down to the texts that are to blame."""
        lines = [(chain.name, line) for chain in self.content.chains for line in chain.lines]
        direct = [(p.chain, Line(p.entries[0], p.text)) for p in self.content.placements if _is_text(p.entries)]
        if not self._refused([*lines, *direct]):
            return
        base = [(chain, line) for chain, line in lines if not line.entry.startswith("rule/")]
        words = self._refused(base)
        if words:
            yield Refusal("", self.family, words)
            return
        texts = [(chain, line) for chain, line in lines if line.entry.startswith("rule/")]
        yield from self._halve(base, [*texts, *direct])

    def _halve(self, base: list[tuple[str, Line]], texts: list[tuple[str, Line]]) -> Iterator[Refusal]:
        words = self._refused([*base, *texts])
        if not words:
            return
        if len(texts) == 1:
            yield Refusal(texts[0][1].entry, self.family, words)
            return
        middle = len(texts) // 2
        yield from self._halve(base, texts[:middle])
        yield from self._halve(base, texts[middle:])

    def _refused(self, lines: Sequence[tuple[str, Line]]) -> str:
        """What the tool says of these lines as the whole table; "" when it takes them."""
        foreign = {name for p in self.content.placements for name in (p.chain, p.needs, p.creates) if name}
        foreign |= {line.needs for _, line in lines if line.needs}
        chains = [chain.name for chain in self.content.chains]
        chains += sorted(foreign - set(self.table.builtin_chains))
        jumps = [f"-A {p.chain} {p.text}" for p in self.content.placements if not _is_text(p.entries)]
        script = [
            f"*{self.table}",
            *(f":{chain} - [0:0]" for chain in chains),
            *(f"-A {chain} {line.text}" for chain, line in lines),
            *jumps,
            "COMMIT",
        ]
        try:
            result = self.room.run([self.restore], "\n".join(script) + "\n")
        except ProgramError as error:
            raise NoTrialError(str(error)) from error
        if result.status == 0:
            return ""
        said = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        return "; ".join(line for line in said if not line.startswith("Try `")) or f"status {result.status}"


def _is_text(entries: Sequence[str]) -> bool:
    """Whether a placement is a `[[rule]]` that stands in the foreign chain itself."""
    return len(entries) == 1 and entries[0].startswith("rule/")
