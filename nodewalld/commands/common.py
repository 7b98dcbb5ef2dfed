"""What the commands of `nodewallctl` share: exit statuses, printing, and failures as sentences."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from nodewalld.core.events import printable
from nodewalld.service import wire

if TYPE_CHECKING:
    from nodewalld.core.config import Config, Problem
    from nodewalld.core.lints.facts import NodeFacts

GOOD, FAILED, USAGE, ATTENTION, NO_DAEMON, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 3, 4, 130, 141

QUICK, LONG = 10.0, 300.0
"""How long a reply may take, in seconds: one from memory, and one that waits for other writers' locks."""


class Offline(Protocol):
    """What works without the daemon; `nodewalld.commands.offline` is the real one."""

    def remove(self, state_dir: Path) -> dict[str, Any]:
        """Take everything of ours out of the kernel; {"removed": counts}, as the daemon answers."""

    def plan(self, config_dir: Path, state_dir: Path) -> dict[str, list[dict[str, Any]]]:
        """What would have to change in the kernel now: {"changes": ..., "chains": ...}."""

    def show(self, config_dir: Path, state_dir: Path) -> list[dict[str, Any]]:
        """Our rules as the kernel has them, in packet order."""

    def iptables_only(self, config_dir: Path) -> list[dict[str, Any]]:
        """What of a configuration the shield doesn't carry, and why."""

    def compiled(self, config_dir: Path) -> str:
        """The desired rules as iptables text."""

    def try_texts(self, config: "Config") -> "tuple[Problem, ...] | str":
        """What iptables refuses, or the reason why it could not be asked."""

    def survey(self, config: "Config", connection: str) -> "NodeFacts":
        """What lints can know of this node; `connection` is SSH_CONNECTION or ""."""


class Load(Protocol):
    """`nodewalld.configuration.load.load`."""

    def __call__(self, directory: Path, *, check_owner: bool = True) -> "Config":
        """The configuration in this folder. Raises ConfigError."""


class Tools(NamedTuple):
    """Where the commands get their real work done; tests pass their own."""

    offline: Callable[[], Offline]
    load: Callable[[], Load]


class Failure(Exception):
    """The command can't be done; told to the user as it stands."""

    def __init__(self, error: str, problems: Iterable[str] = (), status: int = FAILED) -> None:
        super().__init__(error)
        self.problems = tuple(problems)
        self.status = status


@contextmanager
def reading(command: str) -> Iterator[None]:
    """The failures of everything that reads configuration and kernel, as sentences."""
    from nodewalld.configuration.errors import ConfigError  # noqa: PLC0415
    from nodewalld.kernel.firewall import FirewallError  # noqa: PLC0415
    from nodewalld.kernel.process import ProgramError  # noqa: PLC0415

    try:
        yield
    except ConfigError as error:
        raise Failure("the configuration has errors", map(str, error.problems)) from error
    except (FirewallError, ProgramError) as error:
        raise Failure(str(error)) from error
    except PermissionError as error:
        what = f" ({error.filename})" if error.filename else ""
        raise Failure(f"{command} needs root: {error.strerror or error}{what}") from error
    except OSError as error:
        raise Failure(str(error)) from error


def socket_of(args: argparse.Namespace) -> Path:
    """Where the daemon listens."""
    folder: Path = args.runtime_dir
    return folder / wire.SOCKET_NAME


def print_lines(lines: Iterable[str]) -> None:
    """To stdout, for people."""
    for line in lines:
        print(line)


def print_json(value: object) -> None:
    """To stdout, for programs."""
    print(json.dumps(value))


def complain(lines: Iterable[str]) -> None:
    """To stderr, on lines that no stranger's text can break."""
    for line in lines:
        print("\n".join(map(printable, line.split("\n"))), file=sys.stderr)
