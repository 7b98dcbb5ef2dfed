"""Lints: what of a valid configuration can't do what it seems to, on this node or on any.

Law: no false alarm is worth more than completeness; what is not certain is not said. A lint is a function from the
configuration and what is known of the node to problems, each with a code that never changes; docs/lints.md explains
every code with an example that the suite runs.
"""

from collections.abc import Callable, Collection, Iterator

from nodewalld.core.config import Config, Problem
from nodewalld.core.lints import access, beside, neighbours, rules, shadow
from nodewalld.core.lints.facts import NodeFacts

Lint = Callable[[Config, NodeFacts], Iterator[Problem]]

_LINTS: tuple[Lint, ...] = (
    shadow.rules_in_vain,
    shadow.forwards_in_vain,
    shadow.zones_in_vain,
    access.denies_outside,
    access.allows_in_vain,
    access.leaves_ipv6_open,
    access.locks_out,
    rules.obsolete_targets,
    rules.inputs_after_dnat,
    rules.failsafe_overruled,
    neighbours.other_addresses,
    neighbours.open_elsewhere,
    neighbours.contested_positions,
    neighbours.marks_in_use,
    neighbours.set_types,
    beside.accepts_overruled,
    beside.node_ports_by_bpf,
    beside.node_ports_by_ipvs,
    beside.redirects_in_doubt,
    beside.other_backend,
)

CODES = frozenset(
    "accept-overruled allow-in-vain contested-position deny-outside-allow empty-zone failsafe-overruled "
    "family-off input-after-dnat ipv4-only locks-you-out mark-in-use never-matches no-failsafe nodeport-by-bpf "
    "nodeport-by-ipvs obsolete-target open-on-other-nodes other-addresses other-backend redirect-order set-type".split()
)
"""All codes, those of the loader's own warnings among them."""

ERRORS = frozenset({"set-type"})
"""What can't be enforced at all."""

NOTES = frozenset({"open-on-other-nodes"})
"""What no configuration of this node can cure: said, and never an error, not even when all warnings are."""


def lint(config: Config, facts: NodeFacts, ignored: Collection[str] = ()) -> tuple[Problem, ...]:
    """Everything that lints and the loader have to say, in the order of the files, but for the ignored codes."""
    found = [*config.warnings, *(problem for each in _LINTS for problem in each(config, facts))]
    kept = {problem: None for problem in found if problem.code not in ignored}
    return tuple(sorted(kept, key=lambda problem: (problem.where.rank, problem.where.file, problem.where.line)))
