"""A shield that is being written: collects what both families' halves put into the one table."""

from nodewalld.core.shield.rules import (
    AddressSet,
    Base,
    Chain,
    Flow,
    Hook,
    Loopback,
    Marked,
    PortMap,
    Rule,
    Shield,
    Stage,
    Verdict,
    Word,
)


class Draft:
    """Collects what both halves write."""

    def __init__(self) -> None:
        self.chains: dict[str, list[Rule]] = {}
        self.bases: dict[str, Base] = {}
        self.sets: dict[str, AddressSet] = {}
        self.maps: dict[str, PortMap] = {}
        self.iptables_only: dict[str, str] = {}

    def base(self, hook: Hook, stage: Stage, mark: int) -> str:
        """The base chain of a hook, begun when it is first asked for."""
        name = f"{hook}{stage}"
        if name not in self.chains:
            self.bases[name] = Base(hook, stage)
            rules = self.chains[name] = []
            if mark:
                rules.append(Rule("reject", (Marked(mark),), Verdict(Word.DROP)))
            if hook is Hook.INPUT:
                rules.append(Rule("", (Loopback(),), Verdict(Word.RETURN)))
            if stage is Stage.LAST or hook in {Hook.INPUT, Hook.FORWARD}:
                rules.append(Rule("", (Flow.REPLY,), Verdict(Word.RETURN)))
        return name

    def shield(self) -> Shield:
        """All of it; sets that no rule asks are left out."""
        chains = tuple(Chain(name, tuple(rules), self.bases.get(name)) for name, rules in self.chains.items())
        only = tuple(self.iptables_only.items())
        return Shield(chains, tuple(self.sets.values()), tuple(self.maps.values()), only)
