"""The files of sets: one address or CIDR a line; `#` begins a comment.

Law: a file is taken whole or not at all, whoever reads it: a configuration, or the daemon that follows it.
"""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from nodewalld.configuration.errors import ConfigError, FileError
from nodewalld.configuration.files import Allowance, display
from nodewalld.configuration.peers import network, plain_network
from nodewalld.configuration.reading import FieldError, Reading, TooMany
from nodewalld.configuration.tree import Node
from nodewalld.core.config import Problem, SetFile, Where
from nodewalld.core.setbook import numbered
from nodewalld.core.words import Network

SETS_MAX = 64 << 20
"""How many bytes all set files of a configuration may have."""


def set_files() -> Allowance:
    """What may be read of set files in one go."""
    return Allowance(SETS_MAX, "networks instead of single addresses")


def networks_of(node: Node, reading: Reading) -> tuple[Network, ...]:
    """What a set file holds; the node's value is its text and the node's place the file."""
    found = []
    for number, entry in numbered(str(node.value)):
        try:
            found.append(_network(entry, number, node, reading))
        except FieldError as error:
            reading.note(error.problem)
    return tuple(found)


def _network(entry: str, number: int, node: Node, reading: Reading) -> Network:
    # A file may have 100,000 of these, so no node is made for one that is good.
    plain = plain_network(entry)
    if plain is not None:
        return plain
    return network(Node(entry, Where(node.where.file, number, node.where.rank), node.key), reading)


def typed_networks(words: Iterable[str]) -> tuple[tuple[Network, ...], tuple[str, ...]]:
    """Addresses and CIDRs that somebody has typed, and what is wrong with the others."""
    node, reading, found = Node("", Where("", 0), ""), Reading((), lambda _: "", complete=True), []
    with suppress(TooMany):
        for word in words:
            try:
                found.append(_network(word, 0, node, reading))
            except FieldError as error:
                reading.note(error.problem)
    return tuple(found), tuple(f"{problem.message} ({problem.cure})" for problem in reading.problems)


def read_set(path: str) -> tuple[str, SetFile]:
    """The text of a set file that only root (or who runs this) can write, and what it holds. Raises ConfigError."""
    shown = display(Path(path))
    try:
        text = set_files().read(Path(path), check_owner=True)
    except FileError as error:
        problem = Problem(Where(shown, error.line or 1), error.key, error.message, error.cure)
        raise ConfigError((problem,)) from error
    reading = Reading((), lambda _: "", complete=True)
    networks: tuple[Network, ...] = ()
    with suppress(TooMany):
        networks = networks_of(Node(text, Where(shown, 1), "entry"), reading)
    if reading.problems:
        raise ConfigError(tuple(reading.problems))
    return text, SetFile(path, networks)
