"""The folder of a configuration: which files count, in which order, and may they be trusted.

Law: `load` gives a valid `Config` or raises ConfigError with everything that is wrong in any file; one bad
file does not hide what is wrong in the others.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from nodewalld.configuration.errors import ConfigError, FileError
from nodewalld.configuration.files import Allowance, display, list_folder
from nodewalld.configuration.locate import locate
from nodewalld.configuration.reading import ReadSet
from nodewalld.configuration.schema import judge
from nodewalld.configuration.setfiles import set_files
from nodewalld.configuration.tree import Node, grow, merge
from nodewalld.core.config import Config, Problem, Sources, Where

MAIN_FILE = "nodewalld.toml"
MORE_FILES = "conf.d"

FILES_MAX = 8 << 20
"""How many bytes all files of a folder may have."""

VALUES_MAX = 500_000
"""How many values all files of a folder may have: five bytes of text can cost a thousand bytes of memory."""

_SYNTAX_PLACE = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")


def load(directory: Path, *, check_owner: bool = True, set_file: ReadSet | None = None) -> Config:
    """The configuration in a folder. Raises ConfigError.

    With `check_owner`, files and folders are refused that others than root (or who runs this) can write. `set_file`
    gives the texts of the files of sets, else they are read as well.
    """
    of_sets = set_files()

    def from_disk(path: str) -> str:
        return of_sets.read(Path(path), check_owner=check_owner)

    files, problems = _files(directory, check_owner)
    texts: dict[str, str] = {}
    own = Allowance(FILES_MAX, "addresses can stand in the `files` of a set")
    for rank, path in enumerate(files):
        try:
            texts[str(path)] = own.read(path, check_owner=check_owner)
        except FileError as error:
            problems.append(_problem(path, error, rank))
    return _assemble(directory, texts, problems, set_file or from_disk)


def recall(sources: Sources) -> Config:
    """The configuration that these texts made when they were read. Raises ConfigError."""

    def remembered(path: str) -> str:
        if path in sources.sets:
            return sources.sets[path]
        raise FileError("does not exist", "create it")

    return _assemble(Path(sources.directory), sources.texts, [], remembered)


def _assemble(directory: Path, texts: Mapping[str, str], problems: list[Problem], read_set: ReadSet) -> Config:
    root = Node({}, Where(display(directory / MAIN_FILE), 1), "")
    room = VALUES_MAX
    for rank, (name, text) in enumerate(texts.items()):
        try:
            tree, values = _parse(text, room, display(Path(name)), rank)
            root, room = merge(root, tree), room - values
        except FileError as error:
            problems.append(_problem(Path(name), error, rank))
    sets: dict[str, str] = {}

    def kept(path: str) -> str:
        sets[path] = read_set(path)
        return sets[path]

    config, found = judge(root, display(directory), kept, complete=not problems)
    if problems or found:
        raise ConfigError(tuple(sorted((*problems, *found), key=_order)))
    return replace(config, sources=Sources(str(directory), dict(texts), sets))


def _order(problem: Problem) -> tuple[int, str, int]:
    return problem.where.rank, problem.where.file, problem.where.line


def _files(directory: Path, check_owner: bool) -> tuple[list[Path], list[Problem]]:
    """The files that count, in their order, and what is wrong with their folders."""
    more = directory / MORE_FILES
    try:
        present = list_folder(directory, check_owner=check_owner)
    except FileError as error:
        return [], [_problem(directory, error)]
    files, problems = [directory / MAIN_FILE], []
    if more in present:
        try:
            files += [path for path in list_folder(more, check_owner=check_owner) if path.suffix == ".toml"]
        except FileError as error:
            problems.append(_problem(more, error))
    return files, problems


def _problem(path: Path, error: FileError, rank: int = 0) -> Problem:
    return Problem(Where(display(path), error.line or 1, rank), error.key, error.message, error.cure)


def _parse(text: str, room: int, file: str, rank: int) -> tuple[Node, int]:
    """The tree of a file, and how many values it holds, which is at most `room`."""
    try:
        lines = locate(text, room)
        return grow(tomllib.loads(text), lines, file, rank), len(lines)
    except tomllib.TOMLDecodeError as error:
        raise _syntax_error(text, str(error)) from error
    except RecursionError as error:
        raise FileError("is nested too deeply", "fewer lists in lists") from error


def _syntax_error(text: str, message: str) -> FileError:
    """What tomllib says, with its place taken apart; for it, the end of a document has no line."""
    place = _SYNTAX_PLACE.search(message)
    said = message[: place.start()] if place else message
    if place and place[1]:
        return FileError(f"{said}, at column {place[2]}", "see https://toml.io", int(place[1]), "syntax")
    return FileError(f"{said}, at the end of the file", "see https://toml.io", text.rstrip().count("\n") + 1, "syntax")
