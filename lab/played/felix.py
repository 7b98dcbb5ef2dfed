"""Felix: reads a whole table, and moves its top-level rules where they do not lead or end their chains."""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.played.player import TOOLS, Played


class Felix(Played):
    """Felix 3.26.4 with the top-level rules of a capture, whose own chains must be loaded already.

    Options: `mode` ("Insert" or "Append"), `capture` (a path without ".v4.save").
    """

    comm = "calico-felix"
    _REFRESH = 90.0
    _AFTER_WRITE = (1.0, 2.0, 4.0)

    def __init__(self, spec: Mapping[str, Any]) -> None:
        super().__init__(spec)
        self._insert = spec["mode"] == "Insert"
        self._wanted = {
            tool: _top_level(Path(f"{spec['capture']}.v{number}.save"))
            for tool, number in zip(TOOLS, "46", strict=True)
        }
        self._looks: list[float] = []

    def start(self) -> None:
        """As its class says."""
        self.refresh()

    def refresh(self) -> None:
        """Look at everything, and write what is not as it wants it."""
        wrote = self._wrote
        for tool in TOOLS:
            self._apply(tool)
        if self._wrote > wrote:
            self._looks = list(self._AFTER_WRITE)
        self.due_in(self._looks.pop(0) if self._looks else self._REFRESH)

    def tick(self) -> None:
        """As its class says."""
        self.refresh()

    def _apply(self, tool: str) -> None:
        for table, chains in self._wanted[tool].items():
            saved = _rules(self.read(f"{tool}-save", "-t", table) or "")
            moved: dict[str, list[str]] = {}
            for chain, (first, last) in chains.items():
                lead, end = (first, last) if self._insert else ([], first + last)
                moved[chain] = list(_moved(chain, saved.get(chain, []), lead, end))
            if lines := [line for each in moved.values() for line in each]:
                text = "\n".join([f"*{table}", *lines, "COMMIT", ""])
                self._takes += [(time.time(), tool, table, chain) for chain, each in moved.items() if each]
                self.write(f"{tool}-restore", "--noflush", "--verbose", "-w", "10", text=text)


def _moved(chain: str, present: Sequence[str], lead: Sequence[str], end: Sequence[str]) -> Iterator[str]:
    """The lines that delete by value and write again what is not in its place; none when all is."""
    ours = [rule for rule in present if "cali:" in rule]
    right = [*present[: len(lead)]] == [*lead] and [*present[len(present) - len(end) :]] == [*end]
    if right and len(ours) == len(lead) + len(end):
        return
    yield from (f"-D {chain} {rule}" for rule in ours)
    yield from (f"-I {chain} {rule}" for rule in reversed(lead))
    yield from (f"-A {chain} {rule}" for rule in end)


def _rules(saved: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in saved.splitlines():
        text = re.sub(r"^\[\d+:\d+\] ", "", line)
        if text.startswith("-A "):
            _, chain, rule = text.split(" ", 2)
            found.setdefault(chain, []).append(rule)
    return found


def _top_level(capture: Path) -> dict[str, dict[str, tuple[list[str], list[str]]]]:
    """By table and chain: Calico's rules in built-in chains, those that lead and those that end."""
    found: dict[str, dict[str, tuple[list[str], list[str]]]] = {}
    for part in re.split(r"^\*", capture.read_text(), flags=re.MULTILINE)[1:]:
        chains = {}
        for chain, rules in _rules(part).items():
            ours = [rule for rule in rules if "cali:" in rule]
            if chain.isupper() and ours:
                chains[chain] = (
                    [rule for rule in ours if "-j cali-" in rule],
                    [rule for rule in ours if "-j cali-" not in rule],
                )
        if chains:
            found[part.split("\n")[0]] = chains
    return found
