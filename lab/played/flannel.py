"""flannel: looks whether its rules are there, and appends them again."""

from lab.played.player import TOOLS, Played, words
from lab.rivals import PODS


class Flannel(Played):
    """flannel's two sets of rules, of which one rule that is missing makes it append all again."""

    comm = "flanneld"
    _TOLD = '-m comment --comment "flanneld'

    def _rules(self, tool: str) -> list[tuple[str, str, str]]:
        pods = PODS[tool]
        forward, masq = f'{self._TOLD} forward"', f'{self._TOLD} masq"'
        return [
            ("filter", "FORWARD", f"{forward} -j FLANNEL-FWD"),
            ("filter", "FLANNEL-FWD", f"-s {pods} {forward} -j ACCEPT"),
            ("filter", "FLANNEL-FWD", f"-d {pods} {forward} -j ACCEPT"),
            ("nat", "POSTROUTING", f"{masq} -j FLANNEL-POSTRTG"),
            ("nat", "FLANNEL-POSTRTG", f"-s {pods} -d {pods} {masq} -j RETURN"),
        ]

    def start(self) -> None:
        """As its class says."""
        self.tick()

    def tick(self) -> None:
        """As its class says."""
        for tool in TOOLS:
            rules = self._rules(tool)
            if all(
                self.read(tool, "-w", "-t", table, "-C", chain, *words(rule)) is not None
                for table, chain, rule in rules
            ):
                continue
            for table, chain in (("filter", "FLANNEL-FWD"), ("nat", "FLANNEL-POSTRTG")):
                if self.read(tool, "-w", "-t", table, "-S", chain) is None:
                    self.write(tool, "-w", "-t", table, "-N", chain)
            for table, chain, rule in rules:
                self.write(tool, "-w", "-t", table, "-D", chain, *words(rule), may_fail=True)
                self.write(tool, "-w", "-t", table, "-A", chain, *words(rule))
        self.due_in(5.0)
