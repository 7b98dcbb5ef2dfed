"""What lints know of a node: its rules as iptables-save prints them, its addresses, its sets, and who asks.

Law: facts are as good as they could be had. What could not be read is in `unread`, and a lint that needs it says
nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address

from nodewalld.core.bypasses import Paths
from nodewalld.core.desired import OWN_PREFIX
from nodewalld.core.environment import Environment
from nodewalld.core.lockout import Connection
from nodewalld.core.ruletext import Rule
from nodewalld.core.words import Family, Table

Chains = Mapping[str, tuple[Rule, ...]]
"""The chains of one table."""


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """A node as lints see it; empty where nothing is known.

    `rules`: every table of each family that could be read, in the backend that the node uses. `sets`: the type and
    family of existing ipsets that bear a name of the configuration's. `ipvs`: kube-proxy serves by IPVS. `connection`:
    the ssh connection that runs the command. `paths`: what leads past iptables' rules. `elsewhere`: the names of the
    chains that the other backend has.
    """

    environment: Environment = field(default_factory=Environment)
    rules: Mapping[Family, Mapping[Table, Chains]] = field(default_factory=dict)
    sets: Mapping[str, tuple[str, Family | None]] = field(default_factory=dict)
    ipvs: bool = False
    connection: Connection | None = None
    unread: tuple[str, ...] = ()
    paths: Paths = field(default_factory=Paths)
    elsewhere: Mapping[Family, Mapping[Table, frozenset[str]]] = field(default_factory=dict)

    def chains(self, family: Family, table: Table) -> Chains:
        """The chains of one table; none where they are not known."""
        return self.rules.get(family, {}).get(table, {})

    def foreign(self, family: Family, table: Table, chain: str) -> tuple[Rule, ...]:
        """The rules of one chain that are not ours."""
        return tuple(rule for rule in self.chains(family, table).get(chain, ()) if not is_ours(rule))

    @property
    def dual_stack(self) -> bool:
        """Whether others than its neighbours can reach the node by IPv6."""
        found = (ip_address(text) for text in self.environment.addresses.get(Family.IPV6, ()))
        return any(not address.is_link_local and not address.is_loopback for address in found)


def is_ours(rule: Rule) -> bool:
    """Whether a rule in a foreign chain is nodewalld's."""
    if "nodewalld:" not in rule.text and OWN_PREFIX not in rule.text:
        return False  # the words of most foreign rules are never taken apart
    return bool(rule.tag) or rule.target.startswith(OWN_PREFIX)


def every_foreign(chains: Chains) -> Iterator[tuple[str, Rule]]:
    """The rules of a table that are not ours, each with its chain."""
    for name, rules in chains.items():
        yield from ((name, rule) for rule in rules if not is_ours(rule))
