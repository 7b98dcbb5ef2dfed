"""A node whose daemon takes one configuration after another, and tables of packets with the verdicts they must get.

Used by the tests that prove rules with packets. One node and one daemon serve many tests: what a test changes in
the node it puts back.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from lab.daemon import Daemon
from lab.layout import FAMILIES, Address
from lab.node import TOOLS, Node
from lab.traffic import Answer, Probe, Protocol, Target, Verdict, connect_all
from lab.waiting import wait_for

OPEN, REFUSED, TIMEOUT, FORBIDDEN = Verdict.OPEN, Verdict.REFUSED, Verdict.TIMEOUT, Verdict.FORBIDDEN
SHUT = {"drop": TIMEOUT, "reject": REFUSED, "redirect": REFUSED}
"""How a client sees each action: silence, an answer that says no, a closed port."""


class Guarded:
    """A node and its daemon, which is started by the first configuration."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.daemon = Daemon(node, "", start=False)
        self._config = ""

    def enforce(self, config: str) -> Daemon:
        """Have this configuration in force; nothing is left to do when it is."""
        if self.daemon.running and config == self._config:
            return self.daemon
        if not self.daemon.running:
            self.daemon.configure(config)
            self.daemon.start()
            self.daemon.wait_ready()
            assert self.daemon.status_text.startswith("Enforcing"), self.daemon.status_text
        else:
            self.daemon.configure(config)
            result = self.daemon.ctl("reload", "--json")
            assert result.returncode == 0, result.stdout + result.stderr
            assert json.loads(result.stdout)["state"] == "enforcing", self.daemon.status()
        self._config = config
        return self.daemon

    def nothing_to_do(self) -> None:
        """`nodewallctl plan` finds the kernel as it should be."""
        plan = self.daemon.ctl("plan")
        assert plan.returncode == 0, plan.stdout + plan.stderr

    def settled(self) -> None:
        """Wait until `nodewallctl plan` finds the kernel as it should be."""
        wait_for(lambda: self.daemon.ctl("plan").returncode == 0, what="everything to be in force again")

    def counted(self, family: str) -> Counter[str]:
        """The packets that the rules of each entry have seen in a family, by `nodewallctl show`."""
        found: Counter[str] = Counter()
        for row in json.loads(self.daemon.ctl("show", "--json").stdout)["rules"]:
            if row["family"] == family:
                found[row["entry"]] += row["packets"]
        return found

    @contextmanager
    def killed(self) -> Iterator[None]:
        """Without the daemon, which is killed, and in force again afterwards."""
        self.daemon.kill9()
        try:
            yield
        finally:
            self.enforce(self._config)


def both(*addresses: Address) -> str:
    """A TOML list of these addresses in both families."""
    return json.dumps([address.of(family) for address in addresses for family in FAMILIES])


def iptables(node: Node, family: str, *rules: str) -> None:
    """Run iptables or ip6tables of the node's backend once for each rule, as a neighbour would."""
    node.run(" && ".join(f"{TOOLS[family]} -w {rule}" for rule in rules))


def dial(source: Address | None, family: str, to: Address | str, port: int, protocol: Protocol = "tcp") -> Probe:
    """An attempt from one of the client's addresses."""
    target: Target = (to if isinstance(to, str) else to.of(family), port)
    return Probe("client", target, source.of(family) if source else "", protocol)


def dial_from(ns: str, family: str, to: Address, port: int, protocol: Protocol = "tcp") -> Probe:
    """An attempt from a namespace, with the source that its routes choose."""
    return Probe(ns, (to.of(family), port), "", protocol)


def verdicts(node: Node, probes: Mapping[str, Probe]) -> dict[str, Verdict]:
    """What became of each attempt, all made at the same time."""
    answers = connect_all(node, list(probes.values()))
    return {name: answer.verdict for name, answer in zip(probes, answers, strict=True)}


def expect(node: Node, table: Mapping[str, tuple[Probe, Verdict]]) -> None:
    """Make all attempts at once; those that end otherwise are shown by name."""
    answers = connect_all(node, [probe for probe, _ in table.values()])
    wrong = {
        name: f"{answer} instead of {wanted}"
        for (name, (_, wanted)), answer in zip(table.items(), answers, strict=True)
        if answer.verdict is not wanted
    }
    assert not wrong, "\n".join(f"{name}: {what}" for name, what in wrong.items())


def answer_to(node: Node, probe: Probe) -> Answer:
    """What became of one attempt."""
    return connect_all(node, [probe])[0]


def eventually(node: Node, probe: Probe, wanted: Verdict) -> None:
    """Wait until an attempt ends this way."""
    wait_for(lambda: answer_to(node, probe).verdict is wanted, what=f"{probe} to be {wanted}")


def slot(rules: list[str], text: str) -> int:
    """Where the one rule that contains `text` stands."""
    found = [number for number, rule in enumerate(rules) if text in rule]
    assert len(found) == 1, f"{text!r} stands at {found} in {rules}"
    return found[0]
