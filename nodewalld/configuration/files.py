"""Reading files that decide over a firewall: only what nobody but root could have written.

Law: what is judged is what is read (the opened file, not the path); nothing here hangs on a pipe or a device.
Whoever can write the folder in which a file lies can put another in its place, so the folder is judged too.
"""

import os
import shlex
import stat
from pathlib import Path

from nodewalld.configuration.errors import FileError

LARGEST = 8 << 20
"""Bytes of a file that is worth reading; half a million addresses are less."""

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH  # with an ACL the group bits are its mask, so these see ACLs too


def read_file(path: Path, *, check_owner: bool) -> str:
    """The text of a regular UTF-8 file. Raises FileError."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        try:
            _refuse_opened(path, os.fstat(handle), check_owner)
            with open(handle, "rb", closefd=False) as file:
                content = file.read(LARGEST + 1)
        finally:
            os.close(handle)
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(content) > LARGEST:
        raise FileError(f"is larger than {LARGEST >> 20} MiB", "several smaller files")
    return _decode(content)


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
