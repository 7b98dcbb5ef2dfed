"""The xtables lock: heard when a tool is done, held against all tools but those we allow."""

import os
import queue
import subprocess
import threading
from pathlib import Path

import pytest
from kernel_ns import in_own_namespace, sh, until

from nodewalld.kernel.lockwatch import LOCK_FILE, LOCK_FILE_VARIABLE, LockTimeout, LockWatch, XtablesLock, holders


class Heard:
    """Counts what a watch reports, and waits for it."""

    def __init__(self) -> None:
        self.closes: queue.Queue[None] = queue.Queue()

    def __call__(self) -> None:
        self.closes.put(None)

    def one(self) -> None:
        self.closes.get(timeout=10)


@in_own_namespace
def test_every_legacy_tool_is_heard_once() -> None:
    heard = Heard()
    watch = LockWatch(heard)
    watch.start()
    for number in range(1, 20):
        sh("iptables-legacy -w -A INPUT -p tcp")  # the first one makes the file
        heard.one()
        assert sh("iptables-legacy -w -S INPUT").count("-A") == number
        heard.one()  # readers lock, too
    assert heard.closes.empty()
    watch.stop()


@in_own_namespace
def test_a_tool_that_still_waits_for_the_lock_is_not_heard() -> None:
    sh("iptables-legacy -w -A INPUT -p tcp")
    heard = Heard()
    watch = LockWatch(heard)
    watch.start()
    with XtablesLock().acquire(1):
        waiting = subprocess.Popen("iptables-legacy -w 20 -A INPUT -p tcp".split())
        until(blocked, "the tool has opened the file and waits")
        Path(LOCK_FILE).open().close()
        heard.one()
        assert heard.closes.empty()
    assert waiting.wait(timeout=10) == 0
    heard.one()  # our own close and the tool's, which may have become one
    watch.stop()


@in_own_namespace
def test_other_files_in_the_folder_are_not_heard() -> None:
    heard = Heard()
    watch = LockWatch(heard)
    watch.start()
    for name in ("xtables.lock.old", "other.lock"):
        for mode in ("w", "r"):
            with Path(f"/run/{name}").open(mode):
                pass
    sh("iptables-legacy -w -A INPUT -p tcp")
    heard.one()
    assert heard.closes.empty()
    watch.stop()


@in_own_namespace
def test_a_replaced_lock_file_is_heard_still() -> None:
    sh("iptables-legacy -w -A INPUT -p tcp")
    heard = Heard()
    watch = LockWatch(heard)
    watch.start()
    Path(LOCK_FILE).unlink()
    sh("iptables-legacy -w -A INPUT -p tcp")
    heard.one()
    watch.stop()


@in_own_namespace
def test_a_stopped_watch_leaves_no_thread_and_hears_no_more() -> None:
    heard = Heard()
    watch = LockWatch(heard)
    watch.start()
    assert threading.active_count() > 1
    watch.stop()
    watch.stop()
    assert threading.active_count() == 1
    sh("iptables-legacy -w -A INPUT -p tcp")
    assert heard.closes.empty()


@in_own_namespace
def test_while_we_hold_the_lock_a_tool_waits_unless_it_is_given_another_file() -> None:
    with XtablesLock().acquire(1):
        assert Path(LOCK_FILE).stat().st_mode & 0o777 == 0o600
        assert holders() == (os.getpid(),)
        private = {**os.environ, LOCK_FILE_VARIABLE: "/run/private.lock"}
        for tool in ("iptables-legacy-save", "iptables-legacy-restore", "ip6tables-legacy-restore"):
            subprocess.run([tool], env=private, input="*filter\nCOMMIT\n", text=True, check=True, timeout=5)
        waiting = subprocess.Popen("iptables-legacy -w 20 -A INPUT -p tcp".split())
        until(blocked, "the tool waits for the lock")
        saved = subprocess.run(
            ["iptables-legacy-save"], env=private, capture_output=True, text=True, check=True, timeout=5
        )
        assert "-p tcp" not in saved.stdout
        assert waiting.poll() is None
    assert waiting.wait(timeout=10) == 0


def blocked() -> list[str]:
    inode = f":{Path(LOCK_FILE).stat().st_ino} "
    lines = Path("/proc/locks").read_text().splitlines()
    return [line for line in lines if "->" in line and inode in line]


@in_own_namespace
def test_a_lock_that_others_keep_times_out_and_names_them() -> None:
    with subprocess.Popen(["flock", LOCK_FILE, "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin
        until(holders, "the other holds the lock")
        with pytest.raises(LockTimeout, match=str(holders()[0])) as timeout, XtablesLock().acquire(0.05):
            pass
        assert timeout.value.pids == holders()
        other.stdin.close()
    until(lambda: not holders(), "nobody holds the lock: who gave up does not keep it")
    with XtablesLock().acquire(5):
        assert holders() == (os.getpid(),)
    assert holders() == ()


@in_own_namespace
def test_who_waits_gets_the_lock_as_soon_as_it_is_free() -> None:
    with subprocess.Popen(["flock", LOCK_FILE, "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        until(holders, "the other holds the lock")

        def release() -> None:
            until(blocked, "we wait")
            assert other.stdin
            other.stdin.close()

        releasing = threading.Thread(target=release)
        releasing.start()
        with XtablesLock().acquire(10):
            assert holders() == (os.getpid(),)
        releasing.join()


@in_own_namespace
def test_a_lock_file_replaced_while_waiting_is_locked_anew() -> None:
    with subprocess.Popen(["flock", LOCK_FILE, "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        until(holders, "the other holds the lock")

        def replace() -> None:
            until(blocked, "we wait")
            Path(LOCK_FILE).unlink()
            Path(LOCK_FILE).touch()
            assert other.stdin
            other.stdin.close()

        replacing = threading.Thread(target=replace)
        replacing.start()
        with XtablesLock().acquire(10):
            assert holders() == (os.getpid(),)
        replacing.join()


@in_own_namespace
def test_a_missing_lock_file_is_held_by_nobody() -> None:
    assert holders() == ()
