"""How values are read: a reader takes a node and gives a value, and what is wrong is collected, never
thrown on.

Law: a reader raises FieldError for the one value that it can't take; everything that goes over several
values (a list, a table) catches it for each of them, so that one reading finds all that is wrong.
"""

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Generic, TypeVar

from nodewalld.configuration.tree import Node, child_key, elements, grow
from nodewalld.core.config import Problem
from nodewalld.core.words import Family

T = TypeVar("T")


class FieldError(Exception):
    """One value that can't be taken: which, why, and what would be right."""

    def __init__(self, node: Node, message: str, cure: str = "") -> None:
        super().__init__(message)
        self.problem = Problem(node.where, node.key, message, cure)


class TooMany(Exception):
    """There are so many problems that looking for more would only take time."""


PROBLEMS_MAX = 1000
"""How many problems are told at once."""

_NEAR_MAX = 1000  # among more words than these the one that was meant isn't looked for: it would take minutes
_WORD_MAX = 60

ReadSet = Callable[[str], str]
"""Gives the text of a set file; raises FileError when it can't be had."""


@dataclass(slots=True)
class Reading:
    """One reading: what the readers must know beyond their node, and all that they find."""

    set_names: Collection[str]
    set_file: ReadSet
    complete: bool
    """False when a file could not be read, so that a name that nobody defines may be defined there."""
    families: tuple[Family, ...] = tuple(Family)
    """Those of the whole daemon."""
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)

    def note(self, problem: Problem) -> None:
        """Note something wrong. Raises TooMany when nobody would read on."""
        self.problems.append(problem)
        if len(self.problems) == PROBLEMS_MAX:
            message = f"is the {PROBLEMS_MAX:,}th problem, and the rest was not looked at"
            self.problems.append(Problem(problem.where, problem.key, message, "put these right first"))
            raise TooMany

    def refuse(self, node: Node, message: str, cure: str = "") -> None:
        """Note something wrong, and read on."""
        self.note(Problem(node.where, node.key, message, cure))

    def warn(self, node: Node, code: str, message: str, cure: str = "") -> None:
        """Note something that is taken, and may not be what was meant; its code is told in docs/lints.md."""
        self.warnings.append(Problem(node.where, node.key, message, cure, code))

    def collect(self, reader: "Read[T]", nodes: Iterable[Node]) -> tuple[T, ...]:
        """The values of those nodes that can be read; the others are noted."""
        values: list[T] = []
        for node in nodes:
            try:
                values.append(reader(node, self))
            except FieldError as error:
                self.note(error.problem)
        return tuple(values)


Read = Callable[[Node, Reading], T]
Schema = Mapping[str, Any]
"""A JSON Schema, draft 2020-12."""

_LEFT_OUT = object()


@dataclass(frozen=True, slots=True)
class Reader(Generic[T]):
    """Takes a node and gives a value, and describes what it takes.

    All that `read` takes fits `schema`. What fits may still be refused, for what no schema can say.
    """

    read: Read[T]
    schema: Schema

    def __call__(self, node: Node, reading: Reading) -> T:
        """The value. Raises FieldError."""
        return self.read(node, reading)


def takes(schema: Schema) -> Callable[[Read[T]], Reader[T]]:
    """Make a reader of a function, with the description of what it takes."""
    return lambda read: Reader(read, schema)


def any_of(*schemas: Schema) -> Schema:
    """What fits one of them at least."""
    return {"anyOf": list(schemas)}


def one_or_list(item: Schema, **more: Any) -> Schema:
    """One value, or a list of such."""
    return any_of(item, {"type": "array", "items": item, **more})


@dataclass(frozen=True, slots=True)
class Key:
    """A key of a table: its reader, the field of the value that it fills, and what holds when it is left out.

    `default` is a value as a file has it, and is read as if it stood there; `absent` is the field's value where no file
    can say it. An `example` makes the key required, and is the cure when it is missing. `meaning` is told to people,
    by docs/configuration.md and by the schema.
    """

    reader: Reader[Any]
    meaning: str
    field: str = ""
    default: Any = _LEFT_OUT
    absent: Any = _LEFT_OUT
    example: str = ""

    @property
    def has_default(self) -> bool:
        """Whether there is a `default`."""
        return self.default is not _LEFT_OUT


def described(keys: Mapping[str, Key]) -> Schema:
    """A table with these keys and no others."""
    return {
        "type": "object",
        "properties": {
            name: {
                "description": key.meaning,
                **key.reader.schema,
                **({"default": key.default} if key.has_default else {}),
            }
            for name, key in keys.items()
        },
        "additionalProperties": False,
    }


class Shape(Enum):
    """How often a table stands in a configuration, and how its heads are written."""

    ONCE = "[{}]"
    NAMED = "[{}.NAME]"
    LISTED = "[[{}]]"


@dataclass(frozen=True, slots=True)
class Section:
    """A kind of table: its keys, and for a named one which names it may have."""

    shape: Shape
    meaning: str
    keys: Mapping[str, Key]
    names: Schema = field(default_factory=dict)


def table(node: Node) -> dict[str, Node]:
    """The nodes of a table."""
    if not isinstance(node.value, dict):
        array, bracket, _ = node.key.rpartition("[")
        cure = f"[[{array}]]" if bracket else f"[{node.key}]"
        raise FieldError(node, f"must be a table, not {node.kind}", cure)
    return node.value


def read_table(node: Node, keys: Mapping[str, Key], reading: Reading) -> dict[str, Any]:
    """The fields that a table fills; those that can't be read are noted and missing."""
    nodes = table(node)
    refuse_unknown(nodes, keys, reading)
    fields: dict[str, Any] = {}
    for name, key in keys.items():
        if name in nodes:
            for value in reading.collect(key.reader, [nodes[name]]):
                fields[key.field or name] = value
        elif key.example:
            missing = Node(node.value, node.where, child_key(node.key, name))
            reading.refuse(missing, "is missing", key.example)
        elif key.has_default:
            written = table(grow({name: key.default}, {}, node.where.file))[name]
            fields[key.field or name] = key.reader(written, reading)
        elif key.absent is not _LEFT_OUT:
            fields[key.field or name] = key.absent
    return fields


def refuse_unknown(nodes: Mapping[str, Node], known: Collection[str], reading: Reading) -> None:
    """Note each key that means nothing here; it would be a rule that is not in force."""
    for name, node in nodes.items():
        if name not in known:
            reading.refuse(node, "is not a known key", did_you_mean(name, known))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A cure for an unknown word: the nearest known one, else all of them."""
    words = sorted(known)
    near = nearest(word, words)
    return f"did you mean {near}?" if near else f"known here: {', '.join(words)}"


def nearest(word: str, known: Collection[str]) -> str:
    """The known word that was meant, perhaps; "" when none is like it."""
    if len(known) > _NEAR_MAX or len(word) > _WORD_MAX:
        return ""
    return next(iter(difflib.get_close_matches(word, known, 1)), "")


def listed(
    reader: Reader[T], *, example: str, single: bool = False, empty: str = "", unique: bool = False
) -> Reader[tuple[T, ...]]:
    """A reader of lists. `single`: one value may stand without list; `empty`: why a list can't be empty."""

    def read(node: Node, reading: Reading) -> tuple[T, ...]:
        values = reading.collect(reader, list_nodes(node, example=example, single=single, empty=empty))
        if unique and len(set(values)) < len(values):
            raise FieldError(node, "says the same thing twice", "each once")
        return values

    array = {"type": "array", "items": reader.schema, **_least(empty), **({"uniqueItems": True} if unique else {})}
    return Reader(read, any_of(reader.schema, array) if single else array)


def _least(empty: str) -> Schema:
    return {"minItems": 1} if empty else {}


def list_nodes(node: Node, *, example: str, single: bool = False, empty: str = "") -> list[Node]:
    """The nodes of a list, or of the one value that stands for it."""
    bare = single and isinstance(node.value, str)
    if not bare and not isinstance(node.value, list):
        raise FieldError(node, f"must be a list, not {node.kind}", example)
    if empty and node.value == []:
        raise FieldError(node, f"is empty, {empty}", example)
    return elements(node)
