"""What of a configuration is made useless from beside iptables: by BPF programs, nftables' own chains, IPVS, the other
backend.

Law: only what is certain is said. Who may serve NodePorts past iptables is warned of only where no chain or table of
kube-proxy does it; a chain that refuses what it does not accept is named, whatever it may accept.
"""

import fnmatch
from collections.abc import Iterator

from nodewalld.core.bypasses import CALICO, CILIUM, BaseChain
from nodewalld.core.config import (
    Action,
    Anchor,
    AnchorKind,
    Config,
    Destination,
    PortEntry,
    Position,
    Problem,
    RuleEntry,
    Where,
)
from nodewalld.core.lints.dnat import NODE_PORTS
from nodewalld.core.lints.facts import NodeFacts, every_foreign
from nodewalld.core.lints.texts import REFUSALS, overlap, shown, take_apart
from nodewalld.core.words import Family, Table

_HOOKS = {"INPUT": "input", "FORWARD": "forward", "OUTPUT": "output"}
_CURES = {
    CILIUM: "a policy of Cilium's own, or a firewall before the node",
    CALICO: "a GlobalNetworkPolicy with preDNAT on host endpoints, or a firewall before the node",
}
_ROUTED = ("FORWARD", "DOCKER-USER")


def accepts_overruled(config: Config, facts: NodeFacts) -> Iterator[Problem]:
    """accept-overruled: an accept beside a chain of nftables' own that refuses what it doesn't accept itself."""
    for forward in config.forwards:
        accepts = forward.enforce and forward.action is Action.ACCEPT
        if accepts and (chain := _judge(facts, "FORWARD", config.daemon.families)):
            yield _overruled(forward.where, f"forward.{forward.name}", chain)
    for rule in config.rules:
        accepts = rule.enforce and rule.table is Table.FILTER and take_apart(rule.text).target == "ACCEPT"
        if accepts and (chain := _judge(facts, rule.chain, rule.families)):
            yield _overruled(rule.where, f"rule.{rule.name}.rule", chain)


def _judge(facts: NodeFacts, chain: str, families: tuple[Family, ...]) -> BaseChain | None:
    """A chain on the same hook that refuses in all these families."""
    found = (each for each in facts.paths.base_chains if each.refuses and each.hook == _HOOKS.get(chain))
    return next((each for each in found if families and set(families) <= set(each.families)), None)


def _overruled(where: Where, key: str, chain: BaseChain) -> Problem:
    message = f"opens nothing that {chain} does not accept as well: that one refuses all the rest"
    cure = "an accept in that chain, by the program that it belongs to"
    return Problem(where, key, message, cure, "accept-overruled")


def node_ports_by_bpf(config: Config, facts: NodeFacts) -> Iterator[Problem]:
    """nodeport-by-bpf: a guarded NodePort that BPF programs answer before any rule."""
    owner = facts.paths.ebpf
    for entry in config.ports if owner else ():
        common = overlap(entry.ports, (NODE_PORTS,)) if _guards_node(entry) else None
        if common and not any(_serves(facts, family) for family in config.daemon.families):
            message = f"{owner}'s BPF programs answer NodePorts before any rule: {shown(common)} is not guarded"
            yield Problem(entry.where, f"port.{entry.name}.ports", message, _CURES[owner], "nodeport-by-bpf")


def node_ports_by_ipvs(config: Config, facts: NodeFacts) -> Iterator[Problem]:
    """nodeport-by-ipvs: a NodePort refused where routed packets pass, while IPVS sends it through INPUT."""
    for rule in config.rules if facts.ipvs else ():
        if ports := _original_ports(rule):
            message = f"IPVS serves NodePorts, which pass INPUT: {rule.table} {rule.chain} never sees one of {ports}"
            cure = f"a [[port]] with ports = [{ports}]"
            yield Problem(rule.where, f"rule.{rule.name}.rule", message, cure, "nodeport-by-ipvs")


def _guards_node(entry: PortEntry) -> bool:
    return entry.enforce and entry.destination is Destination.LOCAL


def _serves(facts: NodeFacts, family: Family) -> bool:
    """Whether kube-proxy serves in this family; so it is taken where the rules are not known."""
    if family not in facts.rules:
        return True
    nat = facts.chains(family, Table.NAT)
    return "KUBE-SERVICES" in nat or family in facts.paths.kube_proxy_tables()


def _original_ports(rule: RuleEntry) -> str:
    """The NodePort that a rule for routed packets refuses as it was dialled; "" for every other rule."""
    text = take_apart(rule.text)
    if not rule.enforce or rule.chain not in _ROUTED or text.target not in REFUSALS:
        return ""
    words = [word for each in text.given("--ctorigdstport") if not each.negated for word in each.arguments]
    numbers = [int(word) for word in words if word.isdecimal()]
    within = bool(numbers) and all(NODE_PORTS.first <= number <= NODE_PORTS.last for number in numbers)
    return ", ".join(map(str, numbers)) if within else ""


def redirects_in_doubt(config: Config, facts: NodeFacts) -> Iterator[Problem]:
    """redirect-order: a redirect beside kube-proxy's nftables mode, whose chain has the same priority in nat."""
    served = set(facts.paths.kube_proxy_tables()) & set(config.daemon.families)
    for entry in config.ports if served else ():
        if entry.action is Action.REDIRECT and _guards_node(entry) and overlap(entry.ports, (NODE_PORTS,)):
            message = (
                "kube-proxy's nftables chain has the same priority in nat: the one made last rewrites first, and after "
                "kube-proxy's the refused are dropped without an answer"
            )
            yield Problem(entry.where, f"port.{entry.name}.action", message, 'action = "reject"', "redirect-order")


def other_backend(config: Config, facts: NodeFacts) -> Iterator[Problem]:
    """other-backend: a chain or an anchor that is there only in the backend in which nodewalld does not write."""
    for rule in config.rules:
        if rule.chain not in rule.table.builtin_chains:
            yield from _elsewhere(facts, rule.where, f"rule.{rule.name}.chain", rule.table, rule.chain, rule.families)
    for jump in config.jumps:
        yield from _elsewhere(facts, jump.where, f"jump.{jump.name}.to", jump.table, jump.to_chain, jump.families)
    for where, key, table, families, position in _positions(config):
        for family in families:
            anchors = (*position.after, *position.before)
            names = [_stands_only_elsewhere(facts, family, table, anchor) for anchor in anchors]
            if names and all(names):
                yield _problem(where, key, f"the anchor {names[0]}", table, family)
                break


def _positions(config: Config) -> Iterator[tuple[Where, str, Table, tuple[Family, ...], Position]]:
    for rule in config.rules:
        yield rule.where, f"rule.{rule.name}.position", rule.table, rule.families, rule.position
    for jump in config.jumps:
        yield jump.where, f"jump.{jump.name}.position", jump.table, jump.families, jump.position
    for forward in config.forwards:
        if forward.position:
            yield (
                forward.where,
                f"forward.{forward.name}.position",
                Table.FILTER,
                config.daemon.families,
                forward.position,
            )


def _elsewhere(
    facts: NodeFacts, where: Where, key: str, table: Table, chain: str, families: tuple[Family, ...]
) -> Iterator[Problem]:
    for family in families:
        known = family in facts.rules
        if (
            known
            and chain not in facts.chains(family, table)
            and chain in facts.elsewhere.get(family, {}).get(table, ())
        ):
            yield _problem(where, key, f"the chain {chain}", table, family)
            return


def _stands_only_elsewhere(facts: NodeFacts, family: Family, table: Table, anchor: Anchor) -> str:
    """The chain that an anchor means, when only the other backend has it; else ""."""
    if anchor.kind is not AnchorKind.TARGET or family not in facts.rules:
        return ""
    here = facts.chains(family, table)
    if any(fnmatch.fnmatchcase(rule.target, anchor.pattern) for _, rule in every_foreign(here)):
        return ""
    names = sorted(set(facts.elsewhere.get(family, {}).get(table, ())) - set(here))
    return next((name for name in names if fnmatch.fnmatchcase(name, anchor.pattern)), "")


def _problem(where: Where, key: str, what: str, table: Table, family: Family) -> Problem:
    message = (
        f"{what} of {table} ({family}) is there only in the other backend of iptables, where nodewalld does not write"
    )
    return Problem(where, key, message, "the other `daemon.backend`, or rules in one backend only", "other-backend")
