"""What `nodewallctl` prints for people: plain text within the terminal's columns, within 80 where there is none.

Law: input is the JSON of the daemon and of the planner, which may be older or newer than this program: what
is not known is left out. Colour adds nothing that the words don't say. Tables are laid out here, because a library for
them would double the time that `status` takes, and be larger than all that the packages carry.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
_CUTS = ((20, 20), (10, 20), (5, 20), (3, 20), (2, 20), (1, 20), (1, 3), (1, 2), (1, 1))
"""How many items of a list and lines of an item the status shows: the first with which it fits a screen."""
_CUT = " ..."


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
    behind a comma, slash or hyphen, else anywhere.
    """
    lines, line = [], ""
    for piece in _pieces(text, width, (unit, r"\S+", rf"[^,/-]{{,{width - 1}}}[,/-]|[^,/-]{{1,{width}}}")):
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
    """One screen: are the rules in force, since when, and if not, why. What is too long for it is cut, and says so."""
    lines: list[str] = []
    for items, depth in _CUTS:
        lines = list(_Overview(value, paint, items, depth).lines())
        if len(lines) < _SCREEN:
            break
    return iter(lines)


@dataclass(frozen=True)
class _Overview:
    """The status with at most so many `items` of a list, and `depth` lines of an item."""

    value: Json
    paint: Paint
    items: int
    depth: int

    def lines(self) -> Iterator[str]:
        value, paint = self.value, self.paint
        state = str(value.get("state"))
        since = f" since {time(value['since'])}" if value.get("since") else ""
        yield f"nodewalld: {paint(state, _STATE_COLOURS.get(state, ''))}{since}"
        if value.get("note"):
            yield from self._text("  ", str(value["note"]), "yellow")
        for reason in self._some("reasons"):
            yield from self._text("  - ", reason)
        rules = value.get("rules") or {}
        in_place = f"{rules.get('in_place', '?')} of {rules.get('desired', '?')} in place{_families(value)}"
        yield from self._labelled("rules", in_place)
        yield from self._labelled("backend", str(value.get("backend") or "none in use"))
        if value.get("shield"):
            yield from self._labelled("shield", _shield(value["shield"]))
        yield from self._config(value.get("config") or {})
        last = value.get("last_repair") or {}
        when = f", last {time(last.get('time'))}:" if last else ""
        yield from self._labelled("repairs", f"{value.get('repairs', 0)}{when}")
        if last:
            yield from self._text(" " * _LABEL, str(last.get("message") or last.get("what") or ""))
        if value.get("exposures"):
            yield from self._labelled("exposed", _exposures(value["exposures"]))
        for name, good in (("contention", "none"), ("neighbours", "nothing wrong"), ("bypasses", "none seen")):
            yield from self._list(name, good)
        yield from self._labelled("daemon", f"{value.get('version', '?')}, pid {value.get('pid', '?')}")

    def _labelled(self, label: str, text: str, colour: str = "") -> Iterator[str]:
        return self._text(f"{f'  {label}:':{_LABEL}}", text, colour)

    def _text(self, start: str, text: str, colour: str = "") -> Iterator[str]:
        """A text folded beside what it starts with."""
        lines = fold(printable(text), self.paint.width - len(start))
        if len(lines) > self.depth:
            lines = [*lines[: self.depth - 1], f"{lines[self.depth - 1][: -len(_CUT)]}{_CUT}"]
        for number, line in enumerate(lines):
            yield f"{'' if number else start:{len(start)}}{self.paint(line, colour)}"

    def _some(self, name: str) -> Iterator[str]:
        """The first of a list, which may hold texts or objects that say `what`; then how many more there are."""
        found = self.value.get(name)
        all_of_them = list(found) if isinstance(found, list | tuple) else []
        for one in all_of_them[: self.items]:
            yield str(one.get("what") or one.get("message") or "") if isinstance(one, dict) else str(one)
        if len(all_of_them) > self.items:
            yield f"and {len(all_of_them) - self.items} more (nodewallctl status --json)"

    def _list(self, name: str, good: str) -> Iterator[str]:
        """A list that should be empty; one that this daemon doesn't know of is not spoken of."""
        if self.value.get(name) is None:
            return
        texts = list(self._some(name))
        yield from self._labelled(name, texts[0], "yellow") if texts else self._labelled(name, good)
        for text in texts[1:]:
            yield from self._text(" " * _LABEL, text, "yellow")

    def _config(self, config: Json) -> Iterator[str]:
        loaded = f", loaded {time(config['loaded_at'])}" if config.get("loaded_at") else ""
        yield from self._labelled(
            "config", f"{config.get('path', '?')}, generation {config.get('generation', '?')}{loaded}"
        )
        if config.get("error"):
            yield from self._text(" " * _LABEL, f"not taken: {config['error']}", "red")


def _exposures(exposed: Json) -> str:
    """What the history of the last day, or of the time since the start, adds up to."""
    since, times = time(exposed.get("since"), short=True), exposed.get("count", 0)
    if not times:
        return f"never since {since}"
    by = ", ".join(map(str, exposed.get("by") or ()))
    total, longest = duration(float(exposed.get("total_ms", 0))), duration(float(exposed.get("longest_ms", 0)))
    length = f"{total} in all, at most {longest}" if times > 1 else total
    return f"{count(times, 'time')} since {since}, {length}{f', by {by}' if by else ''}"


def _shield(shield: Json) -> str:
    words = str(shield.get("state"))
    if shield.get("rules"):
        words += f", {count(shield['rules'], 'rule')}"
    only = shield.get("iptables_only") or ()
    return words + (f"; {count(len(only), 'entry')} in iptables only (nodewallctl show)" if only else "")


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
    """One row of the history's table: where and who, or, for what has no place, what; and how many flows were cut."""
    start = (time(value.get("time"), short=True), printable(str(value.get("kind"))))
    flows = f"{count(value['flows_deleted'], 'flow')} cut" if value.get("flows_deleted") else ""
    if not value.get("chain"):
        told = "; ".join(filter(None, (printable(str(value.get("what") or "")), flows)))
        return columns((*start, told), (*_HISTORY[:2], paint.width - sum(_HISTORY[:2]) - 2))
    exposed, by = value.get("exposed_ms"), value.get("by") or {}
    six = "6" if value.get("family") == "ipv6" else ""
    cells = (
        printable(" ".join(filter(None, (six, value.get("table"), value.get("chain"))))),
        printable(str(value.get("reason") or "")),
        f"{'' if exposed is None else duration(exposed):>8}",
        "; ".join(filter(None, (printable(str(by.get("name") or by.get("comm") or "")), flows))),
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
