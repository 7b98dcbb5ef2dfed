"""`nodewallctl explain`: one described packet, walked through the live rules, told to people or to programs.

Law: what is printed is the verdict's; nothing is judged here. Rules are never cut, only wrapped to 80 columns.
"""

import argparse
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from nodewalld.commands.common import ATTENTION, GOOD, USAGE, Failure, Tools, print_json, print_lines, reading
from nodewalld.commands.packet import Described, described
from nodewalld.commands.render import Paint
from nodewalld.core.events import printable
from nodewalld.core.ruletext import bare_words, join
from nodewalld.core.words import Family
from nodewalld.kernel.node import gather
from nodewalld.walk import (
    EPHEMERAL,
    PASSES,
    End,
    Packet,
    Path,
    Rule,
    Step,
    Tracked,
    Unclear,
    Verdict,
    World,
    judge,
    notes,
)
from nodewalld.walk.nft import NftRule
from nodewalld.walk.packet import ICMP, ICMPV6, PROTOCOLS, State, endpoint, spell
from nodewalld.walk.rules import words_of
from nodewalld.walk.table import Hit, Supposed
from nodewalld.walk.targets import NOTHING_SEEN

T = TypeVar("T")
_WIDTH = 80
_MOST_WAYS = 8
_COLOURS = {True: "green", False: "red", None: "yellow"}
_WORDS = {True: "passes", False: "stopped", None: "undecided"}


def run(args: argparse.Namespace, _tools: Tools) -> int:
    """Gather, judge, tell. Exit status 0 when the packet gets through, 3 when not, or when that can't be told."""
    said = described(args)
    with reading("explain"):
        world = gather(_family(said))
    packet = describe(said, world)
    verdict = judge(packet, world)
    told = notes(verdict, world)
    if args.json:
        print_json(as_json(verdict, told))
    else:
        print_lines(tell(verdict, told, Paint(sys.stdout)))
    return GOOD if verdict.passes else ATTENTION


def _family(said: Described) -> Family:
    address = said.source.address or said.destination.address
    return Family.IPV6 if address and address.version == 6 else Family.IPV4


def describe(said: Described, world: World) -> Packet:
    """The packet that was meant, on this node: the interface that its source is behind, the node's own address."""
    protocol = PROTOCOLS[said.protocol]
    six = world.family is Family.IPV6
    icmp = None
    if said.protocol == "icmp":
        protocol = ICMPV6 if six else ICMP
        icmp = said.icmp or ((128, 0) if six else (8, 0))
    for name in filter(None, (said.inside, said.outside)):
        _require(name, world)
    source = int(said.source.address) if said.source.address else 0
    inside = "" if said.from_node else said.inside or _behind(source, world)
    to = said.destination.address
    destination = int(to) if to else _own_address(said, inside, world)
    return Packet(
        world.family,
        protocol,
        source,
        destination,
        source_ports=(said.source.port,) * 2 if said.source.port else EPHEMERAL,
        destination_ports=(said.destination.port,) * 2,
        icmp=icmp,
        inside=inside,
        outside=said.outside,
        from_node=said.from_node,
        mark=said.mark,
        tracked=Tracked(said.state.upper()),
    )


def _behind(source: int, world: World) -> str:
    try:
        found = world.routes.lookup(source)
    except Unclear:
        found = ()
    devices = {route.device for route in found}
    if len(devices) != 1 or "" in devices:
        raise Failure(f"no single route says by which interface {spell(source, world.family)} comes (--in IFACE)")
    device = devices.pop()
    if world.kind_of(source) == "local":
        raise Failure(f"{spell(source, world.family)} is this node's own (--from-node, or --in IFACE)", status=USAGE)
    return device


def _own_address(said: Described, inside: str, world: World) -> int:
    if said.from_node:
        return 1 if world.family is Family.IPV6 else 0x7F000001
    found = world.address_of(inside)
    if not found:
        raise Failure(f"{inside} has no {world.family} address of this node (write DESTINATION as ADDRESS:PORT)")
    return found


def _require(interface: str, world: World) -> None:
    known = world.groups
    if known is not None and interface not in known:
        raise Failure(f"this node has no interface {interface} (it has {', '.join(sorted(known))})")


# --- for people


def tell(verdict: Verdict, told: Iterable[str], paint: Paint) -> Iterator[str]:
    """The packet, its way rule by rule, what else is to say, and at last what becomes of it."""
    yield paint(_packet(verdict.packet), "bold")
    yield ""
    first = verdict.paths[0]
    many = len(verdict.paths) > 1
    if many:
        yield from _heading(1, verdict, first.supposed, paint)
    yield from _steps(first.steps, paint)
    if many:
        yield from _end_line(first, paint)
    for number, path in enumerate(verdict.paths[1:_MOST_WAYS], 2):
        yield ""
        yield from _heading(number, verdict, path.supposed[_common(first.supposed, path.supposed) :], paint)
        yield from _differing(first, path, paint)
        yield from _end_line(path, paint)
    yield ""
    for note in told:
        yield from _wrapped(printable(note), "", "  ")
    yield from _verdict(verdict, paint)


def _packet(packet: Packet) -> str:
    ports = packet.has_ports
    name = next((name for name, number in PROTOCOLS.items() if number == packet.protocol), str(packet.protocol))
    source = endpoint(packet.source, packet.source_ports, packet.family, with_ports=ports)
    to = endpoint(packet.destination, packet.destination_ports, packet.family, with_ports=ports)
    kind = f" type {packet.icmp[0]}/{packet.icmp[1]}" if packet.icmp else ""
    way = "from this node" if packet.from_node else f"by {packet.inside}"
    mark = f", mark {packet.mark:#x}" if packet.mark else ""
    return f"{name}{kind} {source} -> {to}, {way}, {packet.tracked}{mark}"


def _heading(number: int, verdict: Verdict, supposed: Iterable[Supposed], paint: Paint) -> Iterator[str]:
    yield paint(f"way {number} of {len(verdict.paths)}, if", "bold")
    for one in supposed:
        place = f"{one.rule.chain} {one.rule.number}: " if one.rule else ""
        yield from _wrapped(f"{'' if one.holds else 'not '}{place}{printable(one.text)}", "  ", "      ")


def _common(one: Sequence[T], other: Sequence[T], *, key: Callable[[T], object] = lambda each: each) -> int:
    """How many of the first are alike."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if key(a) != key(b)), min(len(one), len(other)))


def _steps(steps: Iterable[Step], paint: Paint) -> Iterator[str]:
    for step in steps:
        yield from _step(step, step.hits, paint)


def _step(step: Step, hits: Iterable[Hit], paint: Paint) -> Iterator[str]:
    place = f"{step.table} {step.hook} ({step.backend})" if step.table else step.place or step.hook
    yield paint(place, "dim")
    if step.text:
        yield from _wrapped(printable(step.text), "  ", "      ")
    for hit in hits:
        yield from _hit(hit, paint)


def _hit(hit: Hit, paint: Paint) -> Iterator[str]:
    rule = hit.rule
    entry = f" [{rule.tag}]" if rule.tag else ""
    maybe = "may match: " if hit.supposed and (not rule.target or rule.target in NOTHING_SEEN) else ""
    text = f"{rule.chain} {rule.number}{printable(entry)}: {maybe}{_bare(rule)}"
    for number, line in enumerate(_wrapped(text, "  ", "      ")):
        yield paint(line, "bold") if entry and not number else line
    for change in changes(hit.before, hit.after):
        yield f"      {change}"


def _bare(rule: Rule) -> str:
    """The rule without its comments, which are the longest part of kube-proxy's."""
    text = rule.text if isinstance(rule, NftRule) else join(bare_words(words_of(rule.text)))
    return printable(text) or "(counts)"


def changes(before: State, after: State) -> Iterator[str]:
    """What a rule did to the packet."""
    if (before.destination, before.destination_ports) != (after.destination, after.destination_ports):
        yield f"to {_spelled(before.destination, before.destination_ports, before)} -> " + _spelled(
            after.destination, after.destination_ports, after
        )
    if (before.source, before.source_ports) != (after.source, after.source_ports):
        yield f"from {_spelled(before.source, before.source_ports, before)} -> " + _spelled(
            after.source, after.source_ports, after
        )
    if before.mark != after.mark:
        yield f"mark {_mark(before.mark)} -> {_mark(after.mark)}"
    if before.connmark != after.connmark:
        yield f"connection mark {_mark(before.connmark)} -> {_mark(after.connmark)}"
    if before.tracked != after.tracked:
        yield f"conntrack does not see it: {after.tracked}"


def _spelled(address: int, ports: tuple[int, int], state: State) -> str:
    return endpoint(address, ports, state.family, with_ports=ports != (0, 0))


def _mark(mark: int | None) -> str:
    return "unknown" if mark is None else f"{mark:#x}"


def _differing(first: Path, path: Path, paint: Paint) -> Iterator[str]:
    """The steps from where another way leaves the first, to where its rules are the same again."""
    same = _common(first.steps, path.steps, key=_told)
    rest = list(path.steps[same:])
    if not rest:
        return
    tail = _common(first.steps[same:][::-1], rest[::-1], key=_shape)
    tail = min(tail, len(rest) - 1)
    there = first.steps[same : same + 1]
    before = there[0].hits if there and (there[0].table, there[0].place) == (rest[0].table, rest[0].place) else ()
    yield from _step(rest[0], rest[0].hits[_common(before, rest[0].hits) :], paint)
    yield from _steps(rest[1 : len(rest) - tail], paint)
    if tail:
        yield "then by the same rules as in way 1"


def _told(step: Step) -> object:
    return step.hook, step.table, step.backend, step.place, step.hits, step.text


def _shape(step: Step) -> object:
    """What is the same though addresses differ."""
    return step.hook, step.table, step.backend, step.place, tuple(hit.rule for hit in step.hits), step.state.outside


def _end_line(path: Path, paint: Paint) -> Iterator[str]:
    if path.alike:
        yield f"({path.alike} more, under other conditions, came to the same on the way)"
    for line in _wrapped(f"=> {_ending(path)}", "", "     "):
        yield paint(line, _COLOURS[path.passes])


def _ending(path: Path) -> str:
    end = path.end
    if end is None:
        return "no end"
    where = f" in {end.table} {end.hook} ({end.backend})" if end.table else f" in {end.place}" if end.place else ""
    if end.rule is None:
        if end.outcome in PASSES:
            text = f"{end.outcome} {end.text}"
        elif end.table or end.place:
            text = f"{end.outcome} by {end.text}{where if end.place else ''}"
        else:
            text = f"{end.outcome}: {end.text}"
    else:
        ours = f"{end.rule.tag}, " if end.rule.tag else ""
        why = f" ({end.text})" if end.text else ""
        text = f"{end.outcome} by {ours}{end.rule.chain} {end.rule.number}{where}: {_bare(end.rule)}{why}"
    doubts = f", unless stopped by what is not understood: {'; '.join(path.doubts)}" if path.passes is None else ""
    return printable(text + (doubts if path.doubts else ""))


def _verdict(verdict: Verdict, paint: Paint) -> Iterator[str]:
    endings = dict.fromkeys(_ending(path) for path in verdict.paths)
    word = {True: "It gets through", False: "It is stopped", None: "It can't be told"}[verdict.passes]
    lines = [f"{word}: {next(iter(endings))}"] if len(endings) == 1 else [f"{word}, in one of these ways:", *endings]
    for number, text in enumerate(lines[: _MOST_WAYS + 1]):
        for line in _wrapped(text, "  " if number else "", "      " if number else "  "):
            yield paint(line, _COLOURS[verdict.passes])
    if len(lines) > _MOST_WAYS + 1:
        yield f"  and {len(lines) - _MOST_WAYS - 1} more (--json has them all)"


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    ) or [first.rstrip()]


# --- for programs


def as_json(verdict: Verdict, told: Iterable[str]) -> Mapping[str, Any]:
    """Everything of a verdict."""
    return {
        "packet": _packet(verdict.packet),
        "verdict": _WORDS[verdict.passes],
        "outcomes": sorted(verdict.outcomes),
        "deciders": [_rule(rule) for rule in verdict.deciders],
        "notes": list(told),
        "ways": [_path(path) for path in verdict.paths],
    }


def _rule(rule: Rule) -> dict[str, Any]:
    return {"chain": rule.chain, "position": rule.number, "rule": rule.text, "entry": rule.tag}


def _path(path: Path) -> dict[str, Any]:
    end = path.end
    supposed = [{"if": one.text, "holds": one.holds, **(_rule(one.rule) if one.rule else {})} for one in path.supposed]
    return {
        "outcome": end.outcome if end else None,
        "text": end.text if end else "",
        "by": {**_place(end), **(_rule(end.rule) if end.rule else {})} if end else None,
        "supposed": supposed,
        "doubts": list(path.doubts),
        "alike": path.alike,
        "steps": [
            {
                **_place(step),
                "text": step.text,
                "rules": [
                    {**_rule(hit.rule), "supposed": hit.supposed, "changes": list(changes(hit.before, hit.after))}
                    for hit in step.hits
                ],
            }
            for step in path.steps
        ],
    }


def _place(where: Step | End) -> dict[str, Any]:
    """Table and backend of iptables, or the place of another base chain."""
    other = {"place": where.place} if where.place else {}
    return {"hook": where.hook, "table": where.table, "backend": where.backend, **other}
