"""`nodewallctl set`: entries of sets at run time."""

import argparse
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from nodewalld.commands import render
from nodewalld.commands.common import GOOD, LONG, Tools, complain, print_json, print_lines, socket_of
from nodewalld.commands.steer import duration
from nodewalld.core.events import printable
from nodewalld.service import client

Json = Mapping[str, Any]

EXAMPLES = {
    "add": ("nodewallctl set add office 192.0.2.7 2001:db8::/64", "nodewallctl set add banned 203.0.113.9 --for 1h"),
    "del": ("nodewallctl set del office 192.0.2.7",),
    "list": ("nodewallctl set list", "nodewallctl set list office --json"),
}

_LEFT = 5  # columns


def add_parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Make the parsers of `add`, `del` and `list`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    summaries = {
        "add": "put entries into a set; who is there already gets the new time",
        "del": "take out entries that were added",
        "list": "print what sets hold, where each entry comes from, and its time",
    }
    for name, summary in summaries.items():
        epilog = "examples:\n" + "\n".join(f"  {line}" for line in EXAMPLES[name])
        inner = actions.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        inner.add_argument(
            "name", metavar="NAME", nargs="?" if name == "list" else None, help="the set's name, as in [set.NAME]"
        )
        if name != "list":
            inner.add_argument("addresses", metavar="ADDRESS", nargs="+", help="an address or CIDR of either family")
        if name == "add":
            inner.add_argument("--for", metavar="TIME", type=duration, help="such as 90s, 10m, 1h or 7d; else for good")
        yield inner


def run(args: argparse.Namespace, _tools: Tools) -> int:
    """Ask the daemon to change or to list sets."""
    if args.action == "list":
        return _list(args)
    request = {"command": "set", "action": args.action, "name": args.name, "addresses": args.addresses}
    value = client.call(socket_of(args), {**request, "seconds": getattr(args, "for", None)}, LONG)
    if args.json:
        print_json(value)
    else:
        print(f"Set {printable(str(value['set']))}: {value['what']}.")
        complain(f"note: {note}" for note in value.get("notes") or ())
    return GOOD


def _list(args: argparse.Namespace) -> int:
    sets = client.call(socket_of(args), {"command": "sets", "name": args.name}, LONG)
    if args.json:
        print_json({"sets": sets})
    else:
        print_lines(_lines(sets, datetime.now(UTC), render.Paint(sys.stdout)))
    return GOOD


def _lines(sets: list[Json], now: datetime, paint: render.Paint) -> Iterator[str]:
    if not sets:
        yield "The configuration has no set."
    for number, one in enumerate(sets):
        if number:
            yield ""
        entries = one.get("entries") or ()
        kernel = ", ".join((one.get("ipsets") or {}).values())
        yield printable(f"{one.get('name')}: {render.count(len(entries), 'entry')} (ipset {kernel})")
        if not entries:
            continue
        longest = max(len(str(entry.get("entry"))) for entry in entries)
        widths = (longest + 2, _LEFT, paint.width - longest - _LEFT - 4)
        yield paint(next(render.columns(("  ENTRY", f"{'LEFT':>{_LEFT}}", "FROM"), widths)), "dim")
        for entry in entries:
            place = f"{entry.get('file')}:{entry.get('line')}" if entry.get("file") else str(entry.get("source"))
            left = f"{_left(entry.get('until'), now):>{_LEFT}}"
            yield from render.columns((printable(f"  {entry.get('entry')}"), left, printable(place)), widths)


def _left(until: object, now: datetime) -> str:
    if not until:
        return "-"
    seconds = max(0, round((datetime.fromisoformat(str(until)) - now).total_seconds()))
    units = ((86400, "d"), (3600, "h"), (60, "m"), (1, "s"))
    size, unit = next((pair for pair in units if seconds >= 2 * pair[0]), units[-1])
    return f"{seconds // size}{unit}"
