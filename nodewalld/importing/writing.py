"""An account as TOML: entries with the lines that they come from, sets, and as comments all that could not be said.

Law: what comes from a dump is data. It goes into TOML strings and comments only through `toml_string` and `printable`,
so that no quote, backslash or control character in a rule ends a string or a line.
"""

import json
from collections.abc import Iterator, Mapping, Sequence

from nodewalld.core.events import printable
from nodewalld.importing.account import Account
from nodewalld.importing.dump import Line


def toml_string(text: str) -> str:
    """A TOML string: literal where that spares backslashes (toml.io, v1.0, String), else basic."""
    if set(text) & {'"', "\\"} and "'" not in text and text.isprintable():
        return f"'{text}'"
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def toml_value(value: object) -> str:
    """A value of strings, lists and tables, on one line."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {toml_value(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return toml_string(str(value))


def render(account: Account, source: str) -> str:
    """The text of a nodewalld.toml."""
    parts = ["\n".join(f"# {printable(line)}" for line in _head(account, source))]
    parts += [f"[set.{name}]\nentries = {_entries(entries)}" for name, entries in account.sets.items()]
    for entry in account.entries:
        lines = [f"# {_shown(line)}" for line in entry.lines]
        lines += [f"# NOTE: {printable(entry.note)}"] if entry.note else []
        keys = {key: toml_value(value) for key, value in entry.toml().items()}
        width = max(map(len, keys))
        parts.append("\n".join([*lines, "[[rule]]", *(f"{key:{width}} = {value}" for key, value in keys.items())]))
    if account.remarks:
        parts.append("\n".join(["# Sets:", *(f"# {printable(remark)}" for remark in account.remarks)]))
    if account.impossible:
        lines = [f"# {_shown(line)}\n#   {printable(why)}" for line, why in account.impossible]
        parts.append("\n".join(["# Not carried over:", *lines]))
    return "\n\n".join(parts) + "\n"


def _head(account: Account, source: str) -> Iterator[str]:
    carried, left, not_possible = len(account.carried), len(account.foreign), len(account.impossible)
    yield f"Written by `nodewallctl import` from {source}."
    yield f"{carried} lines are carried over as {len(account.entries)} rules; {left} are left to the programs that"
    yield f"write them; {not_possible} can't be carried over, and are told at the end."
    yield "The lines still stand where they stood. Try this first (`nodewallctl try DIR`), then take them out there."


def _entries(entries: Sequence[str]) -> str:
    return "[\n" + "".join(f"  {toml_string(entry)},\n" for entry in entries) + "]" if entries else "[]"


def _shown(line: Line) -> str:
    return printable(f"{line.file}:{line.number}: {line.table}: {line.text}")
