"""The commands that steer a running daemon: reload, try, confirm, revert, pause, resume, remove."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nodewalld.commands import render
from nodewalld.commands.common import GOOD, LONG, Failure, Tools, complain, print_json, reading, socket_of
from nodewalld.service import client, wire


def reload(args: argparse.Namespace, _tools: Tools) -> int:
    """Let the daemon read its files anew."""
    value = client.call(socket_of(args), {"command": "reload", "connection": connection()}, LONG)
    if args.json:
        print_json(value)
    else:
        complain(f"warning: {warning}" for warning in value.get("warnings", []))
        change = "taken" if value.get("changed", True) else "taken, nothing in it has changed"
        print(f"Generation {value.get('generation')} {change}; nodewalld is {value.get('state')}.")
    return GOOD


def try_(args: argparse.Namespace, _tools: Tools) -> int:
    """Enforce a folder for a while."""
    directory = (args.directory or args.config).absolute()
    request = {"command": "try", "directory": str(directory), "seconds": args.timeout, "yes": args.yes}
    value = client.call(socket_of(args), {**request, "connection": connection()}, LONG)
    if args.json:
        print_json(value)
    else:
        complain(f"warning: {warning}" for warning in value.get("warnings", []))
        print(f"{directory} is enforced until {value['until']}, then the rules before it come back by themselves.")
        print("Still connected? `nodewallctl confirm` keeps it, `nodewallctl revert` goes back now.")
    return GOOD


def pause(args: argparse.Namespace, _tools: Tools) -> int:
    """Take the rules out for a while."""
    value = client.call(socket_of(args), {"command": "pause", "seconds": getattr(args, "for")}, LONG)
    if args.json:
        print_json(value)
    else:
        print(f"All rules are taken out until {value['until']}; `nodewallctl resume` ends the pause.")
    return GOOD


def simple(command: str, done: str) -> Callable[[argparse.Namespace, Tools], int]:
    """A command without arguments that the daemon either does or refuses."""

    def run(args: argparse.Namespace, _tools: Tools) -> int:
        value = client.call(socket_of(args), {"command": command}, LONG)
        if args.json:
            print_json(value)
        else:
            print(f"{done} (generation {value.get('generation')}).")
            complain([f"note: {value['note']}"] if value.get("note") else [])
        return GOOD

    return run


def connection() -> str:
    """SSH_CONNECTION of this session; sudo takes it out of the environment, so the parents are asked as well."""
    found = os.environ.get("SSH_CONNECTION", "")
    pid = os.getppid()
    while not found and pid > 1:
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            pid = int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return ""
        values = (entry.partition(b"=")[2] for entry in environment if entry.startswith(b"SSH_CONNECTION="))
        found = next(values, b"").decode(errors="replace")
    return found


def duration(text: str) -> float:
    """Seconds of "90s", "10m", "1h", "7d"."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
    number, unit = text[:-1], text[-1:]
    if unit not in units or not number.isascii() or not number.isdigit() or int(number) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 90s, 10m, 1h or 7d")
    return int(number) * units[unit]


def remove(args: argparse.Namespace, tools: Tools) -> int:
    """Take everything out, by the daemon or without one."""
    try:
        value = client.call(socket_of(args), {"command": "remove"}, LONG)
    except wire.NoDaemon:
        value = _remove_alone(args, tools)
    if args.json:
        print_json(value)
    else:
        removed = value["removed"]
        counts = ", ".join(render.count(removed.get(f"{noun}s", 0), noun) for noun in ("rule", "chain", "set"))
        print(f"Removed {counts}.")
    return GOOD


def _remove_alone(args: argparse.Namespace, tools: Tools) -> dict[str, Any]:
    """Under the daemon's own lock: one that starts meanwhile must not put back what is being taken out."""
    from nodewalld.service.instance import AlreadyRunning, Instance  # noqa: PLC0415

    try:
        with reading("remove"), Instance(args.runtime_dir):
            return tools.offline().remove(args.state_dir)
    except AlreadyRunning as error:
        raise Failure(f"{error} and does not listen yet, or no more: try again") from error
