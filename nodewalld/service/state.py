"""The state folder: what must outlive the daemon. One JSON object a file; whole or not there at all.

Law: the state is a help, never a condition. What can't be read counts as absent, what can't be written is
told once, and the rules are held all the same.
"""

import errno
import json
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog

_log = structlog.get_logger(__name__)

_LARGEST = 1 << 26  # bytes of a file that is worth reading


class StateFolder:
    """The JSON objects in one folder, which is made (0700) at the first write. For one writer at a time.

    What the disk did not take is owed to it: it is read as if it were there, and written as soon as `catch_up` can.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._owed: dict[str, bytes | None] = {}
        self._refusals: dict[str, str] = {}
        self._damage: dict[str, str] = {}

    def read(self, name: str) -> dict[str, Any] | None:
        """The object of that name; None when there is none, or (with one warning) none that can be read."""
        try:
            content = self._owed[name] if name in self._owed else _read_regular(self._file(name))
            value = json.loads(content) if content is not None else {}
            why = "" if isinstance(value, dict) else "is no JSON object"
        except FileNotFoundError:
            content, value, why = None, {}, ""
        except OSError as error:
            why = f"can't be read: {error.strerror}"
        except (ValueError, RecursionError) as error:
            why = f"is damaged: {error}"
        if why and self._damage.get(name) != why:
            _log.warning(f"The state in {self._file(name)} {why}; going on without it")
        self._damage[name] = why
        return None if why or content is None else value

    def write(self, name: str, value: Mapping[str, object]) -> bool:
        """Replace the object of that name, safe against a crash at any moment; whether it is on the disk."""
        return self._put(name, json.dumps(value, indent=1).encode() + b"\n")

    def remove(self, name: str) -> bool:
        """Take the object of that name away; whether it is gone."""
        return self._put(name, None)

    def catch_up(self) -> None:
        """Try once more what the disk did not take."""
        for name, content in tuple(self._owed.items()):
            if self._put(name, content):
                _log.info(f"The state in {self._file(name)} is on the disk again")

    @property
    def trouble(self) -> str:
        """What the disk does not take, in a sentence; "" when it has taken everything."""
        if not self._refusals:
            return ""
        files: dict[str, list[str]] = {}
        for name, why in sorted(self._refusals.items()):
            files.setdefault(why, []).append(self._file(name).name)
        causes = (f"{why} ({', '.join(names)})" for why, names in files.items())
        return f"the state in {self.path} can't be written: {'; '.join(causes)}; a restart would lose it"

    def _put(self, name: str, content: bytes | None) -> bool:
        path = self._file(name)
        try:
            if content is not None:
                self._replace(path, content)
            elif os.path.lexists(path):  # a disk that is mounted read-only refuses to remove even what is not there
                path.unlink(missing_ok=True)
        except OSError as error:
            self._owed[name] = content
            why = error.strerror or str(error)
            if why not in self._refusals.values():  # one disk, one cause, one line
                done = "removed" if content is None else "written"
                _log.error(f"The state in {path} can't be {done}: {why}; a restart would lose that")
            self._refusals[name] = why
            return False
        self._owed.pop(name, None)
        self._refusals.pop(name, None)
        return True

    def _replace(self, path: Path, content: bytes) -> None:
        temporary = path.with_name(f".{path.name}.new")
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _discard(temporary)
            _write_through(temporary, content)
            temporary.replace(path)
            _sync_folder(self.path)
        except OSError:
            _discard(temporary)
            raise

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.json"


def _read_regular(path: Path) -> bytes:
    """The content of a file, and of nothing that one could wait for: a FIFO may never have a writer."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        if status.st_size > _LARGEST:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
        with open(fd, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(fd)


def _write_through(path: Path, content: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
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
