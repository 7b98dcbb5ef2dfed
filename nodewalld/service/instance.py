"""One daemon per runtime folder: a file lock, which dies with its process, and the holder's pid in it."""

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

LOCK_NAME = "nodewalld.lock"


class AlreadyRunning(Exception):
    """Another process holds this runtime folder; `pid` as it wrote it down, or None."""

    def __init__(self, folder: Path, pid: int | None) -> None:
        super().__init__(f"nodewalld is already running in {folder}" + (f" (pid {pid})" if pid else ""))
        self.pid = pid


class Instance:
    """The right to use a runtime folder; held until `release`, or the end of the process.

    Raises AlreadyRunning, and OSError when the folder can't be made or written.
    """

    def __init__(self, folder: Path) -> None:
        # An existing folder keeps its mode: it may be any that a person named, /run itself included.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder = folder
        self._fd = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = _pid(os.pread(self._fd, 32, 0))
            os.close(self._fd)
            raise AlreadyRunning(folder, pid) from None
        os.ftruncate(self._fd, 0)
        with suppress(OSError):  # a full disk: the lock holds without its holder's name
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let another one in. The file stays: to unlink a lock file is to let two in."""
        if self._fd >= 0:
            os.ftruncate(self._fd, 0)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _pid(text: bytes) -> int | None:
    text = text.strip()
    return int(text) if text.isdigit() else None
