"""What `nodewallctl` prints for people: plain text of at most 80 columns where the content allows it.

Law: input is the JSON of the daemon and of the planner, which may be older or newer than this program: what
is not known is left out. Colour adds nothing that the words don't say.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import groupby
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
_WIDTH = 80


class Paint:
    """Puts colour on words, on terminals whose user has not said no (https://no-color.org)."""

    def __init__(self, stream: TextIO, env: Mapping[str, str] = os.environ) -> None:
        self._on = stream.isatty() and not env.get("NO_COLOR") and env.get("TERM") != "dumb"

    def __call__(self, text: str, colour: str) -> str:
        """The text in that colour."""
        return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if self._on and colour in _COLOURS else text


def status(value: Json, paint: Paint) -> Iterator[str]:
    """One screen: are the rules in force, and if not, why."""
    state = str(value.get("state"))
    since = f" since {_time(value['since'])}" if value.get("since") else ""
    yield f"nodewalld: {paint(state, _STATE_COLOURS.get(state, ''))}{since}"
    if value.get("note"):
        yield f"  {paint(printable(str(value['note'])), 'yellow')}"
    for reason in value.get("reasons") or ():
        yield f"  - {printable(str(reason))}"
    rules, config = value.get("rules") or {}, value.get("config") or {}
    yield f"  rules:   {rules.get('in_place', '?')} of {rules.get('desired', '?')} in place{_families(value)}"
    yield f"  backend: {value.get('backend') or 'none in use'}"
    yield f"  config:  {_config(config)}"
    if config.get("error"):
        yield f"           {paint('not taken', 'red')}: {printable(str(config['error']))}"
    yield f"  repairs: {value.get('repairs', 0)}"
    last = value.get("last_repair")
    if last:
        yield f"  last:    {_time(last.get('time'))}"
        yield f"           {printable(str(last.get('message') or last.get('what') or ''))}"
    for one in value.get("contention") or ():
        yield f"  {paint('contention', 'yellow')}: {printable(str(one.get('what')))}"
    yield f"  daemon:  {value.get('version', '?')}, pid {value.get('pid', '?')}"


def _config(config: Json) -> str:
    loaded = f", loaded {_time(config['loaded_at'])}" if config.get("loaded_at") else ""
    return f"{printable(str(config.get('path', '?')))}, generation {config.get('generation', '?')}{loaded}"


def _families(value: Json) -> str:
    """Told only when they differ: IPv4 and IPv6 fail apart."""
    states: Json = value.get("families") or {}
    if len(set(states.values())) < 2:
        return ""
    return " (" + ", ".join(f"{_FAMILIES.get(name, name)} {state}" for name, state in states.items()) + ")"


HISTORY_HEAD = f"{'TIME':15} {'KIND':10} {'WHERE':22} {'WRONG':9} {'EXPOSED':>8} BY"


def event(value: Json) -> str:
    """One line of the history's table: where and who, or, for what has no place, what."""
    start = f"{_time(value.get('time'), short=True):15} {printable(str(value.get('kind'))):10.10} "
    if value.get("chain"):
        return start + _fit(_incident(value), _WIDTH - len(start))
    return start + _fit(printable(str(value.get("what") or "")), _WIDTH - len(start))


def _incident(value: Json) -> str:
    family = "6 " if value.get("family") == "ipv6" else ""
    where = _fit(printable(f"{family}{value.get('table')} {value.get('chain')}"), 22)
    exposed, by = value.get("exposed_ms"), value.get("by") or {}
    time = "" if exposed is None else duration(exposed)
    culprit = printable(str(by.get("name") or by.get("comm") or ""))
    return f"{where:22} {printable(str(value.get('reason') or '')):9.9} {time:>8} {culprit}".rstrip()


def plan(changes: Sequence[Json], paint: Paint) -> Iterator[str]:
    """Each change with its reason and the commands that would make it."""
    for change in changes:
        reason = f": {change['reason']}" if change.get("reason") else ""
        yield paint(place(change), "bold") + printable(reason)
        if change.get("why"):
            yield f"  {printable(str(change['why']))}"
        for command in change.get("commands") or ():
            yield f"    {printable(str(command))}"
    yield f"{count(len(changes), 'change')}." if changes else "Nothing to change."


def show(rows: Iterable[Json], paint: Paint) -> Iterator[str]:
    """The rules chain by chain, in the order of the rows; rule texts are never cut."""
    nothing = True
    for heading, group in groupby(rows, place):
        if not nothing:
            yield ""
        nothing = False
        yield paint(heading, "bold")
        yield paint(f"  {'POS':>4} {'PACKETS':>8} {'BYTES':>8} {'ENTRY':24} RULE", "dim")
        for row in group:
            counters = f"{_si(row.get('packets'))} {_si(row.get('bytes'))}"
            texts = f"{printable(str(row.get('entry') or '')):24} {printable(str(row.get('rule') or ''))}"
            yield f"  {row.get('position') or '':>4} {counters} {texts}"
    if nothing:
        yield "No rule of nodewalld is in force."


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


def _fit(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "~"


def _si(value: int | None) -> str:
    """A counter in 8 columns, as `iptables -L -v` rounds it."""
    if value is None:
        return f"{'':8}"
    units = iter("KMGTPE")
    unit = ""
    while value >= 100_000:
        value, unit = round(value / 1000), next(units)
    return f"{value}{unit}".rjust(8)


def _time(text: object, *, short: bool = False) -> str:
    """A moment of the wire in local time; what is no time stays as it is."""
    try:
        moment = datetime.fromisoformat(str(text)).astimezone()
    except ValueError:
        return printable(str(text))
    return f"{moment:%b %d %H:%M:%S}" if short else f"{moment:%Y-%m-%d %H:%M:%S}"
