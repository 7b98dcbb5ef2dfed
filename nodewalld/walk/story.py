"""What people ask next: who rewrote the packet, and which refusal can't see it because of that.

Law: a note only says what the walk has shown, or what it shows for the packet as it was dialled.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from nodewalld.core.words import Table
from nodewalld.walk.hooks import FORWARD, INPUT, OUTPUT
from nodewalld.walk.packet import State, Tracked, endpoint
from nodewalld.walk.rules import Rule
from nodewalld.walk.table import Hit, Walker
from nodewalld.walk.targets import Fate
from nodewalld.walk.verdict import Path, Step, Verdict
from nodewalld.walk.world import World

_FEW = 3
_REFUSALS = frozenset({Fate.DROP, Fate.REJECT})


def notes(verdict: Verdict, world: World) -> tuple[str, ...]:
    """Sentences about what was to refuse a packet and doesn't: which rule can't see it and why, or is not there."""
    found: dict[str, list[tuple[Step, Hit]]] = {}
    seen: set[Hashable] = set()
    blind = _Blind(verdict, world)
    for path in verdict.paths:
        rewritten = next(_rewritings(path), None)
        if not rewritten or path.passes is False:
            continue
        key = (rewritten[1].rule, rewritten[1].after.flow, path.state.outside)
        if key not in seen:
            seen.add(key)
            for subject in blind.subjects(path, rewritten[1]):
                found.setdefault(subject, []).append(rewritten)
    blinded = tuple(f"{subject} can't see this packet: {_why(causes)}." for subject, causes in found.items())
    return (*blinded, *dict.fromkeys(_instead(verdict)))


def _instead(verdict: Verdict) -> Iterator[str]:
    for path in verdict.paths:
        if path.end and path.end.is_last_resort:
            yield (
                "iptables should have answered it and did not: the shield drops it instead "
                "(what is missing: nodewallctl plan)."
            )


def _rewritings(path: Path) -> Iterator[tuple[Step, Hit]]:
    for step in path.steps:
        for hit in step.hits:
            if hit.before.flow[1::2] != hit.after.flow[1::2]:
                yield step, hit


def _why(causes: Sequence[tuple[Step, Hit]]) -> str:
    """Who rewrote it to what; more than a few ways are counted."""
    texts = list(dict.fromkeys(f"{hit.rule.chain} {{}}to {_where(hit.after)}" for _, hit in causes))
    step = causes[0][0]
    first = texts[0].format("has rewritten it ") + f" in {step.place or f'{step.table} {step.hook}'}"
    others = [text.format("") for text in texts[1:_FEW]]
    if len(texts) > _FEW:
        others.append(f"{len(texts) - _FEW} more")
    return f"{first} (or {', '.join(others)})" if others else first


def _where(state: State) -> str:
    ports = state.destination_ports
    return endpoint(state.destination, ports, state.family, with_ports=ports != (0, 0))


@dataclass
class _Blind:
    """Looks for refusals of filter that would stop a packet as it was dialled; each question is asked once."""

    verdict: Verdict
    world: World
    _asked: dict[tuple[str, State], tuple[Rule, ...]] = field(default_factory=dict)

    def subjects(self, path: Path, hit: Hit) -> Iterator[str]:
        """The refusals that can't see the packet, or else the chain that it never comes to."""
        of_node = self.verdict.packet.from_node
        told = False
        for hook in (OUTPUT,) if of_node else (INPUT, FORWARD) if path.state.outside else (INPUT,):
            for rule in self._refusals(hook, self._dialled(path, hit, hook)):
                told = True
                yield f"A {rule.target} in filter {hook} ({rule.chain} {rule.number}: {rule.text})"
        if not told and path.state.outside and not of_node and all(step.hook != INPUT for step in path.steps):
            yield "A rule in filter INPUT"

    def _dialled(self, path: Path, hit: Hit, hook: str) -> State:
        """The packet at a hook, as if nobody had rewritten it."""
        packet = self.verdict.packet
        outside = "" if hook == INPUT else path.state.outside
        return replace(
            hit.before,
            tracked=Tracked.NEW,
            mark=hit.after.mark,
            assumed=frozenset(),
            inside="" if packet.from_node else packet.inside,
            outside=hit.before.outside if packet.from_node else outside,
        )

    def _refusals(self, hook: str, dialled: State) -> tuple[Rule, ...]:
        if (hook, dialled) not in self._asked:
            ways = (
                way
                for backend in self.world.rules
                for way in Walker(self.world).walk(dialled, backend, Table.FILTER, hook)
            )
            rules = (way.rule for way in ways if way.fate in _REFUSALS and way.rule)
            self._asked[hook, dialled] = tuple(dict.fromkeys(r for r in rules if r not in self.verdict.deciders))
        return self._asked[hook, dialled]
