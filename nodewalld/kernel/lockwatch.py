"""The lock that all legacy iptables tools take: to hear when one of them is done, and to keep them waiting.

Law: an event is a hint to look, never a fact: readers (`iptables-legacy -S`) take the lock as well, and a
tool with its own XTABLES_LOCKFILE, or with a /run of its own, is not heard. What counts is the *close*: the
open comes before the commit. The folder is watched, not the file, which anyone may replace. Our own use of
the lock is heard too.

Sources: iptables, xshared.c, xtables_lock: open(O_CREAT, 0600), flock(LOCK_EX), held to the end of the
process, and so closed without having been written. XTABLES_LOCKFILE is honoured since iptables 1.8.6.
"""

import errno
import fcntl
import os
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

LOCK_FILE = "/run/xtables.lock"
LOCK_FILE_VARIABLE = "XTABLES_LOCKFILE"

_IN_CLOSE = 0x08 | 0x10  # IN_CLOSE_WRITE, IN_CLOSE_NOWRITE
_REPLACEMENTS = 10  # how often the file may be replaced under a waiter before we call it broken


class LockTimeout(TimeoutError):
    """Somebody else kept the xtables lock longer than we were willing to wait."""

    def __init__(self, path: str, timeout: float, pids: tuple[int, ...]) -> None:
        by = f" by pid {', '.join(map(str, pids))}" if pids else ""
        super().__init__(errno.ETIMEDOUT, f"{path} is still held{by} after {timeout:g} s")
        self.pids = pids


class _Watcher(Protocol):
    def stop(self) -> None: ...


class LockWatch:
    """Calls `on_close`, from a thread of its own, when somebody has closed the lock file.

    Closes in quick succession may make one call, which then comes after the last of them.
    """

    def __init__(self, on_close: Callable[[], object], path: str = LOCK_FILE) -> None:
        self._on_close = on_close
        self._path = path
        self._watcher: _Watcher | None = None

    def start(self) -> None:
        """Begin to watch; from the return on no close is missed."""
        folder, name = os.path.split(self._path)
        try:
            from watchdog.events import FileClosedNoWriteEvent  # noqa: F401, PLC0415
        except ImportError:
            self._watcher = _MaskWatcher(folder, name, self._on_close)
        else:
            self._watcher = _ObserverWatcher(folder, name, self._on_close)

    def stop(self) -> None:
        """End the watch and its threads."""
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher = None


class _ObserverWatcher:
    """By watchdog's observer (5.0 and later); its event filter keeps all but closes out of the queue."""

    def __init__(self, folder: str, name: str, on_close: Callable[[], object]) -> None:
        # Here and not above: watchdog costs 7 MiB, and is not needed where only nft is in use.
        from watchdog.events import (  # noqa: PLC0415
            FileClosedEvent,
            FileClosedNoWriteEvent,
            FileSystemEvent,
            FileSystemEventHandler,
        )
        from watchdog.observers import Observer  # noqa: PLC0415

        wanted = str(Path(folder) / name)

        class Handler(FileSystemEventHandler):
            def dispatch(self, event: FileSystemEvent) -> None:
                if event.src_path == wanted:
                    on_close()

        self._observer = Observer()
        self._observer.schedule(Handler(), folder, event_filter=[FileClosedNoWriteEvent, FileClosedEvent])
        self._observer.start()

    def stop(self) -> None:
        self._observer.stop()
        self._observer.join()


class _MaskWatcher:
    """By watchdog's inotify class with our own mask: before 5.0 its observer tells no CLOSE_NOWRITE."""

    def __init__(self, folder: str, name: str, on_close: Callable[[], object]) -> None:
        from watchdog.observers.inotify_c import Inotify  # type: ignore[attr-defined] # noqa: PLC0415

        # The second parameter, `recursive`, goes by keyword only since 5.0.
        self._inotify = Inotify(os.fsencode(folder), False, _IN_CLOSE)
        self._name = os.fsencode(name)
        self._on_close = on_close
        self._end, self._ender = os.pipe()
        self._thread = threading.Thread(target=self._run, name="lock-watch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            ready, _, _ = select.select([self._inotify.fd, self._end], [], [])
            if self._end in ready:
                return
            for event in self._inotify.read_events():
                if event.name == self._name and event.mask & _IN_CLOSE:
                    self._on_close()

    def stop(self) -> None:
        os.close(self._ender)
        self._thread.join()
        os.close(self._end)
        self._inotify.close()


class XtablesLock:
    """The xtables lock itself, as iptables takes it.

    While it is held, only iptables tools that are given another file in XTABLES_LOCKFILE get on.
    """

    def __init__(self, path: str = LOCK_FILE) -> None:
        self._path = path

    @contextmanager
    def acquire(self, timeout: float) -> Iterator[None]:
        """Hold the lock for a while; raises LockTimeout when others keep it for `timeout` seconds."""
        handle = self._take(timeout)
        try:
            yield
        finally:
            os.close(handle)

    def _take(self, timeout: float) -> int:
        for _ in range(_REPLACEMENTS):
            handle = os.open(self._path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if not _flock(handle, timeout):
                raise LockTimeout(self._path, timeout, holders(self._path))
            if _is_at(handle, self._path):
                return handle
            os.close(handle)
        raise OSError(errno.ESTALE, f"{self._path} was replaced {_REPLACEMENTS} times while waiting for it")


def _is_at(handle: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))  # noqa: PTH116
    except FileNotFoundError:
        return False


def _flock(handle: int, timeout: float) -> bool:
    """Lock the file; on False the handle is closed, now or as soon as the kernel lets go of it.

    Waiting is left to the kernel, in a thread: who asks again and again loses to those who queue.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _Waiter(handle).wait(timeout)
    except BaseException:
        os.close(handle)
        raise
    return True


class _Waiter:
    """Waits in flock() for somebody who may give up before it is granted."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._granted = threading.Event()
        self._abandoned = False
        self._decision = threading.Lock()
        threading.Thread(target=self._run, name="xtables-lock", daemon=True).start()

    def _run(self) -> None:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX)
        except OSError:
            self._abandoned = True  # the other side runs into its time limit
        with self._decision:
            if self._abandoned:
                os.close(self._handle)
            else:
                self._granted.set()

    def wait(self, timeout: float) -> bool:
        if self._granted.wait(timeout):
            return True
        with self._decision:
            self._abandoned = not self._granted.is_set()
            return not self._abandoned


def holders(path: str = LOCK_FILE) -> tuple[int, ...]:
    """The processes that hold a flock on this file, as /proc/locks tells; a hint at who is writing.

    Processes of other pid namespaces may be missing or have other numbers there.
    """
    try:
        status = os.stat(path)  # noqa: PTH116
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        return ()
    file = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    pids = set()
    for line in lines:
        # 1: FLOCK  ADVISORY  WRITE 4711 00:19:1234 0 EOF; who only waits has an arrow behind the number
        words = line.split()
        if len(words) > 5 and words[1] == "FLOCK" and words[5] == file:
            pids.add(int(words[4]))
    return tuple(sorted(pids))
