"""What `nodewallctl` prints for people: plain text within the terminal's columns, within 80 where there is none.

Law: input is the JSON of the daemon and of the planner, which may be older or newer than this program: what
is not known is left out. Colour adds nothing that the words don't say. Tables are laid out here, because a library for
them would double the time that `status` takes, and be larger than all that the packages carry.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import zip_longest
from typing import Any, TextIO

from nodewalld.core.events import duration, printable

Json = Mapping[str, Any]

_COLOURS = {"red": "31", "green": "32", "yellow": "33", "bold": "1", "dim": "2"}
_STATE_COLOURS = {
    "enforcing": "green",
    "degraded": "red",
    "starting": "yellow",
    "paused": "yellow",
    "idle": "yellow",
}
_FAMILIES = {"ipv4": "IPv4", "ipv6": "IPv6"}
_WIDTH, _NARROWEST = 80, 60
_SCREEN = 24  # lines
_LABEL = 14  # columns before what a line of the status says


class Paint:
    """Puts colour on words, on terminals whose user has not said no (https://no-color.org); knows the `width`."""

    def __init__(self, stream: TextIO, env: Mapping[str, str] = os.environ) -> None:
        self._on = stream.isatty() and not env.get("NO_COLOR") and env.get("TERM") != "dumb"
        self.width = max(_NARROWEST, _columns_of(stream, env))

    def __call__(self, text: str, colour: str) -> str:
        """The text in that colour."""
        return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if self._on and colour in _COLOURS else text


def _columns_of(stream: TextIO, env: Mapping[str, str]) -> int:
    """COLUMNS as POSIX has it, else what the terminal says, else 80."""
    if (told := env.get("COLUMNS", "")).isascii() and told.isdigit() and int(told):
        return int(told)
    try:
        return os.get_terminal_size(stream.fileno()).columns or _WIDTH
    except (OSError, ValueError):  # no terminal, or nothing with a descriptor
        return _WIDTH


def fold(text: str, width: int, unit: str = r"\S+") -> list[str]:
    """The text in lines of at most `width` columns.

    Broken between its units (a regular expression; words, without one) where they fit; else at blanks; a longer word
    behind a comma, else anywhere.
    """
    lines, line = [], ""
    for piece in _pieces(text, width, (unit, r"\S+", rf"[^,]{{,{width - 1}}},|[^,]{{1,{width}}}")):
        if len(line) + len(piece.rstrip()) > width:
            lines.append(line.rstrip())
            line = ""
        line += piece if line else piece.lstrip()
    return [*lines, line.rstrip()]


def _pieces(text: str, width: int, kinds: Sequence[str]) -> Iterator[str]:
    kind, *finer = kinds
    for piece in re.findall(rf"\s+|{kind}|\S+", text):
        if finer and len(piece) > width:
            yield from _pieces(piece, width, finer)
        else:
            yield piece


def columns(cells: Sequence[str], widths: Sequence[int], unit: str = r"\S+") -> Iterator[str]:
    """One row of a table, in as many lines as its longest cell needs; a blank stands between the cells."""
    pairs = zip(cells, widths, strict=True)
    folded = [fold(cell, width, unit) if len(cell) > width else [cell] for cell, width in pairs]
    for parts in zip_longest(*folded, fillvalue=""):
        yield " ".join(f"{part:{width}}" for part, width in zip(parts, widths, strict=True)).rstrip()


def status(value: Json, paint: Paint) -> Iterator[str]:
    """One screen: are the rules in force, since when, and if not, why. Lists are cut until it fits."""
    screens = (list(_status(value, paint, most)) for most in (20, 10, 5, 3, 2, 1))
    shortest: list[str] = []
    for shortest in screens:
        if len(shortest) < _SCREEN:
            break
    return iter(shortest)


def _status(value: Json, paint: Paint, most: int) -> Iterator[str]:
    state = str(value.get("state"))
    since = f" since {time(value['since'])}" if value.get("since") else ""
    yield f"nodewalld: {paint(state, _STATE_COLOURS.get(state, ''))}{since}"
    if value.get("note"):
        yield from (f"  {paint(line, 'yellow')}" for line in fold(printable(str(value["note"])), paint.width - 2))
    for reason in _some(value.get("reasons"), most):
        yield from _item("  - ", reason, paint)
    rules = value.get("rules") or {}
    in_place = f"{rules.get('in_place', '?')} of {rules.get('desired', '?')} in place{_families(value)}"
    yield from _line("rules", in_place, paint)
    yield from _line("backend", str(value.get("backend") or "none in use"), paint)
    yield from _config(value.get("config") or {}, paint)
    last = value.get("last_repair") or {}
    when = f", last {time(last.get('time'))}:" if last else ""
    yield from _line("repairs", f"{value.get('repairs', 0)}{when}", paint)
    if last:
        yield from _item(" " * _LABEL, str(last.get("message") or last.get("what") or ""), paint)
    if value.get("exposures"):
        yield from _line("exposed", _exposures(value["exposures"]), paint)
    for name, good in (("contention", "none"), ("neighbours", "nothing wrong"), ("bypasses", "none seen")):
        yield from _list(name, good, value, paint, most)
    yield from _line("daemon", f"{value.get('version', '?')}, pid {value.get('pid', '?')}", paint)


def _line(label: str, text: str, paint: Paint, colour: str = "") -> Iterator[str]:
    """`  label:  text`, folded beside its label."""
    first, *more = fold(printable(text), paint.width - _LABEL)
    yield f"{f'  {label}:':{_LABEL}}{paint(first, colour)}"
    yield from (f"{'':{_LABEL}}{paint(line, colour)}" for line in more)


def _item(start: str, text: str, paint: Paint) -> Iterator[str]:
    first, *more = fold(printable(text), paint.width - len(start))
    yield f"{start}{first}"
    yield from (f"{'':{len(start)}}{line}" for line in more)


def _some(found: object, most: int) -> Iterator[str]:
    """The first of a list, which may hold texts or objects that say `what`; then how many more there are."""
    items = list(found) if isinstance(found, list | tuple) else []
    for one in items[:most]:
        yield str(one.get("what") or one.get("message") or "") if isinstance(one, dict) else str(one)
    if len(items) > most:
        yield f"and {len(items) - most} more (nodewallctl status --json)"


def _list(name: str, good: str, value: Json, paint: Paint, most: int) -> Iterator[str]:
    """A list that should be empty; one that this daemon doesn't know of is not spoken of."""
    if value.get(name) is None:
        return
    items = list(_some(value[name], most))
    if not items:
        yield from _line(name, good, paint)
    for number, text in enumerate(items):
        yield from _line(name, text, paint, "yellow") if not number else _item(" " * _LABEL, text, paint)


def _config(config: Json, paint: Paint) -> Iterator[str]:
    loaded = f", loaded {time(config['loaded_at'])}" if config.get("loaded_at") else ""
    text = f"{config.get('path', '?')}, generation {config.get('generation', '?')}{loaded}"
    yield from _line("config", text, paint)
    if config.get("error"):
        yield from _item(" " * _LABEL, f"not taken: {config['error']}", paint)


def _exposures(exposed: Json) -> str:
    """What the history of the last day, or of the time since the start, adds up to."""
    since, times = time(exposed.get("since"), short=True), exposed.get("count", 0)
    if not times:
        return f"never since {since}"
    by = ", ".join(map(str, exposed.get("by") or ()))
    total, longest = duration(float(exposed.get("total_ms", 0))), duration(float(exposed.get("longest_ms", 0)))
    length = f"{total} in all, at most {longest}" if times > 1 else total
    return f"{count(times, 'time')} since {since}, {length}{f', by {by}' if by else ''}"


def _families(value: Json) -> str:
    """Told only when they differ: IPv4 and IPv6 fail apart."""
    states: Json = value.get("families") or {}
    if len(set(states.values())) < 2:
        return ""
    return " (" + ", ".join(f"{_FAMILIES.get(name, name)} {state}" for name, state in states.items()) + ")"


_HISTORY = (15, 10, 24, 9, 8)
"""Widths of the history's columns; the last one takes what is left."""


def history_head(paint: Paint) -> str:
    """The head of the history's table."""
    cells = ("TIME", "KIND", "WHERE", "WRONG", " EXPOSED", "BY")
    return paint(next(columns(cells, (*_HISTORY, paint.width - sum(_HISTORY) - len(_HISTORY)))), "dim")


def event(value: Json, paint: Paint) -> Iterator[str]:
    """One row of the history's table: where and who, or, for what has no place, what."""
    start = (time(value.get("time"), short=True), printable(str(value.get("kind"))))
    if not value.get("chain"):
        room = paint.width - sum(_HISTORY[:2]) - 2
        return columns((*start, printable(str(value.get("what") or ""))), (*_HISTORY[:2], room))
    exposed, by = value.get("exposed_ms"), value.get("by") or {}
    cells = (
        printable(f"{'6 ' if value.get('family') == 'ipv6' else ''}{value.get('table')} {value.get('chain')}"),
        printable(str(value.get("reason") or "")),
        f"{'' if exposed is None else duration(exposed):>8}",
        printable(str(by.get("name") or by.get("comm") or "")),
    )
    return columns((*start, *cells), (*_HISTORY, paint.width - sum(_HISTORY) - len(_HISTORY)))


def place(value: Json) -> str:
    """Where: "mangle PREROUTING (IPv4)"."""
    words = [str(value[key]) for key in ("table", "chain") if value.get(key)]
    if value.get("family"):
        words.append(f"({_FAMILIES.get(str(value['family']), value['family'])})")
    return printable(" ".join(words))


def count(number: int, noun: str) -> str:
    """1 port, 2 ports, 3 entries."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun[:-1]}ies" if noun.endswith("y") else f"{number} {noun}s"


def si(value: int | None) -> str:
    """A counter in at most 6 columns, as `iptables -L -v` rounds it; "" for one that is not known."""
    if value is None:
        return ""
    units = iter("KMGTPE")
    unit = ""
    while value >= 100_000:
        value, unit = round(value / 1000), next(units)
    return f"{value}{unit}"


def time(text: object, *, short: bool = False) -> str:
    """A moment of the wire in local time; what is no time stays as it is."""
    try:
        moment = datetime.fromisoformat(str(text)).astimezone()
    except ValueError:
        return printable(str(text))
    return f"{moment:%b %d %H:%M:%S}" if short else f"{moment:%Y-%m-%d %H:%M:%S}"
