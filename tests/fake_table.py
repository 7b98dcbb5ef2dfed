"""A table that lives in a dict: takes what iptables-restore --noflush takes, as far as plans use it.

Checked against the real tools by `test_plan_kernel.py`, which runs the same plans through both.
"""

from nodewalld.core.observed import Observed
from nodewalld.core.ruletext import Rule, split
from nodewalld.core.words import Table


class FakeTable:
    """One table. Rules come back as they were written."""

    def __init__(self, table: Table, chains: dict[str, list[str]] | None = None) -> None:
        self.table = table
        self.chains: dict[str, list[str]] = {name: [] for name in table.builtin_chains}
        self.chains.update({name: list(rules) for name, rules in (chains or {}).items()})

    def observed(self) -> Observed:
        return Observed({name: tuple(Rule(text) for text in rules) for name, rules in self.chains.items()})

    def foreign(self) -> dict[str, list[str]]:
        """What isn't ours, in its order."""
        return {
            name: [text for text in rules if not Rule(text).tag]
            for name, rules in self.chains.items()
            if not name.startswith("NODEWALL-")
        }

    def commit(self, script: str) -> None:
        """All or nothing, as the kernel does it."""
        before = {name: list(rules) for name, rules in self.chains.items()}
        try:
            for line in script.splitlines():
                self._obey(line)
            self._check_jumps()
        except Exception:
            self.chains = before
            raise

    def _obey(self, line: str) -> None:
        if line.startswith(("*", "COMMIT")) or not line:
            return
        if line.startswith(":"):
            self.chains[line[1:].partition(" ")[0]] = []
            return
        command, chain, *rest = line.split(" ", 2)
        text = rest[0] if rest else ""
        if command == "-N":
            assert chain not in self.chains, f"{chain} exists"
            self.chains[chain] = []
        elif command == "-A":
            self.chains[chain].append(text)
        elif command == "-I":
            number, _, text = text.partition(" ")
            assert 1 <= int(number) <= len(self.chains[chain]) + 1, line
            self.chains[chain].insert(int(number) - 1, text)
        elif command == "-D":
            words = split(text)
            index = next((i for i, rule in enumerate(self.chains[chain]) if split(rule) == words), None)
            assert index is not None, f"no such rule: {line}"
            del self.chains[chain][index]
        elif command == "-F":
            self.chains[chain] = []
        elif command == "-X":
            assert not self.chains[chain], f"{chain} is not empty"
            users = [name for name, rules in self.chains.items() if any(Rule(rule).target == chain for rule in rules)]
            assert not users, f"{chain} is in use by {users}"
            del self.chains[chain]
        else:
            raise AssertionError(f"unknown command: {line}")

    def _check_jumps(self) -> None:
        for rules in self.chains.values():
            for text in rules:
                target = Rule(text).target
                assert not target.startswith("NODEWALL-") or target in self.chains, f"jump to nowhere: {text}"
