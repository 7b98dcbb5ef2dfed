"""The JSON Schema says what the loader takes: it is made of the same readers, and never stricter than they are."""

import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from nodewalld.commands import ctl
from nodewalld.configuration.describe import json_schema
from nodewalld.configuration.reading import Shape
from nodewalld.configuration.schema import SECTIONS, judge
from nodewalld.configuration.tree import grow
from nodewalld.core.config import DaemonConfig, Failsafe, Problem

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "tests/configuration"
VALIDATOR = Draft202012Validator(json_schema())

# What of the loader's messages a schema can say as well.
EXPRESSIBLE = (
    "is not a known key",
    "must be a",
    "is not known here",
    "is missing",
    "is not an absolute",
    "out of range",
    "is no known protocol",
    "is not a protocol with ports",
)


def problems(data: dict[str, Any]) -> tuple[Problem, ...]:
    """What the loader has against this file, with every set that is named defined elsewhere."""
    return judge(grow(data, {}, "f"), "f", lambda _: "", complete=False)[1]


def faults(data: dict[str, Any]) -> list[str]:
    return [f"{'/'.join(map(str, error.absolute_path))}: {error.message}" for error in VALIDATOR.iter_errors(data)]


def read(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text())


def singles(data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each entry and each named table by itself, and each key of the tables that stand once."""
    for name, value in data.items():
        if isinstance(value, list):
            yield from ({name: [entry]} for entry in value)
        elif isinstance(value, dict):
            yield from ({name: {key: inner}} for key, inner in value.items())
        else:
            yield {name: value}


def test_it_is_a_schema_and_each_key_tells_its_meaning() -> None:
    Draft202012Validator.check_schema(json_schema())
    for name, section in SECTIONS.items():
        described = json_schema()["properties"][name]
        table = {Shape.ONCE: described, Shape.NAMED: described.get("additionalProperties")}.get(section.shape)
        table = table or described["items"]
        assert list(table["properties"]) == list(section.keys)
        for key, one in section.keys.items():
            assert table["properties"][key]["description"] == one.meaning != ""
            if one.has_default:
                assert Draft202012Validator(one.reader.schema).is_valid(one.default), (name, key)
                assert table["properties"][key]["default"] == one.default


def test_the_defaults_that_are_told_are_the_ones_that_hold() -> None:
    config, found = judge(grow({"daemon": {}, "failsafe": {}}, {}, "f"), "f", lambda _: "")
    assert (config.daemon, config.failsafe, found) == (DaemonConfig(), Failsafe(), ())


@pytest.mark.parametrize(
    "path",
    [CORPUS / "contract/nodewalld.toml", *sorted((ROOT / "etc").rglob("*.toml"))],
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_a_good_file_is_good(path: Path) -> None:
    assert faults(read(path)) == []


def test_whatever_a_schema_can_say_of_a_bad_file_it_says() -> None:
    said = 0
    for path in sorted(CORPUS.glob("refused/*.toml")):
        for data in singles(read(path)):
            found = problems(data)
            if not found:
                assert faults(data) == [], path.name
            elif any(words in one.message for one in found for words in EXPRESSIBLE):
                zone_target = {one.message for one in found} == {"is missing"} and "zone" in data
                assert faults(data) or zone_target, (path.name, data, [str(one) for one in found])
                said += bool(faults(data))
    assert said > 40


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ('[[port]]\nname = "a"\nports = [0]', False),
        ('[[port]]\nname = "a"\nports = ["1-65535", "5:6", 65535]', True),
        ('[[port]]\nname = "a"\nports = [1]\naction = "redirect:99"\nallow = "any"', True),
        ('[[port]]\nname = "a"\nports = [1]\nallow = "!10.0.0.0/8"', False),
        ('[[port]]\nname = "a-v6"\nports = [1]', False),
        ('[daemon]\nmark = "0x3000"', False),
        ("[daemon]\nmark = 4096", True),
        ('[zone.a]\nprotocols = ["IPIP", 50, "vrrp"]', True),
        ('[zone.a]\nprotocols = ["ipop"]', False),
        ("[set.cali40x]\nentries = []", False),
        ('[[jump]]\nname = "a"\ntable = "filter"\nfrom = "FORWARD"\nto = "DROP"', False),
        ('[[jump]]\nname = "a"\ntable = "filter"\nfrom = "FORWARD"\nto = "DROPS"', True),
        ('[[forward]]\nname = "a"\naction = "drop"\nin = ["!eth0", "!eth+"]\nposition = { after = "KUBE-*" }', True),
        ('[[forward]]\nname = "a"\naction = "drop"\nin = "e+h"', False),
        ('[[forward]]\nname = "a"\naction = "drop"\nposition = { after = [{ text = "x" }] }', False),
    ],
)
def test_words_and_ranges_are_the_loaders(text: str, good: bool) -> None:
    data = tomllib.loads(text)
    assert (faults(data) == []) is good


JUNK = [
    "",
    "any",
    "x",
    "@s",
    "!@s",
    "! 10.0.0.0/8",
    "::/0",
    "22/tcp",
    "early",
    "é\n",
    "Ä",
    0,
    1,
    70000,
    True,
    1.5,
    [],
    {},
]


def harvested(folder: str) -> dict[str, list[Any]]:
    """Every value that the configurations in a folder give to a key."""
    found: dict[str, list[Any]] = {}
    for path in CORPUS.glob(f"{folder}/*.toml"):
        tables = [t for v in read(path).values() for t in (v if isinstance(v, list) else [v, *_inner(v)])]
        for table in (table for table in tables if isinstance(table, dict)):
            for key, value in table.items():
                found.setdefault(key, []).append(value)
    return found


def _inner(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else []


GOOD, BAD = harvested("contract"), harvested("refused")


@st.composite
def files(draw: st.DrawFn) -> dict[str, Any]:
    """A file of one table, its keys mostly right and its values from everywhere."""
    name = draw(st.sampled_from(list(SECTIONS)))
    section = SECTIONS[name]
    needed = [key for key, one in section.keys.items() if one.example]
    more = draw(st.lists(st.sampled_from(list(section.keys)), max_size=3, unique=True))
    table = {}
    for key in dict.fromkeys((*needed, *more)):
        one = section.keys[key]
        good = [*GOOD.get(key, []), *([one.default] if one.has_default else [])]
        value = draw(st.sampled_from(good if good and draw(st.integers(0, 3)) else [*BAD.get(key, []), *JUNK]))
        wraps = isinstance(value, str) and draw(st.booleans())
        table[key] = [value] if wraps else value
    if section.shape is Shape.ONCE:
        return {name: table}
    if section.shape is Shape.LISTED:
        return {name: [table]}
    return {name: {draw(st.sampled_from(["a", "A_b-9", "x" * 19, "x" * 20, "a-v6", "cali4x"])): table}}


@given(files())
@settings(max_examples=600)
def test_all_that_the_loader_takes_the_schema_takes(data: dict[str, Any]) -> None:
    if not problems(data):
        assert faults(data) == []


def test_the_command_prints_it_and_the_documentation_has_it(capsys: pytest.CaptureFixture[str]) -> None:
    sys.path.insert(0, str(ROOT / "packaging"))
    import reference  # noqa: PLC0415 - lies beside what it builds

    assert ctl.main(["schema"]) == 0
    cure = "run: .venv/bin/python packaging/reference.py"
    assert json.loads(capsys.readouterr().out) == json.loads(reference.SCHEMA.read_text()), cure
    assert reference.SCHEMA.read_text() == reference.schema_text(), cure
    text = reference.CONFIGURATION.read_text()
    assert text == reference.configuration_text(text), cure
    for section in SECTIONS.values():
        for key, one in section.keys.items():
            assert f"| `{key}` |" in text
            assert one.meaning in text
