"""TOML data in which every value knows its file, its line and its key: what the readers read.

Law: a tree of one file is grown from tomllib's data and `locate`'s lines; trees of several files are merged
before anything is judged, so that a value that a later file overrides is never complained about.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, time
from typing import Any

from nodewalld.configuration.locate import KeyPath
from nodewalld.core.config import Where

Value = str | bool | int | float | date | time | list["Node"] | dict[str, "Node"]

_NAME = re.compile(r"[A-Za-z0-9_-]{1,19}")
_SHOWN_MAX = 60
_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (str, "a string"),
    (bool, "a boolean"),  # before int, of which Python makes it a kind
    (int, "a number"),
    (float, "a number with a fraction"),
    (list, "a list"),
    (dict, "a table"),
    ((date, time), "a date or time"),
)


@dataclass(frozen=True, slots=True)
class Node:
    """One value, the place of its key, and the key as people write it: `port.web.ports[0]`."""

    value: Value
    where: Where
    key: str

    @property
    def kind(self) -> str:
        """What TOML calls such a value."""
        return next(name for types, name in _KINDS if isinstance(self.value, types))

    @property
    def shown(self) -> str:
        """The value for a message: quoted, without control characters, not endless."""
        if isinstance(self.value, str):
            return show(self.value)
        if isinstance(self.value, int) and self.value.bit_length() > 64:
            return "this number"  # Python refuses to print the very long ones
        return str(self.value) if not isinstance(self.value, list | dict) else self.kind


def is_name(text: str) -> bool:
    """Whether an entry can be called so: the name must fit into chain names, set names and log prefixes."""
    return bool(_NAME.fullmatch(text)) and not text.lower().endswith("-v6")


def show(text: str) -> str:
    """A text in quotes, shortened, with everything escaped that a terminal might obey."""
    cut = text if len(text) <= _SHOWN_MAX else text[: _SHOWN_MAX - 3] + "..."
    return json.dumps(cut, ensure_ascii=not cut.isprintable())


def grow(data: Mapping[str, Any], lines: Mapping[KeyPath, int], file: str, rank: int = 0) -> Node:
    """The tree of one file, the `rank`th that is read; its root stands at line 1 and has no key."""

    def node(value: Any, path: KeyPath, key: str) -> Node:
        grown: Value = value
        if isinstance(value, dict):
            grown = {name: node(inner, (*path, name), child_key(key, name)) for name, inner in value.items()}
        elif isinstance(value, list):
            grown = [node(inner, (*path, i), _element_key(key, i, inner)) for i, inner in enumerate(value)]
        return Node(grown, Where(file, lines.get(path, 1), rank), key)

    return node(data, (), "")


def child_key(parent: str, name: str) -> str:
    """The key of a value in a table, quoted where TOML would want it quoted."""
    bare = len(name) <= _SHOWN_MAX and name.isascii() and name.replace("-", "").replace("_", "").isalnum()
    return f"{parent}.{name if bare else show(name)}".removeprefix(".")


def _element_key(parent: str, index: int, value: object) -> str:
    """An entry is called by its name, which people know, and by its index only when it has none to show."""
    name = value.get("name") if isinstance(value, dict) else None
    return f"{parent}.{name}" if isinstance(name, str) and is_name(name) else f"{parent}[{index}]"


def merge(earlier: Node, later: Node) -> Node:
    """Two files as one: tables merge, arrays of tables are joined, of all else the later one counts."""
    if isinstance(earlier.value, dict) and isinstance(later.value, dict):
        merged = dict(earlier.value)
        for name, node in later.value.items():
            merged[name] = merge(merged[name], node) if name in merged else node
        return Node(merged, earlier.where, earlier.key)
    if _holds_tables(earlier) and _holds_tables(later):
        return Node([*elements(earlier), *elements(later)], earlier.where, earlier.key)
    return later


def _holds_tables(node: Node) -> bool:
    return isinstance(node.value, list) and all(isinstance(inner.value, dict) for inner in node.value)


def elements(node: Node) -> list[Node]:
    """The elements of a list; a value that is no list stands for the list of itself."""
    return node.value if isinstance(node.value, list) else [node]
