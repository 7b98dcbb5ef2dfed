"""`nodewallctl report`: one file with what a maintainer needs to understand a node.

Laws: each part is there or says why not; no part's failure stops another. Only what is listed here gets in, so that
nothing secret does by accident: no environment, no command lines, no file but the configuration's and the state's own.
"""

import argparse
import io
import json
import os
import platform
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path

import nodewalld
from nodewalld.commands.common import GOOD, QUICK, Failure, Offline, Tools, print_json, socket_of
from nodewalld.core.words import Backend, Family
from nodewalld.kernel.firewall import tool
from nodewalld.kernel.process import ProgramError, run
from nodewalld.service import client

_LARGEST = 32 << 20  # bytes of one part; a node with 100,000 Services has more, and the first rules tell
_PATIENCE = 60.0  # seconds for one program
_LIBRARIES = ("prometheus_client", "pyroute2", "sdnotify", "structlog", "watchdog")

_PROGRAMS = {
    "kernel/nft.txt": ("nft", "list", "ruleset"),
    "kernel/sets.txt": ("ipset", "list", "-terse"),
    "kernel/links.txt": ("ip", "-brief", "address"),
    "kernel/routes-ipv4.txt": ("ip", "-4", "route", "show", "table", "all"),
    "kernel/routes-ipv6.txt": ("ip", "-6", "route", "show", "table", "all"),
    "journal.txt": ("journalctl", "--unit=nodewalld", "--lines=5000", "--output=short-iso-precise", "--no-pager"),
    "unit.txt": ("systemctl", "status", "nodewalld", "--no-pager", "--lines=0"),
}
_VERSIONS = (("iptables-nft", "-V"), ("iptables-legacy", "-V"), ("iptables", "-V"), ("ipset", "-V"), ("nft", "-v"))

Part = Callable[[], str]


def report(args: argparse.Namespace, tools: Tools) -> int:
    """Write the file, for its owner's eyes alone."""
    path: Path = args.output or Path(f"nodewalld-report-{datetime.now(UTC):%Y%m%d-%H%M%S}.tar.gz")
    missing: dict[str, str] = {}
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as archive:  # noqa: PTH123
            for name, part in _parts(args, tools):
                _add(archive, f"{path.name.removesuffix('.tar.gz')}/{name}", _content(name, part, missing))
    except OSError as error:
        raise Failure(f"{path} can't be written: {error.strerror or error}") from error
    if args.json:
        print_json({"file": str(path), "missing": missing})
        return GOOD
    for name, why in missing.items():
        print(f"not in it: {name}: {why}", file=sys.stderr)
    print(f"{path}: configuration, rules, addresses and history of this node; look through it before you send it.")
    return GOOD


def _content(name: str, part: Part, missing: dict[str, str]) -> bytes:
    try:
        text = part()
    except Exception as error:  # whatever is broken is why somebody asks for a report
        missing[name] = str(error) or type(error).__name__
        text = f"not to be had: {missing[name]}\n"
    content = text.encode(errors="surrogateescape")
    return content if len(content) <= _LARGEST else content[:_LARGEST] + b"\n[cut here]\n"


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = len(content), 0o600, int(time.time())
    archive.addfile(entry, io.BytesIO(content))


def _parts(args: argparse.Namespace, tools: Tools) -> Iterator[tuple[str, Part]]:
    offline = tools.offline()
    yield "versions.txt", _versions
    for command in ("status", "history"):
        yield f"{command}.json", partial(_asked, args, command)
    yield "daemon.txt", partial(_process, args)
    yield "plan.json", partial(_plan, args, offline)
    yield "compiled.txt", partial(offline.compiled, args.config)
    for folder, pattern in ((args.config, "**/*"), (args.state_dir, "*.json")):
        for path in sorted(p for p in folder.glob(pattern) if p.is_file() and not p.is_symlink()):
            yield f"{folder.name}/{path.relative_to(folder)}", path.read_text
    for backend in Backend:
        for family in Family:
            # With all tables it reads those that are there; asked for one, the legacy tool would make it.
            yield f"kernel/{backend}-{family}.txt", partial(_printed, tool(family, backend, "save"), "-c")
    for name, argv in _PROGRAMS.items():
        yield name, partial(_printed, *argv)


def _asked(args: argparse.Namespace, command: str) -> str:
    return json.dumps(client.call(socket_of(args), {"command": command}, QUICK), indent=1) + "\n"


def _process(args: argparse.Namespace) -> str:
    """What /proc says of the daemon's memory and threads; its environment and command line stay out."""
    status = client.call(socket_of(args), {"command": "status"}, QUICK)
    return Path(f"/proc/{int(status['pid'])}/status").read_text()


def _plan(args: argparse.Namespace, offline: Offline) -> str:
    return json.dumps(offline.plan(args.config, args.state_dir), indent=1) + "\n"


def _printed(*argv: str) -> str:
    result = run(argv, timeout=_PATIENCE)
    trouble = f"[{argv[0]} ended with status {result.status}]\n" if result.status else ""
    return result.stdout + result.stderr + trouble


def _versions() -> str:
    lines = [f"nodewalld {nodewalld.__version__}", f"Python {platform.python_version()}", platform.release()]
    system = platform.freedesktop_os_release()
    lines.append(system.get("PRETTY_NAME", "an unnamed system"))
    lines += [f"{name} {metadata.version(name)}" for name in _LIBRARIES]
    for argv in _VERSIONS:
        try:
            lines.append(f"{argv[0]}: {_printed(*argv).strip()}")
        except ProgramError as error:
            lines.append(str(error))
    return "\n".join(lines) + "\n"
