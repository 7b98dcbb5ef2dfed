"""What `nodewallctl plan` and `show` print of rules: numbers, counters and entries beside iptables' own words.

Law: a rule's text is folded and never cut. The comment that marks a rule as ours is left out, for the entry that it
names stands beside it; `--json` has the text whole.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from nodewalld.commands.render import Json, Paint, columns, count, fold, place, si
from nodewalld.core.events import printable
from nodewalld.core.ruletext import untagged

_CONTEXT = 2  # unchanged rules that are shown above and below a changed one
_ENTRIES_SHOWN = 2
_SET_LINES = 10  # entries of a set that are shown: it may hold 65,536
_OPTION = r"(?:! )?--?[A-Za-z]\S*(?: (?!-|! )\S+)*"
"""What of a rule stays on one line where it can: an option with its values."""

_MARKS = {"+": "green", "-": "red", " ": "dim"}


def plan(value: Json, paint: Paint) -> Iterator[str]:
    """Each chain that would change: why, and its rules with their numbers before and after; then the sets' entries."""
    changes: Sequence[Json] = value.get("changes") or ()
    chains = {place(chain): chain for chain in value.get("chains") or ()}
    for heading, group in _by_place(changes):
        reasons = ", ".join(dict.fromkeys(str(change["reason"]) for change in group if change.get("reason")))
        yield paint(heading, "bold") + printable(f": {reasons}" if reasons else "")
        for change in group:
            whom = _named(change.get("entries") or ())
            why = printable(str(change.get("why") or "")) + (f" ({whom})" if whom else "")
            yield from (f"  {line}" for line in fold(why, paint.width - 2))
        chain = chains.get(heading)
        yield from _difference(chain, paint) if chain else _commands(group, paint)
        yield ""
    yield f"{count(len(changes), 'change')}." if changes else "Nothing to change."


def _by_place(changes: Iterable[Json]) -> Iterator[tuple[str, list[Json]]]:
    places: dict[str, list[Json]] = {}
    for change in changes:
        places.setdefault(place(change), []).append(change)
    return iter(places.items())


def _difference(chain: Json, paint: Paint) -> Iterator[str]:
    """The rules of one chain, those left out that neither change nor stand beside one that does."""
    rules: Sequence[Json] = chain.get("rules") or ()
    if rules:
        yield paint("  BEFORE AFTER", "dim")
    changed = [index for index, rule in enumerate(rules) if _mark(rule) != " "]
    near = {i for index in changed for i in range(index - _CONTEXT, index + _CONTEXT + 1)}
    for shown, group in groupby(enumerate(rules), lambda numbered: numbered[0] in near):
        if not shown:
            yield paint(f"{'...':>14} {count(len(list(group)), 'rule')} more, unchanged", "dim")
            continue
        for _, rule in group:
            yield from _rule(rule, paint)


def _mark(rule: Json) -> str:
    return "+" if rule.get("before") is None else "-" if rule.get("after") is None else " "


def _rule(rule: Json, paint: Paint) -> Iterator[str]:
    mark, whom = _mark(rule), _named(rule.get("entries") or ())
    text = printable(untagged(str(rule.get("rule") or ""))) + (f" [{whom}]" if whom else "")
    numbers = f"  {rule.get('before') or '':>6} {rule.get('after') or '':>5}"
    for line in columns((numbers, mark, text), (14, 1, paint.width - 17), _OPTION):
        yield paint(line, _MARKS[mark])


def _commands(changes: Iterable[Json], paint: Paint) -> Iterator[str]:
    """What would be done to a set, which is no chain of rules."""
    commands = [str(command) for change in changes for command in change.get("commands") or ()]
    for command in commands[:_SET_LINES]:
        mark = "-" if command.startswith("del") else "+"
        for line in columns((f"  {mark}", printable(command)), (3, paint.width - 4), _OPTION):
            yield paint(line, _MARKS[mark])
    if len(commands) > _SET_LINES:
        yield paint(f"  ... {len(commands) - _SET_LINES} more", "dim")


def show(rows: Iterable[Json], paint: Paint) -> Iterator[str]:
    """The rules chain by chain, in the order of the rows: a chain that another one interrupts is continued below."""
    rows = list(rows)
    entries = min(24, max((len(_entry(row)) for row in rows), default=0))
    widths = (5, 8, 7, entries, paint.width - entries - 24)
    seen: set[str] = set()
    for heading, group in groupby(rows, place):
        if seen:
            yield ""
        yield paint(heading, "bold") + (", continued" if heading in seen else "")
        seen.add(heading)
        yield paint(next(columns(("  POS", " PACKETS", "  BYTES", "ENTRY", "RULE"), widths)), "dim")
        for row in group:
            numbers = (f"{row.get('position') or '':>5}", f"{si(row.get('packets')):>8}", f"{si(row.get('bytes')):>7}")
            yield from columns(
                (*numbers, _entry(row), printable(untagged(str(row.get("rule") or "")))), widths, _OPTION
            )
    if not seen:
        yield "No rule of nodewalld is in force."


def iptables_only(entries: Sequence[Json], paint: Paint) -> Iterator[str]:
    """What stands in iptables alone, and why; nothing where the shield has everything."""
    if entries:
        yield ""
        yield paint("iptables only (not in the shield)", "bold")
    for one in entries:
        cells = f"  {printable(str(one.get('entry')))}", printable(str(one.get("reason")))
        yield from columns(cells, (26, paint.width - 27), _OPTION)


def _entry(row: Json) -> str:
    return _named(row.get("entries") or ()) or printable(str(row.get("entry") or ""))


def _named(entries: Sequence[object]) -> str:
    """The first of these entries: a jump may serve a hundred ports."""
    names = [printable(str(entry)) for entry in entries[:_ENTRIES_SHOWN]]
    more = len(entries) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")
