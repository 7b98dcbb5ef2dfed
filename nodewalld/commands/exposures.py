"""`nodewallctl exposures`: what of this node a stranger reaches, told to people or to programs.

Law: what is printed is what the walk has answered. People are told every door that opens; those that stay shut for the
same reason share a row. Nothing is left out of --json.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nodewalld.commands.common import GOOD, USAGE, Failure, Tools, print_json, print_lines, reading
from nodewalld.commands.render import Paint, columns, count, fold
from nodewalld.core.events import printable
from nodewalld.core.words import Family
from nodewalld.kernel.facing import listeners, outward
from nodewalld.kernel.node import gather
from nodewalld.walk import Kind, World
from nodewalld.walk.exposures import STRANGERS, Answer, Exposure, exposures
from nodewalld.walk.packet import PROTOCOLS, Ports, spell, spell_ports

_HEAD = ("PORT", "ADDRESS", "IP", "WHAT", "ANSWER", "GOVERNED BY")
_WIDTHS = (15, 15, 3, 0, 9, 16)
_MANY, _FEW = 40, 2
"""How many doors of one kind and answer are told by name: of those that open, and of those that don't."""
_OPEN = (Answer.REACHABLE, Answer.DEPENDS)
_ORDER = tuple(Answer)
_PROTOCOL_NAMES = {number: name for name, number in PROTOCOLS.items()}


def run(args: argparse.Namespace, _tools: Tools) -> int:
    """Gather, knock, tell. Exit status 0: what is reachable is for people to judge."""
    families = [family for family in Family if args.source is None or args.source.version == family.version]
    strangers = {family: int(args.source) if args.source else STRANGERS[family] for family in families}
    found: list[Exposure] = []
    asked = 0
    with reading("exposures"):
        for family, stranger in strangers.items():
            world = gather(family)
            _require(world, args.inside, stranger)
            sockets = listeners(family)
            for interface in (args.inside,) if args.inside else outward(world):
                asked += 1
                found += exposures(world, interface, sockets, stranger=stranger)
    if not asked:
        raise Failure("no interface of this node leads outside (name one: --in IFACE)")
    found.sort(key=lambda each: _ORDER.index(each.answer))
    if args.json:
        print_json({"exposures": [as_json(each, strangers[each.family]) for each in found]})
    else:
        print_lines(tell(found, strangers, Paint(sys.stdout)))
    return GOOD


def _require(world: World, interface: str, stranger: int) -> None:
    if world.kind_of(stranger) is Kind.LOCAL:
        raise Failure(f"{spell(stranger, world.family)} is this node's own, and no stranger", status=USAGE)
    known = world.groups
    if interface and known is not None and interface not in known:
        raise Failure(f"this node has no interface {interface} (it has {', '.join(sorted(known))})")


# --- for people


@dataclass(frozen=True)
class _Row:
    """What doors have in common that are told together."""

    protocol: str
    address: str
    what: str
    answer: Answer
    by: str


def tell(found: Sequence[Exposure], strangers: Mapping[Family, int], paint: Paint) -> Iterator[str]:
    """A table for each interface, what is open first, and at last the sum."""
    who = " or ".join(spell(address, family) for family, address in strangers.items())
    interfaces = dict.fromkeys(each.interface for each in found)
    if not interfaces:
        yield from fold(
            f"No door was found by which {who} could come in: nothing listens, and nothing leads on.", paint.width
        )
    for name in interfaces:
        yield paint(f"What {who} reaches of this node by {printable(name)}:", "bold")
        yield from _table([each for each in found if each.interface == name], paint)
        yield ""
    if interfaces:
        yield from fold(_sum(found), paint.width)


def _table(found: Sequence[Exposure], paint: Paint) -> Iterator[str]:
    widths = [width or paint.width - sum(_WIDTHS) - len(_WIDTHS) + 1 for width in _WIDTHS]
    yield paint(next(columns(_HEAD, widths)), "dim")
    for row, families, ports in _rows(found):
        versions = " ".join(str(family.version) for family in families)
        cells = (f"{_ranges(ports)}/{row.protocol}", row.address, versions, row.what, row.answer.value, row.by)
        for line in columns([printable(cell) for cell in cells], widths):
            yield paint(line, _colour(row))


def _colour(row: _Row) -> str:
    if row.answer is Answer.REACHABLE:
        return "yellow" if row.by == "nothing" else ""
    return "" if row.answer is Answer.DEPENDS else "green"


def _rows(found: Sequence[Exposure]) -> Iterator[tuple[_Row, tuple[Family, ...], list[Ports]]]:
    """Doors that differ in nothing but port or family are one row; of many alike the names are only counted."""
    families: dict[tuple[_Row, Ports], list[Family]] = {}
    for row, family, ports in _singly(found):
        families.setdefault((row, ports), []).append(family)
    rows: dict[tuple[_Row, tuple[Family, ...]], list[Ports]] = {}
    for (row, ports), known in families.items():
        rows.setdefault((row, tuple(known)), []).append(ports)
    order = sorted(rows.items(), key=lambda each: (_ORDER.index(each[0][0].answer), min(each[1])))
    return ((row, known, ports) for (row, known), ports in order)


def _singly(found: Sequence[Exposure]) -> Iterator[tuple[_Row, Family, Ports]]:
    """Each door once, with all the addresses at which it answers alike: "*" for all that the interface has."""
    alike: dict[object, set[object]] = {}
    own: dict[Family, set[int]] = {}
    for each in found:
        alike.setdefault(_kind(each), set()).add((each.protocol, each.ports))
        if each.own:
            own.setdefault(each.family, set()).add(each.address)
    addresses: dict[tuple[_Row, Family, Ports, bool], list[int]] = {}
    for each in found:
        many = len(alike[_kind(each)])
        named = many <= (_MANY if each.answer in _OPEN else _FEW)
        what = _what(each) if named else count(many, each.doors[0].kind)
        name = _PROTOCOL_NAMES.get(each.protocol, str(each.protocol))
        row = _Row(name, "", what, each.answer, governed(each))
        addresses.setdefault((row, each.family, each.ports, each.own), []).append(each.address)
    for (row, family, ports, is_own), known in addresses.items():
        everywhere = is_own and set(known) == own[family]
        text = "*" if everywhere else ", ".join(spell(address, family) for address in known)
        yield replace(row, address=text), family, ports


def _kind(each: Exposure) -> object:
    return each.doors[0].kind, each.answer, governed(each)


def _what(each: Exposure) -> str:
    """What it is: the program that listens, the Service, or where it leads."""
    texts = []
    for door in each.doors:
        kind = "" if door.kind == "listener" and door.name else door.kind
        name = door.name or (f"to {', '.join(each.to)}" if each.to else "")
        texts.append(f"{kind} {name}".strip())
    return ", ".join(dict.fromkeys(texts))


def governed(each: Exposure) -> str:
    """The entries that have ruled on it, else what has decided; "nothing" where a stranger simply gets through."""
    if each.answer is Answer.REACHABLE:
        return ", ".join(each.entries) or "nothing"
    if each.answer is Answer.CLOSED:
        return ", ".join(each.entries) or "nobody listens"
    if each.answer is Answer.DEPENDS:
        return ", ".join(dict.fromkeys((*each.entries, *each.by)))
    return ", ".join(each.entries or each.by) + (" (shield)" if each.shield else "")


def _ranges(ports: Iterable[Ports]) -> str:
    """Ports in order, neighbours as ranges."""
    merged: list[Ports] = []
    for first, last in sorted(ports):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(last, merged[-1][1])
        else:
            merged.append((first, last))
    return ", ".join(map(spell_ports, merged))


def _sum(found: Sequence[Exposure]) -> str:
    """How many doors are open, and how many of them nobody has ruled on."""
    doors: dict[Answer, set[object]] = {answer: set() for answer in Answer}
    free = set()
    for each in found:
        door = each.protocol, each.ports, each.doors[0].address
        doors[each.answer].add(door)
        if each.answer is Answer.REACHABLE and not each.entries:
            free.add(door)
    reachable, depends = len(doors[Answer.REACHABLE]), len(doors[Answer.DEPENDS])
    unclear = f", {depends} may be" if depends else ""
    return f"{count(reachable, 'door')} reachable, {len(free)} of them governed by nothing{unclear}."


# --- for programs


def as_json(each: Exposure, stranger: int) -> Mapping[str, Any]:
    """Everything of one knock."""
    return {
        "family": each.family,
        "from": spell(stranger, each.family),
        "interface": each.interface,
        "protocol": _PROTOCOL_NAMES.get(each.protocol, str(each.protocol)),
        "ports": list(each.ports),
        "address": spell(each.address, each.family),
        "what": [{"kind": door.kind, "name": door.name} for door in each.doors],
        "answer": each.answer,
        "to": list(each.to),
        "entries": list(each.entries),
        "by": list(each.by),
        "shield": each.shield,
        "governed_by": governed(each),
    }
