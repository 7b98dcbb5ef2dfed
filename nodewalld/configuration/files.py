"""Reading files that decide over a firewall: only what nobody but root could have written.

Law: what is judged is what is read (the opened file, not the path); nothing here hangs on a pipe or a device, and no
file is read for longer than its limit.
Whoever can write the folder in which a file lies can put another in its place, so the folder is judged too.
"""

import os
import shlex
import stat
from pathlib import Path

from nodewalld.configuration.errors import FileError

_MIB = 1 << 20
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH  # with an ACL the group bits are its mask, so these see ACLs too


class Allowance:
    """How many bytes several files may have together: a bound on time and memory, whatever lies in the folder."""

    def __init__(self, most: int, cure: str) -> None:
        self._most, self._left, self._cure = most, most, cure

    def read(self, path: Path, *, check_owner: bool) -> str:
        """The text of a regular UTF-8 file. Raises FileError."""
        content = _read(path, check_owner, self._left)
        if len(content) > self._left:
            raise FileError(f"is more than the {self._most // _MIB} MiB that all of them may have together", self._cure)
        self._left -= len(content)
        return _decode(content)


def _read(path: Path, check_owner: bool, most: int) -> bytes:
    """The content of a file, or a byte more than `most` of it."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        try:
            before = os.fstat(handle)
            _refuse_opened(path, before, check_owner)
            content = bytearray()
            while len(content) <= most and (part := os.read(handle, min(_MIB, most + 1 - len(content)))):
                content += part
            _refuse_changed(before, os.fstat(handle))
        finally:
            os.close(handle)
    except OSError as error:
        raise _unreadable(path, error) from error
    return bytes(content)


def _refuse_changed(before: os.stat_result, after: os.stat_result) -> None:
    """Half of the old text and half of the new one may be good TOML, and nobody's intention."""
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise FileError("changes while it is read", "write a new file, and rename it to this name")


def _refuse_opened(path: Path, status: os.stat_result, check_owner: bool) -> None:
    if not stat.S_ISREG(status.st_mode):
        what = "is a folder" if stat.S_ISDIR(status.st_mode) else "is not a regular file"
        raise FileError(what, "a text file in its place")
    if check_owner:
        _refuse_writable(path, status)
        _refuse_writable_folder(path.resolve().parent)


def list_folder(path: Path, *, check_owner: bool) -> list[Path]:
    """What a folder holds, in lexical order, without hidden files. Raises FileError."""
    try:
        status = path.stat()
        if not stat.S_ISDIR(status.st_mode):
            raise FileError("is not a folder", "a folder in its place")
        if check_owner:
            _refuse_writable(path, status)
        return sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> FileError:
    if isinstance(error, FileNotFoundError):
        if path.is_symlink():
            return FileError("is a symbolic link to nothing", "make it point to a file, or remove it")
        return FileError("does not exist", "create it")
    return FileError(f"can't be read: {error.strerror}", f"see: ls -ld {_quoted(path)}")


def _decode(content: bytes) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise FileError("is not UTF-8 here", "save the file as UTF-8", line) from error
    if text.startswith("\N{BYTE ORDER MARK}"):
        raise FileError("begins with a byte order mark", "save the file as UTF-8 without BOM", 1)
    return text


def _refuse_writable(path: Path, status: os.stat_result) -> None:
    faults, cures = [], []
    if status.st_uid not in (0, os.geteuid()):
        faults.append(f"belongs to user {status.st_uid}, who can write it")
        cures.append(f"chown root {_quoted(path)}")
    if status.st_mode & _OTHERS_WRITE:
        faults.append(f"can be written by others than root (mode {stat.S_IMODE(status.st_mode):04o})")
        cures.append(f"chmod go-w {_quoted(path)}")
    if faults:
        raise FileError(" and ".join(faults), " && ".join(cures))


def _refuse_writable_folder(folder: Path) -> None:
    status = folder.stat()
    if status.st_mode & stat.S_ISVTX:
        return  # as in /tmp: others can add files, but not replace this one
    try:
        _refuse_writable(folder, status)
    except FileError as error:
        raise FileError(f"lies in {display(folder)}, which {error.message}", error.cure) from error


def _quoted(path: Path) -> str:
    return shlex.quote(display(path))


def display(path: Path) -> str:
    """A path for messages, whatever bytes are in its name."""
    shown = os.fsencode(path).decode("utf-8", "backslashreplace")
    return shown if shown.isprintable() else ascii(shown)[1:-1]
