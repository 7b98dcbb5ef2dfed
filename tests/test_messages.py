"""Every key, every default and every message of a configuration: written in the documents, and produced by a test.

A message that nothing produces is one that nobody has ever read. The corpus is three tables: the files in
`configuration/refused`, the texts of `ONCE` and `ALONE`, and folders in which something is wrong with a file itself.
"""

import ast
import contextlib
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
from test_configuration import CORPUS, ONCE

import nodewalld.configuration
from nodewalld.configuration import load, reading, schema
from nodewalld.configuration.errors import ConfigError
from nodewalld.configuration.load import recall
from nodewalld.configuration.setfiles import read_set
from nodewalld.core.config import Config, Problem, Sources

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(nodewalld.configuration.__file__).parent
MAKERS = {"FieldError", "FileError", "Problem", "refuse", "warn"}

# --- messages


class Fault(NamedTuple):
    """Something wrong with a file: how it is made, and what is said of it."""

    make: Callable[[Path], object]
    expected: str


def _main(text: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "nodewalld.toml").write_bytes(text if isinstance(text, bytes) else text.encode())


def _set_file(text: str | bytes, mode: int = 0o600) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        path = folder / "set.txt"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        path.chmod(mode)
        _main(f'[set.s]\nfiles = ["{path}"]\n')(folder)

    return make


def _instead(make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Something in the place of the main file."""

    def made(folder: Path) -> None:
        (folder / "nodewalld.toml").unlink()
        make(folder / "nodewalld.toml")

    return made


def _file_for_folder(folder: Path) -> None:
    (folder / "conf.d").write_text("")


ZONE = '[zone.z]\ninterfaces = ["eth0"]\ntarget = "drop"\n'
ADDRESS = 'such as "10.0.0.1", "10.0.0.0/8" or "fd00::/64"'
ALONE = {
    "[service.nothing]\n" + ZONE: '1: service.nothing: is empty, and would allow nothing (ports = ["8200/tcp"])',
    f"[zone.{'z' * 20}]\ntarget = 'drop'": (
        f'1: zone.{"z" * 20}: "{"z" * 20}" can\'t be a name (1 to 19 of A-Z, a-z, 0-9, _ and -)'
    ),
    '[daemon]\nmark = "all"': '2: daemon.mark: "all" is not a mark (one bit, such as "0x1000")',
    '[daemon]\nresync = "soon"': '2: daemon.resync: "soon" is not a duration (such as "30s", "5m" or "1h")',
    f'[daemon]\nmetrics = "/{"x" * 4096}"': "2: daemon.metrics: is longer than 4096 bytes (a shorter text)",
    '[daemon]\nmetrics = "/\N{RIGHT-TO-LEFT OVERRIDE}x"': "2: daemon.metrics: holds the control character '\\u202e'",
    "a = [": "1: syntax: Invalid value, at the end of the file (see https://toml.io)",
    "a = \n": "1: syntax: Invalid value, at column 5 (see https://toml.io)",
    f"a = {'[' * 900}{']' * 900}": "1: file: is nested too deeply (fewer lists in lists)",
    f"a = {'9' * 4001}": "1: syntax: holds a number that is too long (a shorter number)",
    f"\n{'a.' * 100}a = 1": "2: syntax: has a key of more than 100 parts (fewer dots)",
}
LIMITED = {
    f"a = [\n{'1,' * 60}]": "2: syntax: has more values than can be taken (addresses in the `files` of a set)",
    "\n".join(f"k{number} = 1" for number in range(40)): "11: k10: is the 11th problem, and the rest was not looked at",
    f"# {'x' * 9000}": "1: file: is more than the 0 MiB that all of them may have together (addresses can stand in",
}
WARNED = {
    '[daemon]\nmark = "0x4000"': "2: daemon.mark: 0x4000 is in use by kube-proxy",
    "[failsafe]\nports = []": "2: failsafe.ports: is empty: nothing keeps a way back in",
    '[zone.z]\ntarget = "drop"': "1: zone.z: has neither sources nor interfaces: no packet belongs to it",
    '[[port]]\nname = "p"\nports = [1]\ndeny = ["any"]': "4: port.p.deny: is taken out of allow, and allow is empty",
    'daemon.families = ["ipv4"]\n[[jump]]\nname = "j"\ntable = "nat"\nfrom = "OUTPUT"\nto = "X"\nfamilies = ["ipv6"]': (
        "7: jump.j.families: none of these is in daemon.families: it is never written"
    ),
}
FAULTS = {
    "a folder": Fault(_instead(Path.mkdir), "is a folder"),
    "a pipe": Fault(_instead(os.mkfifo), "is not a regular file"),
    "a loop": Fault(_instead(lambda p: p.symlink_to(p.name)), "can't be read: Too many levels of symbolic links"),
    "a link to nothing": Fault(_instead(lambda p: p.symlink_to("x")), "is a symbolic link to nothing"),
    "nothing": Fault(_instead(lambda _: None), "does not exist"),
    "a file for a folder": Fault(_file_for_folder, "is not a folder"),
    "not UTF-8": Fault(_main(b"\n\xff"), "2: file: is not UTF-8 here"),
    "a byte order mark": Fault(_main(b"\xef\xbb\xbf"), "begins with a byte order mark"),
    "writable": Fault(lambda f: (f / "nodewalld.toml").chmod(0o646), "can be written by others than root (mode 0646)"),
    "in a writable folder": Fault(lambda f: f.chmod(0o777), "can be written by others than root (mode 0777)"),
    "a bad set file": Fault(_set_file("10.0.0.1\n\nten\n"), 'set.txt:3: set.s.files[0]: "ten" is not an address'),
    "a set file of bytes": Fault(_set_file(b"10.0.0.1\n\xff\n"), "set.txt:2: set.s.files[0]: is not UTF-8 here"),
    "a writable set file": Fault(_set_file("", 0o666), "set.txt can be written by others than root (mode 0666)"),
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that a test reaches quickly."""
    lower_limits(monkeypatch)


def lower_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PROBLEMS_MAX", 11)
    monkeypatch.setattr(load, "VALUES_MAX", 50)
    monkeypatch.setattr(load, "FILES_MAX", 8000)


def folder_of(path: Path, text: str = "") -> Path:
    path.mkdir(parents=True)
    (path / "nodewalld.toml").write_text(text, newline="")
    (path / "nodewalld.toml").chmod(0o600)
    path.chmod(0o700)
    return path


def refused(folder: Path) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as caught:
        load.load(folder)
    return caught.value.problems


def has(found: tuple[Problem, ...], expected: str, folder: Path) -> None:
    told = [str(problem) for problem in found]
    assert any(expected in line for line in told), told
    for problem in found:
        assert problem.key
        assert problem.message
        assert problem.cure
        assert problem.where.line >= 1
        assert problem.where.file.startswith(str(folder))


@pytest.mark.parametrize(("text", "expected"), LIMITED.items(), ids=[told[:50] for told in LIMITED.values()])
def test_what_would_take_too_much_is_refused(text: str, expected: str, tmp_path: Path, small: None) -> None:
    folder = folder_of(tmp_path / "etc", text)
    has(refused(folder), f"nodewalld.toml:{expected}", folder)


@pytest.mark.parametrize(("text", "expected"), ALONE.items(), ids=[told[:50] for told in ALONE.values()])
def test_what_hides_other_problems_or_stands_alone(text: str, expected: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "etc", text)
    has(refused(folder), f"nodewalld.toml:{expected}", folder)


@pytest.mark.parametrize(("text", "expected"), WARNED.items(), ids=[told[:50] for told in WARNED.values()])
def test_what_is_taken_and_may_not_be_meant(text: str, expected: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "etc", text)
    has(load.load(folder).warnings, f"nodewalld.toml:{expected}", folder)


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_with_a_file_itself(name: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "etc")
    FAULTS[name].make(folder)
    has(refused(folder), FAULTS[name].expected, folder)


def a_loose_link(folder: Path) -> None:
    """A link to a file in a folder that others can write."""
    loose = folder.parent / "loose"
    folder_of(loose).chmod(0o777)
    (folder / "nodewalld.toml").unlink()
    (folder / "nodewalld.toml").symlink_to(loose / "nodewalld.toml")


def a_changing_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody writes the main file while it is read."""
    path, read = folder / "nodewalld.toml", os.read

    def meddle(handle: int, size: int) -> bytes:
        path.write_text("[daemon]\n# more\n")
        return read(handle, size)

    monkeypatch.setattr(os, "read", meddle)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path / "etc", "[daemon]\n")
    with monkeypatch.context() as patch:
        a_changing_file(folder, patch)
        has(refused(folder), "changes while it is read (write a new file, and rename it to this name)", folder)
    assert load.load(folder)


def test_every_message_of_the_configuration_is_produced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = (*(fault.make for fault in FAULTS.values()), a_loose_link)
    reached: set[tuple[str, int]] = set()
    for number, text in enumerate(_texts()):
        reached |= _lines_of(load.load, folder_of(tmp_path / f"text{number}", text))
    for number, fault in enumerate(faults):
        folder = folder_of(tmp_path / f"fault{number}/etc")
        fault(folder)
        reached |= _lines_of(load.load, folder)
    reached |= _lines_of(read_set, str(tmp_path / "missing"))
    reached |= _lines_of(recall, Sources("/x", {"/x/nodewalld.toml": '[set.s]\nfiles = ["/y"]'}, {}))
    with monkeypatch.context() as patch:
        folder = folder_of(tmp_path / "changing")
        a_changing_file(folder, patch)
        reached |= _lines_of(load.load, folder)
    lower_limits(monkeypatch)
    for number, text in enumerate(LIMITED):
        reached |= _lines_of(load.load, folder_of(tmp_path / f"limited{number}", text))
    unreached = [text for file, lines, text in _sites() if not {(file, line) for line in lines} & reached]
    assert [text for text in unreached if UNTRACED not in text] == []


def _lines_of(action: Callable[[Any], object], argument: object) -> set[tuple[str, int]]:
    """The lines of the package that are run; by Python's own tracing, which a RecursionError ends."""
    found: set[tuple[str, int]] = set()

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(str(PACKAGE)):
            return None
        if event == "line":
            found.add((Path(frame.f_code.co_filename).name, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with contextlib.suppress(ConfigError):
            action(argument)
    finally:
        sys.settrace(before)
    return found


def _texts() -> Iterator[str]:
    yield from (path.read_text() for path in sorted(CORPUS.glob("refused/*.toml")))
    yield from (text for text, _ in ONCE)
    yield from (*ALONE, *WARNED)


def _sites() -> Iterator[tuple[str, range, str]]:
    """Where a problem is made: the file, the lines, and how the first begins."""
    for path in sorted(PACKAGE.glob("*.py")):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call):
                called = getattr(node.func, "id", "") or getattr(node.func, "attr", "")
                if called in MAKERS:
                    lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                    yield path.name, lines, f"{path.name}:{node.lineno}: {text.splitlines()[node.lineno - 1].strip()}"


# --- keys and defaults

UNTRACED = "is nested too deeply"  # told after a RecursionError, which ends the tracing; it stands in ALONE

KEYS = {kind: section.keys for kind, section in schema.SECTIONS.items()}
# The least that each kind needs, so that its defaults hold for all else; the last table is the one in question.
SERVED = '[zone.y]\ninterfaces = ["eth9"]\ntarget = "drop"\nservices = ["x"]\n'
LEAST = {
    "daemon": ["[daemon]\n"],
    "failsafe": ["[failsafe]\n"],
    "set": ["[set.x]\n"],
    "port": ['[[port]]\nname = "x"\nports = [1]\n'],
    "forward": ['[[forward]]\nname = "x"\naction = "drop"\n'],
    "rule": ['[[rule]]\nname = "x"\ntable = "filter"\nchain = "INPUT"\nrule = "-j DROP"\n'],
    "jump": ['[[jump]]\nname = "x"\ntable = "filter"\nfrom = "INPUT"\nto = "X"\n'],
    "zone": ['[zone.x]\ntarget = "drop"\n'],
    "service": [
        f"{SERVED}[service.x]\n{key} = {value}\n" for key, value in (("ports", '["1/tcp"]'), ("protocols", '["gre"]'))
    ],
}
# What has no value to be written: it follows from other keys.
UNWRITTEN = {
    ("rule", "families"),
    ("jump", "families"),
    ("jump", "position"),
    ("jump", "enforce"),
    ("forward", "position"),
}


def _documented() -> Iterator[tuple[str, str, str, str]]:
    """Document, kind, key and default, wherever a document names a default; "" for a key without one."""
    kind = ""
    for line in (ROOT / "docs/configuration.md").read_text().splitlines():
        if head := re.match(r"## `\[+([a-z]+)", line):
            kind = head[1]
        elif line.startswith("## "):
            kind = ""
        elif kind and (row := re.match(r"\| (`[^|]*) \| ([^|]*) \|", line)):
            names = re.findall(r"`([a-z_]+)`", row[1])
            values = re.findall(r"`([^`]*)`", row[2]) if not row[2].startswith(("as in", "see")) else []
            for number, name in enumerate(names):
                yield "configuration.md", kind, name, (values[min(number, len(values) - 1)] if values else "")
    for line in (ROOT / "packaging/man/nodewalld.toml.5.md").read_text().splitlines():
        if line.startswith("# "):
            head = re.match(r"# \[+([a-z]+)", line)
            kind = head[1] if head else ""
        elif kind and line.startswith("**"):
            waiting: list[str] = []
            for name, value in re.findall(r"\*\*([a-z_]+)\*\*(?: = (\[.*?\]|\".*?\"|\w+))?", line):
                waiting.append(name)
                if value:
                    shown = value.replace("\\", "")
                    yield from (
                        ("nodewalld.toml.5", kind, each, shown if (kind, each) not in UNWRITTEN else "")
                        for each in waiting
                    )
                    waiting = []
            yield from (("nodewalld.toml.5", kind, each, "") for each in waiting)


DOCUMENTED = sorted(set(_documented()))


@pytest.mark.parametrize("document", ["configuration.md", "nodewalld.toml.5"])
def test_every_key_is_documented_and_no_other(document: str) -> None:
    for kind, keys in KEYS.items():
        assert {key for where, of, key, _ in DOCUMENTED if (where, of) == (document, kind)} == set(keys), kind


@pytest.mark.parametrize(
    ("kind", "key", "default"),
    sorted({(kind, key, default) for _, kind, key, default in DOCUMENTED if default}),
    ids=str,
)
def test_a_default_that_is_documented_is_the_default(kind: str, key: str, default: str, tmp_path: Path) -> None:
    least = next(text for text in LEAST[kind] if f"\n{key} = " not in text.partition("[service.x]")[2])
    left_out = load.load(folder_of(tmp_path / "a", least))
    spelled = load.load(folder_of(tmp_path / "b", f"{least}{key} = {default}\n"))
    assert _alike(spelled, tmp_path / "b") == _alike(left_out, tmp_path / "a")


def _alike(config: Config, folder: Path) -> str:
    return repr(replace(config, warnings=(), sources=Sources())).replace(str(folder), "")


def test_every_key_that_may_be_left_out_has_a_documented_default() -> None:
    documented = {(kind, key) for _, kind, key, default in DOCUMENTED if default}
    optional = {(kind, key) for kind, keys in KEYS.items() for key, about in keys.items() if not about.example}
    assert optional - documented - UNWRITTEN == set()


def test_every_key_has_a_refusal_of_its_own() -> None:
    """One that names the key itself, whatever else is wrong."""
    told = " ".join(text for path in CORPUS.glob("refused/*.toml") for text in path.read_text().splitlines())
    told += " ".join(expected for _, expected in ONCE)
    untold = []
    for kind, keys in KEYS.items():
        owner = rf"{kind}" + (r"" if kind in {"daemon", "failsafe"} else r"(?:\.[A-Za-z0-9_-]+|\[\d+\])")
        untold += [f"{kind}.{key}" for key in keys if not re.search(rf"\b{owner}\.{key}(?:\[\d+\])?: ", told)]
    assert untold == [], untold


def test_the_commented_configuration_of_the_package_shows_the_defaults(tmp_path: Path) -> None:
    text = (ROOT / "etc/nodewalld/nodewalld.toml").read_text()
    assert tomllib.loads(text) == {"daemon": {}, "failsafe": {}}
    shown = re.sub(r"^# (?=[a-z_]+ *= )", "", text.split("\n# Addresses under a name")[0], flags=re.M)
    config = load.load(folder_of(tmp_path / "etc", shown))
    assert replace(config, path="") == Config("")
