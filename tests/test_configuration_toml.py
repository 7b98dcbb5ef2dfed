"""Where keys stand in a TOML text, and that no TOML text at all brings the loader down.

The property writes a text in many styles and notes the line of each value while it does.
"""

import json
import random
import tomllib
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodewalld.configuration.errors import ConfigError
from nodewalld.configuration.load import load
from nodewalld.configuration.locate import KeyPath, locate
from nodewalld.core.config import Config

CORPUS = {
    "tables, dotted and quoted keys": (
        '# nothing\na = 1 # [x]\nb.c.d = 2\n"b".\'c\'.e = 3\n[t]\n  x = 1\n[ t . "u.v" ] # ]\ny = 2\n[t.w.z]\n',
        {"a": 2, "b": 3, "b.c": 3, "b.c.d": 3, "b.c.e": 4, "t": 5, "t.x": 6, "t.u.v": 7, "t.u.v.y": 8}
        | {"t.w": 9, "t.w.z": 9},
    ),
    "arrays of tables and tables in them": (
        "[[a]]\nx = 1\n[a.b]\ny = 1\n[[a.c]]\n[[a]]\nx = 2\n[[a.c]]\nz = 1\n[[ a.c ]]\nz = 2\n",
        {"a": 1, "a.0": 1, "a.0.x": 2, "a.0.b": 3, "a.0.b.y": 4, "a.0.c": 5, "a.0.c.0": 5, "a.1": 6, "a.1.x": 7}
        | {"a.1.c": 8, "a.1.c.0": 8, "a.1.c.0.z": 9, "a.1.c.1": 10, "a.1.c.1.z": 11},
    ),
    "arrays over many lines": (
        "a = [ # [\n 1,\n\n [2, 3], # ]\n {x = 4},\n '''\n]''',\n 1979-05-27 07:32:00,\n]\nb = []\n",
        {"a": 1, "a.0": 2, "a.1": 4, "a.1.0": 4, "a.1.1": 4, "a.2": 5, "a.2.x": 5, "a.3": 6, "a.4": 8, "b": 10},
    ),
    "strings that look like something else": (
        'a = """\n[t]\nb = 1 \\"""\n"""\nc = \'\'\'\n# x\'\'\'\'\'\nd = "\\"]#"\ne = \'\\\'\nf = """"x"""""\ng = ""\n',
        {"a": 1, "c": 5, "d": 7, "e": 8, "f": 9, "g": 10},
    ),
    "inline tables": (
        "a = { b.c = 1, 'd' = [ 1,\n 2 ], e = {} }\nf = {x = {y = [{z = 1}]}}",
        {"a": 1, "a.b": 1, "a.b.c": 1, "a.d": 1, "a.d.0": 1, "a.d.1": 2, "a.e": 2, "f": 3, "f.x": 3, "f.x.y": 3}
        | {"f.x.y.0": 3, "f.x.y.0.z": 3},
    ),
    "Windows line ends": (
        "\r\na = 1\r\n\r\n[b]\r\nc = [\r\n1,\r\n2]\r\n",
        {"a": 2, "b": 4, "b.c": 5, "b.c.0": 6, "b.c.1": 7},
    ),
    "a table named before its parent": ("[a.b]\nx = 1\n[a]\ny = 1\n", {"a": 1, "a.b": 1, "a.b.x": 2, "a.y": 4}),
    "nothing": ("", {}),
    "a comment without an end": ("# x", {}),
}


@pytest.mark.parametrize("name", CORPUS)
def test_every_key_is_found_on_its_line(name: str) -> None:
    text, expected = CORPUS[name]
    found = locate(text)
    assert {".".join(map(str, path)): line for path, line in found.items()} == expected
    assert set(found) == set(paths(tomllib.loads(text)))


def paths(value: object, path: KeyPath = ()) -> Iterator[KeyPath]:
    """The path of everything in a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inner:
        yield (*path, key)
        yield from paths(child, (*path, key))


class Writer:
    """Writes data as TOML in styles that a generator of random numbers chooses, and notes the lines."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.text = ""
        self.lines: dict[KeyPath, int] = {}

    def document(self, data: dict[str, Any]) -> None:
        self.table((), data)
        if self.chance.random() < 0.5:
            self.text = self.text.rstrip("\r\n")

    def table(self, path: KeyPath, data: dict[str, Any]) -> None:
        later: dict[str, Any] = {}
        for key, value in data.items():
            tables = isinstance(value, list) and value and all(isinstance(inner, dict) for inner in value)
            if (isinstance(value, dict) or tables) and self.chance.random() < 0.7:
                later[key] = value
            else:
                self.blank()
                self.pair(path, key, value)
                self.text += self.chance.choice(["\n", " # x = 'y\n", "\t\r\n"])
        for key, value in later.items():
            for index, inner in enumerate(value if isinstance(value, list) else [value]):
                self.blank()
                here = (*path, key)
                self.note(here)
                opening, closing = "[", "]"
                if isinstance(value, list):
                    here, opening, closing = (*here, index), "[[", "]]"
                    self.note(here)
                header = self.chance.choice([".", " . "]).join(self.key(k) for k in here if isinstance(k, str))
                self.text += f"{opening}{self.space()}{header}{self.space()}{closing} # [[no]]\n"
                self.table(here, inner)

    def pair(self, path: KeyPath, key: str, value: object) -> None:
        path = (*path, key)
        self.note(path)
        self.text += self.key(key)
        while isinstance(value, dict) and len(value) == 1 and self.chance.random() < 0.5:
            [(key, value)] = value.items()
            path = (*path, key)
            self.note(path)
            self.text += f"{self.space()}.{self.space()}{self.key(key)}"
        self.text += f"{self.space()}={self.space()}"
        self.value(path, value)

    def value(self, path: KeyPath, value: object) -> None:
        if isinstance(value, str):
            self.text += self.string(value)
        elif isinstance(value, list):
            self.text += "["
            for index, inner in enumerate(value):
                self.blank()
                self.note((*path, index))
                self.value((*path, index), inner)
                self.text += self.space() + ("," if index + 1 < len(value) else self.chance.choice(["", ","]))
            self.blank()
            self.text += "]"
        elif isinstance(value, dict):
            self.text += "{" + self.space()
            for index, (key, inner) in enumerate(value.items()):
                self.text += f",{self.space()}" if index else ""
                self.pair(path, key, inner)
            self.text += self.space() + "}"
        else:
            self.text += json.dumps(value) if isinstance(value, bool) else repr(value)

    def string(self, value: str) -> str:
        escaped = quoted(value)[1:-1]
        styles = [
            f'"{escaped}"',
            f'"""\n{escaped}"""',
            f'"""\\\n\n  {escaped}"""' if value[:1].strip() else '"""' + escaped + '"""',
        ]
        if value.isprintable() and "'" not in value:
            styles += [f"'{value}'", f"'''\n{value}'''"]
        if "\n" in value and "\r" not in value and value.replace("\n", "").isprintable() and "'" not in value:
            styles.append(f"'''\n{value}'''")
        return self.chance.choice(styles)

    def key(self, key: str) -> str:
        bare = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
        return key if bare and self.chance.random() < 0.7 else quoted(key)

    def blank(self) -> None:
        self.text += "".join(self.chance.choices(["", "\n", " ", "# a = [\n", "\t#'''\n"], k=2))

    def space(self) -> str:
        return self.chance.choice(["", " ", "\t"])

    def note(self, path: KeyPath) -> None:
        self.lines.setdefault(path, self.text.count("\n") + 1)


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


TEXT = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(["\n]", "'''", '"""', "\\", "#", "a b"])
SCALAR = TEXT | st.integers() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False)
VALUE = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=12
)


@settings(max_examples=300, deadline=None)
@given(data=st.dictionaries(TEXT, VALUE, max_size=6), chance=st.randoms(use_true_random=False))
def test_lines_are_found_in_every_style_of_writing(data: dict[str, Any], chance: random.Random) -> None:
    writer = Writer(chance)
    writer.document(data)
    assert tomllib.loads(writer.text) == data
    assert locate(writer.text) == writer.lines


WORDS = st.sampled_from(
    [
        *(
            "any",
            "",
            "local",
            "tcp",
            "udp",
            "drop",
            "accept",
            "reject",
            "redirect",
            "redirect:x",
            "first",
            "nat",
            "filter",
        ),
        *("10.0.0.0/8", "10.0.0.1/8", "!@web", "@web", "@x", "!", "fd00::1", "22/tcp", "1-2", "2-1", "30s", "0x1000"),
        *(
            "eth+",
            "INPUT",
            "FORWARD",
            "NODEWALL",
            "cali-x",
            "-j DROP",
            "-A INPUT",
            '"',
            "-s 10.0.0.1 -j cali-x",
            "auto",
        ),
        *("ipv4", "ipv6", "web", "a-v6", "/dev/null", "/nonexistent", "x" * 50, "-", "--", "-j", "[::]:1"),
    ]
)
NAMES = st.sampled_from(
    [
        *("name", "ports", "protocol", "allow", "deny", "action", "destination", "source", "in", "out", "position"),
        *("after", "before", "rule", "comment", "table", "chain", "from", "to", "families", "enforce", "log"),
        *("entries", "files", "backend", "resync", "yield_to", "mark", "metrics", "web", "from_node"),
    ]
)
FIELD = st.recursive(
    WORDS | SCALAR | st.integers(-1, 70000),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | TEXT, inner, max_size=4),
    max_leaves=8,
)
TABLE = st.dictionaries(NAMES, FIELD, max_size=9)
GOOD: dict[str, dict[str, Any]] = {
    "port": {"name": "a", "ports": [1]},
    "forward": {"name": "a", "action": "drop"},
    "rule": {"name": "a", "table": "filter", "chain": "INPUT", "rule": "-j DROP"},
    "jump": {"name": "a", "table": "filter", "from": "INPUT", "to": "X"},
}
ENTRY = {kind: st.builds(lambda table, good=good: good | table, TABLE) for kind, good in GOOD.items()}
TREE = st.fixed_dictionaries(
    {},
    optional={
        **{kind: st.lists(entry | TABLE, max_size=3) | FIELD for kind, entry in ENTRY.items()},
        **dict.fromkeys(("daemon", "failsafe", "zone", "service"), TABLE | FIELD),
        "set": st.dictionaries(NAMES, TABLE, max_size=3) | FIELD,
    },
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "conf.d").mkdir()
    return folder


@settings(max_examples=400, deadline=None)
@given(trees=st.lists(TREE, min_size=1, max_size=2), chance=st.randoms(use_true_random=False))
def test_no_data_brings_anything_but_a_config_or_problems(
    trees: list[dict[str, Any]], chance: random.Random, folder: Path
) -> None:
    lengths: dict[str, int] = {}
    for tree, name in zip(trees, ("nodewalld.toml", "conf.d/a.toml"), strict=False):
        writer = Writer(chance)
        writer.document(tree)
        (folder / name).write_text(writer.text, newline="")
        lengths[str(folder / name)] = writer.text.count("\n") + 1
    if len(trees) == 1:
        (folder / "conf.d/a.toml").unlink(missing_ok=True)
    found = outcome(folder)
    if isinstance(found, Config):
        assert all(unicodedata.category(char) != "Cc" for text in strings(found) for char in text)
        return
    assert found.problems
    for problem in found.problems:
        assert 1 <= problem.where.line <= lengths[problem.where.file]
        assert problem.key
        assert problem.message
    assert all(unicodedata.category(char) != "Cc" for problem in found.problems for char in str(problem))
    assert len(str(found).splitlines()) == len(found.problems)


def outcome(folder: Path) -> Config | ConfigError:
    try:
        return load(folder, check_owner=False)
    except ConfigError as error:
        return error


def strings(value: object) -> Iterator[str]:
    """Every string of a frozen value, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from strings(inner)
    elif hasattr(value, "__dataclass_fields__"):
        for field in value.__dataclass_fields__:
            yield from strings(getattr(value, field))


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=60) | st.text(st.sampled_from("[]{}=.,#\"'\\\n a1"), max_size=40).map(str.encode))
def test_no_bytes_bring_anything_but_a_config_or_problems(content: bytes, folder: Path) -> None:
    (folder / "conf.d/a.toml").unlink(missing_ok=True)
    (folder / "nodewalld.toml").write_bytes(content)
    found = outcome(folder)
    assert isinstance(found, Config) or len(str(found).splitlines()) == len(found.problems) > 0
