"""`nodewallctl`: asks the daemon, reads the kernel, checks files; prints, and says by its exit status how it
is.

Law: the exit statuses are the contract's (docs). What people read goes to stdout, what went wrong to stderr,
and `--json` prints one value (a history: one a line) and nothing else on stdout. No failure is a traceback.
Heavy modules are imported by the command that needs them: `status` is run by scripts, often.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import nodewalld
from nodewalld.commands import check, packet, render, sets, steer, trace
from nodewalld.commands.common import (
    ATTENTION,
    BROKEN_PIPE,
    GOOD,
    INTERRUPTED,
    NO_DAEMON,
    QUICK,
    Failure,
    Load,
    Offline,
    Tools,
    complain,
    print_json,
    print_lines,
    reading,
    socket_of,
)
from nodewalld.service import client, wire

_WATCH_EVERY = 0.5  # seconds


def _real_offline() -> Offline:
    from nodewalld.commands import offline  # noqa: PLC0415 - heavy
    from nodewalld.service import journal  # noqa: PLC0415

    journal.configure(stream_is_journal=False)  # else structlog would print on stdout
    return offline


def _real_load() -> Load:
    from nodewalld.configuration.load import load  # noqa: PLC0415 - heavy

    return load


def _plan(args: argparse.Namespace, tools: Tools) -> int:
    with reading("plan"):
        value = tools.offline().plan(args.directory or args.config, args.state_dir)
    if args.json:
        print_json(value)
    else:
        from nodewalld.commands import rules  # noqa: PLC0415 - heavy

        print_lines(rules.plan(value, render.Paint(sys.stdout)))
    return ATTENTION if value["changes"] else GOOD


def _show(args: argparse.Namespace, tools: Tools) -> int:
    with reading("show"):
        if args.compiled:
            text = tools.offline().compiled(args.config)
        else:
            rows = tools.offline().show(args.config, args.state_dir)
            only = tools.offline().iptables_only(args.config)
    if args.compiled:
        if args.json:
            print_json({"compiled": text})
        else:
            print_lines(text.splitlines())
    elif args.json:
        print_json({"rules": rows, "iptables_only": only})
    else:
        from nodewalld.commands import rules  # noqa: PLC0415 - heavy

        print_lines(rules.show(rows, render.Paint(sys.stdout)))
        print_lines(rules.iptables_only(only, render.Paint(sys.stdout)))
    return GOOD


def _status(args: argparse.Namespace, _tools: Tools) -> int:
    if args.watch:
        _watch_status(args)
    try:
        value = client.call(socket_of(args), {"command": "status"}, QUICK)
    except (wire.NoDaemon, wire.NoAnswer) as error:
        raise Failure(str(error), status=NO_DAEMON) from error
    if args.json:
        print_json(value)
    else:
        print_lines(render.status(value, render.Paint(sys.stdout)))
    return GOOD if value.get("state") == "enforcing" else ATTENTION


def _watch_status(args: argparse.Namespace) -> NoReturn:
    """Until Ctrl-C: in place on a terminal, else what has changed; a daemon that is away may come back."""
    shown: object = None
    while True:
        try:
            value = client.call(socket_of(args), {"command": "status"}, QUICK)
        except (wire.NoDaemon, wire.NoAnswer) as error:
            value = {"error": str(error)}
        if value != shown:
            shown = value
            lines = [value["error"]] if "error" in value else list(render.status(value, render.Paint(sys.stdout)))
            if args.json:
                print_json(value)
            elif sys.stdout.isatty():
                print("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J", end="")
            else:
                print_lines([*lines, ""])
            sys.stdout.flush()
        time.sleep(_WATCH_EVERY)


def _history(args: argparse.Namespace, _tools: Tools) -> int:
    request = {"command": "history", "n": args.n, "follow": args.follow}
    if not args.follow:
        _print_events(client.call(socket_of(args), request, QUICK), args.json, head=True)
        return GOOD
    values = client.stream(socket_of(args), request, QUICK)
    _print_events(next(values), args.json, head=True)
    for event in values:
        _print_events([event], args.json, head=False)
    return GOOD


def _print_events(events: Sequence[render.Json], as_json: bool, *, head: bool) -> None:
    paint = render.Paint(sys.stdout)
    if head and not as_json:
        print(render.history_head(paint))
    for event in events:
        if as_json:
            print_json(event)
        else:
            print_lines(render.event(event, paint))
    sys.stdout.flush()


def _report(args: argparse.Namespace, tools: Tools) -> int:
    from nodewalld.commands.report import report  # noqa: PLC0415 - heavy

    return report(args, tools)


def _import(args: argparse.Namespace, tools: Tools) -> int:
    from nodewalld.commands import importing  # noqa: PLC0415 - heavy

    return importing.run(args, tools)


def _explain(args: argparse.Namespace, tools: Tools) -> int:
    from nodewalld.commands import explain  # noqa: PLC0415 - heavy

    return explain.run(args, tools)


def _exposures(args: argparse.Namespace, tools: Tools) -> int:
    from nodewalld.commands import exposures  # noqa: PLC0415 - heavy

    return exposures.run(args, tools)


def _schema(_args: argparse.Namespace, _tools: Tools) -> int:
    from nodewalld.configuration.describe import json_schema  # noqa: PLC0415 - heavy

    print(json.dumps(json_schema(), indent=2))
    return GOOD


class _Command(NamedTuple):
    run: Callable[[argparse.Namespace, Tools], int]
    summary: str
    more: str
    examples: tuple[str, ...]


COMMANDS = {
    "check": _Command(
        check.check,
        "validate a configuration, without root and without changing anything",
        "As root it also judges by what it sees of this node. Exit status: 0 good, 1 errors.",
        (
            "nodewallctl check",
            "nodewallctl check --strict ./nodewalld",
            "nodewallctl check --strict --ignore ipv4-only",
            "nodewallctl check --json",
        ),
    ),
    "plan": _Command(
        _plan,
        "print what would change in the kernel now",
        "Changes nothing. Rules are shown with their numbers before and after.\n"
        "Exit status: 0 nothing to change, 3 something, 1 error.",
        ("nodewallctl plan", "nodewallctl plan ./nodewalld", "nodewallctl plan --json"),
    ),
    "status": _Command(
        _status,
        "are the rules in force?",
        "Exit status: 0 enforcing, 3 degraded, starting, paused or idle, 4 no daemon.",
        ("nodewallctl status", "nodewallctl status --watch", "nodewallctl status --json"),
    ),
    "show": _Command(
        _show,
        "print the rules in force, in packet order, with their counters",
        "Reads the kernel, and needs no daemon.",
        ("nodewallctl show", "nodewallctl show --compiled", "nodewallctl show --json"),
    ),
    "history": _Command(
        _history,
        "print repairs, reloads and contention: when, what, who, exposed how long",
        "With --json one event a line.",
        ("nodewallctl history", "nodewallctl history -n 20 -f", "nodewallctl history --json"),
    ),
    "reload": _Command(
        steer.reload,
        "let the daemon read its files anew, and wait for the outcome",
        "Exit status: 0 taken, 1 refused (the old rules stay).",
        ("nodewallctl reload", "nodewallctl reload --json"),
    ),
    "try": _Command(
        steer.try_,
        "enforce a configuration for a while; it goes back by itself unless confirmed",
        "Also when the shell or the daemon dies meanwhile. Exit status: 0 enforced, 1 refused (the old rules stay).",
        ("nodewallctl try", "nodewallctl try ./nodewalld --timeout 5m", "nodewallctl try --yes"),
    ),
    "confirm": _Command(
        steer.simple("confirm", "The configuration on trial is kept"),
        "keep what is on trial",
        "Exit status: 0 kept, 1 there was no trial.",
        ("nodewallctl confirm",),
    ),
    "revert": _Command(
        steer.simple("revert", "The configuration before the trial is enforced again"),
        "go back to what was enforced before the trial, now",
        "Exit status: 0 reverted, 1 there was no trial.",
        ("nodewallctl revert",),
    ),
    "pause": _Command(
        steer.pause,
        "take the rules out for a while; they come back by themselves",
        "Also when the daemon dies meanwhile; a reboot ends it. Exit status: 0 paused, 1 refused.",
        ("nodewallctl pause --for 10m",),
    ),
    "resume": _Command(
        steer.simple("resume", "The rules are enforced again"),
        "end a pause now",
        "Exit status: 0 resumed, 1 there was no pause.",
        ("nodewallctl resume",),
    ),
    "explain": _Command(
        _explain,
        "walk one described packet through the live rules: what becomes of it, and which rule decides",
        "Rules of both backends are walked as the kernel would, with sets, routes and DNAT on the way.\n"
        "What can't be known forks the way. Sends nothing and changes nothing.\n"
        "Exit status: 0 it gets through, 3 it does not, or that can't be told, 1 error.",
        (
            'nodewallctl explain tcp 203.0.113.9 "->" :31002 --in ens18',
            'nodewallctl explain tcp 203.0.113.9:40000 "->" 192.0.2.1:443 --state established',
            'nodewallctl explain udp 2001:db8::9 "->" "[2001:db8::1]:53" --json',
            'nodewallctl explain tcp --from-node "->" 10.43.0.1:443',
            'nodewallctl explain icmp 203.0.113.9 "->" 192.0.2.1 --type 8',
        ),
    ),
    "exposures": _Command(
        _exposures,
        "what of this node can the world reach, and which entry governs it?",
        "Listeners, NodePorts, hostPorts, published ports and external addresses, each judged as `explain` would\n"
        "judge a stranger's packet. Sends nothing and changes nothing. Exit status: 0 told, 1 error.",
        (
            "nodewallctl exposures",
            "nodewallctl exposures --in ens18",
            "nodewallctl exposures --from 10.90.0.7 --json",
        ),
    ),
    "report": _Command(
        _report,
        "write one file with everything that a maintainer needs to understand this node",
        "Versions, configuration, rules of both backends, history, journal. It holds addresses, and no secrets.",
        ("nodewallctl report", "nodewallctl report --output /tmp/node7.tar.gz"),
    ),
    "set": _Command(
        sets.run,
        "put entries into sets at run time, without reload, or take them out again",
        "They are kept over restarts and reloads. Exit status: 0 done, 1 refused (nothing was changed).",
        tuple(example for examples in sets.EXAMPLES.values() for example in examples),
    ),
    "remove": _Command(
        steer.remove,
        "take all of nodewalld's rules, chains and sets out of the kernel, and nothing else",
        "A running daemon lets go and stays idle until `nodewallctl reload`.",
        ("nodewallctl remove", "nodewallctl remove --json"),
    ),
    "trace": _Command(
        trace.run,
        "show real packets passing real rules, live, each with its path",
        "The kernel tells which rules a packet meets, in every table and backend; they are shown by their texts.\n"
        "Tables nat see only a flow's first packet. Nothing is left behind, whatever ends the trace.",
        trace.EXAMPLES,
    ),
    "import": _Command(
        _import,
        "print rules that were written by hand, from iptables-save or the kernel, as TOML",
        "Changes nothing. What can't be carried over is said, line by line, and the exit status is still 0;\n"
        "it is 1 for a FILE that iptables-save did not print.",
        (
            "nodewallctl import",
            "nodewallctl import /etc/iptables/rules.v4",
            "nodewallctl import --json -",
        ),
    ),
    "schema": _Command(
        _schema,
        "print the JSON Schema of nodewalld.toml, for editors and CI",
        "Draft 2020-12, with the meaning and the default of each key. It judges one file by itself;\n"
        "`nodewallctl check` judges all files together, and more strictly.",
        ("nodewallctl schema",),
    ),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nodewallctl",
        description="Asks and steers nodewalld, which holds this node's firewall rules in position.",
        epilog=_examples(("nodewallctl status", "nodewallctl check", "nodewallctl history -f")),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"nodewallctl {nodewalld.__version__}")
    _add_global(parser, given_only=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        _add_own(
            name,
            commands.add_parser(
                name,
                help=command.summary,
                description=f"{command.summary[0].upper()}{command.summary[1:]}.\n{command.more}".replace("?.", "?"),
                epilog=_examples(command.examples),
                formatter_class=argparse.RawDescriptionHelpFormatter,
                allow_abbrev=False,
            ),
        )
    return parser


def _add_own(name: str, parser: argparse.ArgumentParser) -> None:
    if name in ("check", "plan"):
        parser.add_argument("directory", metavar="DIR", nargs="?", type=Path, help="instead of --config")
    if name == "check":
        parser.add_argument("--strict", action="store_true", help="warnings are errors")
        text = "say nothing of warnings with this code, such as ipv4-only; may be given several times"
        parser.add_argument("--ignore", metavar="CODE", action="append", default=[], help=text)
    if name == "status":
        parser.add_argument("--watch", action="store_true", help="go on, until Ctrl-C, with what changes")
    if name == "show":
        parser.add_argument("--compiled", action="store_true", help="the desired rules, as iptables text")
    if name == "history":
        parser.add_argument("-n", metavar="N", type=_number, help="only the newest N")
        parser.add_argument("-f", "--follow", action="store_true", help="go on with what happens")
    if name == "import":
        parser.add_argument("file", metavar="FILE", nargs="?", help='what iptables-save printed, "-" for stdin')
    if name == "explain":
        packet.add_arguments(parser)
    if name == "exposures":
        packet.add_stranger(parser)
    if name == "report":
        parser.add_argument("--output", metavar="FILE", type=Path, help="default nodewalld-report-TIME.tar.gz, here")
    if name == "try":
        parser.add_argument("directory", metavar="DIR", nargs="?", type=Path, help="the folder (default: --config)")
        parser.add_argument("--timeout", metavar="TIME", type=steer.duration, default=60.0, help="default 60s")
        parser.add_argument("--yes", action="store_true", help="though it would shut this very connection")
    if name == "pause":
        parser.add_argument("--for", metavar="TIME", type=steer.duration, required=True, help="such as 10m")
    if name == "trace":
        trace.add_arguments(parser)
    if name == "set":
        for inner in sets.add_parsers(parser):
            _add_global(inner, given_only=True)
    _add_global(parser, given_only=True)


def _add_global(parser: argparse.ArgumentParser, *, given_only: bool) -> None:
    """Before and after the command; `given_only` keeps the second from undoing the first by its defaults."""
    options = (
        ("--config", "/etc/nodewalld", "the configuration folder"),
        ("--runtime-dir", "/run/nodewalld", "where the daemon listens"),
        ("--state-dir", "/var/lib/nodewalld", "where the daemon keeps its state"),
    )
    default: Any = argparse.SUPPRESS if given_only else False
    parser.add_argument("--json", action="store_true", default=default, help="print JSON")
    for name, folder, text in options:
        default = argparse.SUPPRESS if given_only else Path(folder)
        parser.add_argument(name, metavar="DIR", type=Path, default=default, help=f"{text} (default {folder})")


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 up")
    return int(text)


def _examples(lines: Iterable[str]) -> str:
    return "examples:\n" + "\n".join(f"  {line}" for line in lines)


def main(argv: Sequence[str] | None = None, *, tools: Tools | None = None) -> int:
    """Run one command and return its exit status; usage errors leave by argparse's SystemExit(2)."""
    try:
        args = _parser().parse_args(argv)
        status = _run(args, tools or Tools(_real_offline, _real_load))
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read has read enough. What is still buffered must not fail again at the interpreter's end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED
    return status


def _run(args: argparse.Namespace, tools: Tools) -> int:
    try:
        return COMMANDS[args.command].run(args, tools)
    except wire.Refused as error:
        failure = Failure(error.error, error.problems)
    except wire.ControlError as error:
        failure = Failure(str(error))
    except Failure as error:
        failure = error
    complain([*failure.problems, f"nodewallctl: {failure}"])
    if args.json:
        print_json({"error": str(failure), "problems": list(failure.problems)})
    return failure.status


if __name__ == "__main__":
    sys.exit(main())
