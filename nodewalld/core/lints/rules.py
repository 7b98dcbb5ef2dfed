"""What can't work of a [[rule]]: targets that are gone, INPUT for ports that are rewritten before, a failsafe shut.

Law: only what a rule's own words say is judged; what is not understood of them makes it none of a lint's business.
"""

from collections.abc import Iterator, Mapping

from nodewalld.core.config import Config, Place, Problem, ProtocolPorts, RuleEntry
from nodewalld.core.desired import OWN_PREFIX
from nodewalld.core.lints.dnat import NODE_PORTS, Rewrites, Rewritten, serves_by_ipvs
from nodewalld.core.lints.facts import NodeFacts
from nodewalld.core.lints.texts import REFUSALS, Text, overlap, shown, take_apart
from nodewalld.core.words import Family, Table

_OBSOLETE = {
    "MIRROR": ("Linux 2.6", "nothing like it is left"),
    "SAME": ("Linux 2.6.25", "SNAT with --persistent"),
    "QUEUE": ("Linux 3.5", "NFQUEUE"),
    "ULOG": ("Linux 3.17", "NFLOG"),
}
"""Targets, with the kernel that took them away, and what serves instead (kernel: net/ipv4/netfilter, net/netfilter)."""

_PASSING = ("KUBE-", OWN_PREFIX)
"""Chains of kube-proxy's and ours at INPUT: whatever they don't refuse comes back from them."""


def obsolete_targets(config: Config, _facts: NodeFacts) -> Iterator[Problem]:
    """obsolete-target: a target that kernels no longer have."""
    for rule in config.rules:
        target = take_apart(rule.text).target
        if target in _OBSOLETE:
            gone, instead = _OBSOLETE[target]
            message = f"the target {target} is gone since {gone}"
            yield Problem(rule.where, f"rule.{rule.name}.rule", message, instead, "obsolete-target")


def inputs_after_dnat(config: Config, facts: NodeFacts) -> Iterator[Problem]:
    """input-after-dnat: refusing a port in INPUT that nat PREROUTING rewrites, so that INPUT never sees it."""
    rewrites = {family: Rewrites(facts.chains(family, Table.NAT)) for family in config.daemon.families}
    for rule in config.rules:
        text = take_apart(rule.text)
        if not rule.enforce or rule.chain != "INPUT" or text.target not in REFUSALS or text.given("-d"):
            continue
        found = [(family, why) for family in rule.families if (why := _rewritten(text, rewrites[family]))]
        if not found and _in_range(rule, text, facts, rewrites):
            why = "lies in the range of NodePorts, which kube-proxy rewrites before INPUT"
            found = [(family, f"{shown(text.ports[0])}/{text.protocol} {why}") for family in rule.families[:1]]
        if found:
            families = " and ".join(family.value for family, _ in found)
            message = f"{found[0][1]} ({families}): {rule.table} INPUT never sees a packet for it"
            cure = f"a [[port]] with ports = [{shown(text.ports[0])}]"
            yield Problem(rule.where, f"rule.{rule.name}.rule", message, cure, "input-after-dnat")


def _rewritten(text: Text, rewrites: Rewrites) -> str:
    for each in rewrites.found:
        common = overlap(text.ports, each.ports) if each.protocol == text.protocol else None
        if common and not _is_spared(text, each):
            return f"{shown(common)}/{text.protocol} is rewritten before INPUT by {each.chain} in nat"
    return ""


def _is_spared(text: Text, rewritten: Rewritten) -> bool:
    """Whether a rule may mean just those packets that are not rewritten: of lo, or of containers to their host."""
    interfaces = {word for each in text.given("-i") for word in each.arguments if not each.negated}
    if "lo" in interfaces or interfaces & rewritten.spared:
        return True
    return bool(rewritten.spared) and any(not each.negated for each in text.given("-s"))


def _in_range(rule: RuleEntry, text: Text, facts: NodeFacts, rewrites: Mapping[Family, Rewrites]) -> bool:
    if facts.ipvs or not text.ports or not text.protocol or text.given("-i") or text.given("-s"):
        return False
    within = all(NODE_PORTS.first <= span.first and span.last <= NODE_PORTS.last for span in text.ports)
    return within and any(
        rewrites[family].reaches_node_ports and not serves_by_ipvs(facts.chains(family, Table.NAT))
        for family in rule.families
    )


def failsafe_overruled(config: Config, facts: NodeFacts) -> Iterator[Problem]:
    """failsafe-overruled: a rule, ours or another program's, that refuses a port which the failsafe promises."""
    for rule in config.rules:
        text = take_apart(rule.text)
        inward = rule.chain in ("PREROUTING", "INPUT")
        above = rule.position.place in (Place.FIRST, Place.EARLY)  # below, others may have let the port pass
        if not (rule.enforce and inward and above and text.target in REFUSALS and _for_everybody(text, config)):
            continue
        promised = _promised(text, config)
        if promised and not any(_lets_pass(other, rule, promised) for other in config.rules):
            message = f"refuses {_shown(promised)}, which [failsafe] promises and can't keep open against a [[rule]]"
            cure = "a [[port]] and `failsafe.from`, or leave the port out of [failsafe]"
            yield Problem(rule.where, f"rule.{rule.name}.rule", message, cure, "failsafe-overruled")
    for family in config.daemon.families:
        yield from _overruled_by_others(config, facts, family)


def _for_everybody(text: Text, config: Config) -> bool:
    """Whether it refuses all that come, or all but some while the failsafe is for all."""
    everybody = not config.failsafe.sources.peers
    return all(
        (each.option in ("-p", "--dport", "--dports") and not each.negated)
        or (each.option == "-s" and each.negated and everybody)
        for each in text.conditions
    )


def _promised(text: Text, config: Config) -> ProtocolPorts | None:
    """The first of the failsafe's ports that a rule is about."""
    if not text.ports and (text.given("--dport") or text.given("--dports")):
        return None
    return next((each for each in config.failsafe.ports if _concerns(text, each)), None)


def _concerns(text: Text, each: ProtocolPorts) -> bool:
    return text.protocol in ("", each.protocol) and (not text.ports or bool(overlap(text.ports, (each.ports,))))


def _shown(each: ProtocolPorts) -> str:
    return f"{shown(each.ports)}/{each.protocol}"


def _lets_pass(other: RuleEntry, rule: RuleEntry, promised: ProtocolPorts) -> bool:
    """Whether another [[rule]] of that chain makes exceptions for the port: then it is limited by hand."""
    text = take_apart(other.text)
    beside = (other.table, other.chain) == (rule.table, rule.chain)
    return beside and text.target in ("ACCEPT", "RETURN") and _concerns(text, promised)


def _overruled_by_others(config: Config, facts: NodeFacts, family: Family) -> Iterator[Problem]:
    for table, chain in ((Table.RAW, "PREROUTING"), (Table.MANGLE, "PREROUTING"), (Table.FILTER, "INPUT")):
        for foreign in facts.foreign(family, table, chain):
            text = take_apart(foreign.text)
            if text.target in REFUSALS and text.ports and text.only("-p", "--dport", "--dports"):
                promised = _promised(text, config)
                if promised:
                    rule = f"{table} {chain} ({family}): {foreign.text}"
                    message = f"{_shown(promised)} is refused by a rule that is not ours, in {rule}"
                    cure = "take that rule out; nodewalld overrules no other program"
                    where = config.failsafe.where
                    yield Problem(where, "failsafe.ports", message, cure, "failsafe-overruled")
                    return
            elif text.target not in REFUSALS and not text.target.startswith(_PASSING):
                break  # it may let the port pass before
