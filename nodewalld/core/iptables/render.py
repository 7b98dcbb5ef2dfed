"""Decisions -> desired: our chains, and one rule of ours at each position in a chain that others write too.

Law: what is marked for a reject and is not rejected is dropped by a backstop behind filter.
"""

from collections.abc import Sequence

from nodewalld.core.config import Action
from nodewalld.core.decide import Decisions
from nodewalld.core.desired import Desired, Line, Placement
from nodewalld.core.iptables.forwards import write_routed
from nodewalld.core.iptables.gates import Gates
from nodewalld.core.iptables.matches import marked_words, reject_words
from nodewalld.core.iptables.writer import EARLY, OURS, Writer, chain_name
from nodewalld.core.ruletext import join, tag_words
from nodewalld.core.words import Table

_VERDICTS = frozenset({"ACCEPT", "DROP", "RETURN", "QUEUE"})
# Targets that are extensions and not chains (iptables-extensions(8), and those of older releases). A [[rule]] that
# jumps to any other name waits for that chain.
_EXTENSIONS = frozenset(
    "AUDIT CHECKSUM CLASSIFY CLUSTERIP CONNMARK CONNSECMARK CT DNAT DNPT DSCP ECN HL HMARK IDLETIMER LED LOG MARK "
    "MASQUERADE NETMAP NFLOG NFQUEUE NOTRACK RATEEST REDIRECT REJECT SECMARK SET SNAT SNPT SYNPROXY TCPMSS "
    "TCPOPTSTRIP TEE TOS TPROXY TRACE TTL ULOG MIRROR SAME".split()
)


def render(decisions: Decisions) -> Desired:
    """The iptables form of decisions in their family."""
    writer = Writer(decisions)
    for table in (Table.MANGLE, Table.NAT):
        Gates(writer, table).write()
    _write_rejects(writer)
    for routed in decisions.routed:
        write_routed(writer, routed)
    _write_rules(writer)
    return writer.desired()


def _write_rejects(writer: Writer) -> None:
    """What is marked in mangle is rejected in filter, and dropped behind it if filter let it pass."""
    d = writer.decisions
    marking = [j.refusal for j in d.judgements] + [zone.verdict for zone in d.zones]
    marking += [r.verdict for r in d.routed if r.position is None]
    if not any(refusal.action is Action.REJECT and refusal.enforce for refusal in marking):
        return
    marked = marked_words(d)
    reject = chain_name("", "reject")
    for hook in Table.FILTER.builtin_chains:
        chain = writer.chain_at(Table.FILTER, hook, EARLY, OURS, "reject")
        writer.add(Table.FILTER, chain, "reject", marked, ("-j", reject))
    for words in reject_words(writer.family):
        writer.add(Table.FILTER, reject, "reject", words)
    for table, hook in ((Table.SECURITY, "INPUT"), (Table.MANGLE, "POSTROUTING")):
        chain = writer.chain_at(table, hook, EARLY, OURS, "reject")
        writer.add(table, chain, "reject", marked, ("-j", "DROP"))


def _write_rules(writer: Writer) -> None:
    """[[rule]] and [[jump]]. A text with RETURN or -g stands in the foreign chain itself, where alone it means that."""
    for raw in sorted(writer.decisions.rules, key=lambda raw: raw.order):
        rule, table = raw.rule, raw.rule.table
        needs = needed_chain(raw.words)
        words = raw.words if rule.enforce else without_target(raw.words)
        text = join([*tag_words(raw.entry), *words])
        if rule.enforce and stands_itself(raw.words):
            place = Placement(rule.chain, raw.position, raw.order, raw.entry, text, (raw.entry,), needs)
            writer.stand(table, place)
            continue
        chain = writer.chain_at(table, rule.chain, raw.position, raw.order, raw.entry)
        writer.chains[table][chain].append(Line(raw.entry, text, needs if rule.enforce else ""))
    for reach in writer.decisions.jumps:
        jump = reach.jump
        own = not jump.to_chain.startswith(("KUBE-", "cali-", "CNI-"))
        creates, needs = (jump.to_chain, "") if own else ("", jump.to_chain)
        text = join(["-j", jump.to_chain])
        place = Placement(jump.from_chain, reach.position, reach.order, "", text, (reach.entry,), needs, creates)
        writer.placements[jump.table].append(place)


def _target_index(words: Sequence[str]) -> int:
    return next((i for i, w in enumerate(words[:-1]) if w in {"-j", "--jump", "-g", "--goto"}), -1)


def stands_itself(words: Sequence[str]) -> bool:
    """Whether a rule text means another thing one chain deeper: RETURN and goto return from the chain they are in."""
    index = _target_index(words)
    return index >= 0 and (words[index] in {"-g", "--goto"} or words[index + 1] == "RETURN")


def needed_chain(words: Sequence[str]) -> str:
    """The foreign chain that a rule text jumps to; "" for verdicts and extension targets."""
    index = _target_index(words)
    target = words[index + 1] if index >= 0 else ""
    return "" if target in _VERDICTS or target in _EXTENSIONS else target


def without_target(words: Sequence[str]) -> tuple[str, ...]:
    """A rule text that only counts: up to its target, whose options follow it."""
    index = _target_index(words)
    return tuple(words if index < 0 else words[:index])
