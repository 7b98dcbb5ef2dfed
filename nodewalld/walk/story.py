"""What people ask next: who rewrote the packet, and which refusal can't see it because of that.

Law: a note only says what the walk has shown, or what it shows for the packet as it was dialled.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from nodewalld.core.words import Table
from nodewalld.walk.hooks import FORWARD, INPUT, OUTPUT
from nodewalld.walk.packet import State, Tracked, endpoint
from nodewalld.walk.table import Hit, Walker
from nodewalld.walk.targets import Fate
from nodewalld.walk.verdict import Path, Step, Verdict
from nodewalld.walk.world import World

_FEW = 3
_REFUSALS = frozenset({Fate.DROP, Fate.REJECT})


def notes(verdict: Verdict, world: World) -> tuple[str, ...]:
    """Sentences about a packet that gets through though it was to be refused: which rule can't see it, and why."""
    found: dict[str, list[tuple[Step, Hit]]] = {}
    for path in verdict.paths:
        rewritten = next(_rewritings(path), None)
        if rewritten and path.passes is not False:
            for subject in _blind(path, rewritten, verdict, world):
                found.setdefault(subject, []).append(rewritten)
    return tuple(f"{subject} can't see this packet: {_why(causes)}." for subject, causes in found.items())


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


def _blind(path: Path, rewritten: tuple[Step, Hit], verdict: Verdict, world: World) -> Iterator[str]:
    """Refusals of filter that would stop the packet as it was dialled, or the chain that it never comes to."""
    _, hit = rewritten
    passed = {each.hook for each in path.steps}
    of_node = verdict.packet.from_node
    hooks = [OUTPUT] if of_node else [INPUT, FORWARD] if path.state.outside else [INPUT]
    told = False
    for hook in hooks:
        dialled = replace(
            hit.before,
            tracked=Tracked.NEW,
            mark=hit.after.mark,
            inside="" if hook == OUTPUT else verdict.packet.inside,
            outside=hit.before.outside if of_node else "" if hook == INPUT else path.state.outside,
        )
        for backend in world.rules:
            for way in Walker(world).walk(dialled, backend, Table.FILTER, hook):
                if way.fate in _REFUSALS and way.rule and way.rule not in verdict.deciders:
                    told = True
                    where = f"{way.rule.chain} {way.rule.number}: {way.rule.text}"
                    yield f"A {way.rule.target} in filter {hook} ({where})"
    if not told and INPUT not in passed and not of_node and path.state.outside:
        yield "A rule in filter INPUT"
