"""A packet's path as a story: each rule that matched, by its text, what became of the packet, and by whom.

Law: the kernel's word comes first; only where it gives no verdict (legacy) is one taken from the rule's target. What
was not seen is not claimed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from nodewalld.core.ruletext import Rule, join
from nodewalld.core.shield.rules import TABLE as SHIELD
from nodewalld.core.tracing.header import Header
from nodewalld.core.tracing.path import Kind, Path, Sighting
from nodewalld.core.tracing.traffic import TAG
from nodewalld.core.words import Backend, Family

_VERDICTS = {"DROP": "drop", "REJECT": "drop", "ACCEPT": "accept", "RETURN": "return"}
_HOOKS = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")


@dataclass(frozen=True, slots=True)
class Said:
    """What stands at a spot.

    `text` is "" where there is no rule (the end of a chain, a policy) or where it is not known any more; `number` is
    the rule's in its chain, from 1, or None; `policy` is the verdict of a chain's policy. `sure` is False when the
    rules have changed since the packet passed.
    """

    text: str = ""
    number: int | None = None
    policy: str = ""
    sure: bool = True
    kind: Kind = Kind.RULE


@dataclass(frozen=True, slots=True)
class Step:
    """One spot of the path. `entry` names the entry of the configuration that the rule is of, "" for others' rules.

    `packet` is told where it differs from the step before, and so are the interfaces; else None and "". `mark` is what
    the step has made of the fwmark; None where it left it alone.
    """

    backend: Backend
    tables: str
    table: str
    chain: str
    kind: Kind
    rule: str
    number: int | None
    entry: str
    verdict: str
    sure: bool
    packet: Header | None
    coming: str
    going: str
    mark: int | None


@dataclass(frozen=True, slots=True)
class Story:
    """One packet from its first rule to its last; `outcome` is a sentence without a full stop."""

    family: Family
    packet: Header
    coming: str
    steps: tuple[Step, ...]
    verdict: str
    outcome: str


def tell(path: Path, said: Sequence[Said]) -> Story:
    """The story of a path, without the trace's own rule; `said` are what stands at its spots, one for each."""
    steps = tuple(step for step in _steps(path, said) if not step.entry.startswith(TAG))
    verdict, outcome = _outcome(path.sightings, steps)
    return Story(path.header.family, path.header, path.coming, steps, verdict, outcome)


def _steps(path: Path, said: Sequence[Said]) -> Iterator[Step]:
    packet, coming, going = path.header, path.coming, ""
    for sighting, found, (before, mark) in zip(path.sightings, said, pairwise(_marks(path.sightings)), strict=True):
        now = sighting.header or packet
        seen = bool(sighting.header)
        spot, rule = sighting.spot, Rule(found.text)
        entry, text = rule.tag, join(rule.bare) if rule.tag else found.text
        if (spot.tables, spot.table) == ("inet", SHIELD):
            text, _, comment = found.text.partition(' comment "')
            entry = comment.rstrip('"')
        comes, goes = (sighting.coming, sighting.going) if seen else (coming, going)
        yield Step(
            spot.backend,
            spot.tables,
            spot.table,
            spot.chain,
            found.kind,
            text,
            found.number,
            entry,
            sighting.verdict or found.policy or _VERDICTS.get(rule.target, ""),
            found.sure,
            replace(now, detail="") if now.ends != packet.ends else None,
            comes if comes != coming else "",
            goes if goes != going else "",
            mark if mark != before else None,
        )
        packet, coming, going = now, comes, goes


def _marks(sightings: Sequence[Sighting]) -> Iterator[int]:
    """The mark before each step and after the last: nf_tables tells what a rule has made of it, legacy what was."""
    legacy = [sighting.spot.backend is Backend.LEGACY for sighting in sightings]
    yield sightings[0].mark if legacy[:1] == [True] else 0
    for index, sighting in enumerate(sightings):
        following = index + 1 < len(sightings) and legacy[index] and legacy[index + 1]
        yield sightings[index + 1].mark if following else sighting.mark


def _outcome(sightings: Sequence[Sighting], steps: Sequence[Step]) -> tuple[str, str]:
    """The verdict ("drop", "accept" or "" where it isn't known), and the sentence."""
    if not steps:
        return "", "no rule has seen it"
    last = steps[-1]
    place = f"{last.table} {last.chain}"
    if (last.tables, last.table) == ("inet", SHIELD):
        place = f"the shield ({last.chain})"
    if last.verdict == "drop":
        by = f"{last.entry}, " if last.entry else "the policy, " if last.kind is Kind.POLICY else ""
        return "drop", f"dropped by {by}in {place}" if by else f"dropped in {place}"
    if last.verdict == "queue":
        return "", f"handed to a program by {place}"
    hook = next((step.chain for step in reversed(steps) if step.chain in _HOOKS), "")
    going = next((sighting.going for sighting in reversed(sightings) if sighting.header), "")
    if hook == "INPUT":
        return "accept", "delivered to this node"
    if going and hook in ("FORWARD", "POSTROUTING"):
        return "accept", f"sent out by {going}"
    if hook == "OUTPUT":  # a DNAT may have led it elsewhere since
        return "accept", f"sent; no rule has seen it after {place}"
    return "", f"not seen again after {place}"
