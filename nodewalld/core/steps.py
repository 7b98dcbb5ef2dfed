"""The steps of one table's transaction, as values, and how iptables-restore is told each.

Law: a step in a foreign chain says which observed rule it means as well as what the rule says. So the same plan can be
written as text, where a number that has become stale would hit somebody else's rule, and as messages to the kernel,
which name a rule by its handle and are refused when the ruleset has moved on since it was observed.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Command:
    """Whatever concerns no rule of a foreign chain, in iptables-restore's words."""

    text: str


@dataclass(frozen=True, slots=True)
class Delete:
    """Take a rule of ours out of a foreign chain: the one at `index` of the observed chain, which reads `text`."""

    chain: str
    index: int
    text: str

    @property
    def command(self) -> str:
        """For iptables-restore."""
        return f"-D {self.chain} {self.text}"


@dataclass(frozen=True, slots=True)
class Insert:
    """Put a rule of ours into a foreign chain, when the steps before this one are done.

    It goes directly above the rule at index `above` of the observed chain, which stays there, and is rule `number` of
    the chain then. With None it goes to the end, whatever others append meanwhile: without a number, or where nothing
    foreign was above it, before that.
    """

    chain: str
    text: str
    number: int | None
    above: int | None

    @property
    def command(self) -> str:
        """For iptables-restore."""
        where = f"-A {self.chain}" if self.number is None else f"-I {self.chain} {self.number}"
        return f"{where} {self.text}"


Step = Command | Delete | Insert


def render(step: Step) -> str:
    """A step as iptables-restore takes it."""
    return step.text if isinstance(step, Command) else step.command


def chain_of(command: str) -> str:
    """The chain that a line of a restore script is about: `:CHAIN - [0:0]`, `-A CHAIN ...`."""
    words = command.split(" ", 2)
    return words[0][1:] if command.startswith(":") else words[1]
