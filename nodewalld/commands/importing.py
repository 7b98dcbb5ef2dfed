"""`nodewallctl import`: rules by hand, from a file of iptables-save or from the kernel, as TOML on stdout.

Law: it reads and prints, and changes nothing. What could not be carried over goes to stderr as well, line by line.
"""

import argparse
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from nodewalld.commands.common import GOOD, Failure, Tools, complain, print_json, reading
from nodewalld.core.words import Family, Table
from nodewalld.importing.account import Account, account
from nodewalld.importing.dump import SIZE_MAX, Dump, DumpError, Line, read_dump
from nodewalld.importing.sets import KernelSet
from nodewalld.importing.writing import render

_STDIN = "-"


def run(args: argparse.Namespace, _tools: Tools) -> int:
    """Print the TOML, or with --json the lists of lines as well."""
    if args.file is None:
        with reading("import"):
            dumps, sets = _live()
        source = " and ".join(sorted({line.file for dump in dumps for line in dump.lines()})) or "this node"
    else:
        source = "standard input" if args.file == _STDIN else args.file
        dumps, sets = [_from_file(args.file, source)], None
    found = account(dumps, sets)
    text = render(found, source)
    complain(f"{line.file}:{line.number}: {why}: {line.text}" for line, why in found.impossible)
    complain(found.remarks)
    if args.json:
        print_json(_json(found, text))
    else:
        owners = Counter(owner for _, owner in found.foreign)
        told = ", ".join(f"{owner} {count}" for owner, count in owners.most_common())
        complain([f"lines left to the programs that write them: {told}"] if told else [])
        print(text, end="")
    return GOOD


def _from_file(name: str, source: str) -> Dump:
    try:
        if name == _STDIN:
            content = sys.stdin.buffer.read(SIZE_MAX + 1)
        else:
            with Path(name).open("rb") as file:
                content = file.read(SIZE_MAX + 1)
        return read_dump(content, source)
    except OSError as error:
        raise Failure(f"{source} can't be read: {error.strerror or error}") from error
    except DumpError as error:
        place = f"{source}:{error.line}" if error.line else source
        raise Failure(f"{place}: {error}") from error


def _live() -> tuple[list[Dump], dict[str, KernelSet]]:
    """What is in the kernel now: both families of the backend in use, and the sets that their rules name."""
    import tempfile  # noqa: PLC0415

    from nodewalld.kernel import backends  # noqa: PLC0415 - heavy
    from nodewalld.kernel.firewall import (  # noqa: PLC0415
        open_firewall,
        require_tools,
        tool,
    )
    from nodewalld.kernel.process import installed  # noqa: PLC0415

    shown = backends.evidence()
    backend = shown[0] if shown else backends.of_tool()
    require_tools(Family, backend)
    dumps, names = [], set[str]()
    with tempfile.TemporaryDirectory(prefix="nodewalld-") as folder:
        for family in Family:
            program = tool(family, backend, "save")
            if not installed(program):
                continue
            firewall = open_firewall(family, backend, Path(folder))
            try:
                with firewall.exclusive():
                    text = "".join(firewall.counters(table) for table in Table if firewall.observe_all(table).chains)
            finally:
                firewall.close()
            names |= set(re.findall(r"--match-set (\S+)", text))
            if text:
                dumps.append(read_dump(text.encode("utf-8", "surrogateescape"), program, family))
    return dumps, _sets(names)


def _sets(names: set[str]) -> dict[str, KernelSet]:
    from nodewalld.configuration.schema import RESERVED_SETS  # noqa: PLC0415
    from nodewalld.kernel.sets import Sets  # noqa: PLC0415

    if not names:
        return {}
    found = {}
    with Sets() as sets:
        for name in sorted(names):
            header = sets.header(name)
            if header is None:
                continue
            wanted = header.type_name in {"hash:net", "hash:ip"} and not name.startswith(RESERVED_SETS)
            entries = tuple(sorted(map(str, sets.entries(name)))) if wanted else ()
            found[name] = KernelSet(header.type_name, header.family, entries)
    return found


def _json(found: Account, text: str) -> dict[str, Any]:
    names: dict[Line, list[str]] = {}
    for entry in found.entries:
        for line in entry.lines:
            names.setdefault(line, []).append(entry.name)
    return {
        "toml": text,
        "carried": [{**_place(line), "rules": names.get(line, [])} for line in found.carried],
        "foreign": [{**_place(line), "owner": owner} for line, owner in found.foreign],
        "impossible": [{**_place(line), "why": why} for line, why in found.impossible],
        "notes": [{"rule": entry.name, "note": entry.note} for entry in found.entries if entry.note],
        "sets": list(found.remarks),
    }


def _place(line: Line) -> dict[str, Any]:
    return {"file": line.file, "line": line.number, "table": line.table.value, "text": line.text}
