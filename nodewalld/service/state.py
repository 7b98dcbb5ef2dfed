"""The state folder: what must outlive the daemon. One JSON object a file; whole or not there at all.

Law: the state is a help, never a condition. What can't be read counts as absent, what can't be written is
told in the journal, and the rules are held all the same.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog

_log = structlog.get_logger(__name__)


class StateFolder:
    """The JSON objects in one folder, which is made (0700) at the first write. For one writer at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, name: str) -> dict[str, Any] | None:
        """The object of that name; None when there is none, or (with a warning) none that can be read."""
        path = self._file(name)
        try:
            value = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning(f"The state in {path} can't be read: {error.strerror}; going on without it")
            return None
        except (ValueError, RecursionError) as error:
            _log.warning(f"The state in {path} is damaged: {error}; going on without it")
            return None
        if not isinstance(value, dict):
            _log.warning(f"The state in {path} is no JSON object; going on without it")
            return None
        return value

    def write(self, name: str, value: Mapping[str, object]) -> bool:
        """Replace the object of that name, safe against a crash at any moment; whether it is on the disk."""
        path = self._file(name)
        content = json.dumps(value, indent=1).encode() + b"\n"
        temporary = path.with_name(f".{path.name}.new")
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write_through(temporary, content)
            temporary.replace(path)
            _sync_folder(self.path)
        except OSError as error:
            _log.error(f"The state in {path} can't be written: {error.strerror}; a restart would lose it")
            _discard(temporary)
            return False
        return True

    def remove(self, name: str) -> bool:
        """Take the object of that name away; whether it is gone."""
        path = self._file(name)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            _log.error(f"The state in {path} can't be removed: {error.strerror}")
            return False
        return True

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.json"


def _write_through(path: Path, content: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, 0o600), "wb") as file:  # noqa: PTH123 - a descriptor
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Without this the rename itself may be lost with the power."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _discard(path: Path) -> None:
    with suppress(OSError):  # the failure that brought us here has been told
        path.unlink(missing_ok=True)
