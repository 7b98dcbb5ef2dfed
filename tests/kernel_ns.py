"""A throw-away kernel for one test: the body runs in a forked child with a network and mount namespace of its own.

The child has a private /run (so its own xtables.lock), `lo` up, and nothing else. It reports back through a pipe, is
given a time limit, and is the leader of a process group, so that whatever it started ends with it.
"""

import contextlib
import ctypes
import functools
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

import pytest

_CLONE_NEWNS = 0x00020000
_CLONE_NEWNET = 0x40000000
_MS_REC_PRIVATE = 0x4000 | (1 << 18)
_PR_SET_PDEATHSIG = 1
LIMIT = 60.0

T = TypeVar("T")
_libc = ctypes.CDLL(None, use_errno=True)


def in_own_namespace(body: Callable[..., None]) -> Callable[..., None]:
    """Run a test function in a child with namespaces of its own; its failure is the test's failure."""

    @functools.wraps(body)
    def run(*args: object, **kwargs: object) -> None:
        if os.geteuid() != 0:
            pytest.fail("tests with real kernels need root", pytrace=False)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _child(writer, functools.partial(body, *args, **kwargs))
        os.close(writer)
        report = _report(reader, child)
        if report:
            pytest.fail("in the namespace:\n" + report, pytrace=False)

    return pytest.mark.kernel(run)


def _child(writer: int, body: Callable[[], None]) -> None:
    status = "the child ended without a word"
    try:
        os.setpgid(0, 0)
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        enter_fresh_namespaces()
        body()
        status = ""
    except BaseException:  # whatever it is, the parent reports it
        status = traceback.format_exc()
    finally:
        os.write(writer, b"R" + status.encode(errors="replace")[-60000:])
        sys.stdout.flush()
        os._exit(0)


def enter_fresh_namespaces() -> None:
    if _libc.unshare(_CLONE_NEWNS | _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    if _libc.mount(b"none", b"/", None, _MS_REC_PRIVATE, None) != 0:
        raise OSError(ctypes.get_errno(), "make / private")
    if _libc.mount(b"tmpfs", b"/run", b"tmpfs", 0, None) != 0:
        raise OSError(ctypes.get_errno(), "tmpfs on /run")
    if _libc.mount(b"sysfs", b"/sys", b"sysfs", 0, None) != 0:
        raise OSError(ctypes.get_errno(), "sysfs")
    sh("ip link set lo up")


def _report(reader: int, child: int) -> str:
    parts = []
    deadline = time.monotonic() + LIMIT
    try:
        while True:
            ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return f"no end within {LIMIT:g} s"
            part = os.read(reader, 65536)
            if not part:
                break
            parts.append(part)
            if parts[0][:1] == b"R" and len(part) < 65536:
                break
        if not parts:
            return "the child died"
        return b"".join(parts)[1:].decode(errors="replace")
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what the body left running
        os.waitpid(child, 0)


def sh(line: str, *, stdin: str = "", check: bool = True) -> str:
    """Run a command line (no shell) in the namespace; return what it printed."""
    return argv(line.split(), stdin=stdin, check=check)


def argv(words: Sequence[str], *, stdin: str = "", check: bool = True) -> str:
    done = subprocess.run(list(words), input=stdin, capture_output=True, text=True, timeout=50, check=False)
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(words)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def until(question: Callable[[], T], what: str, limit: float = 10.0) -> T:
    """Ask until the answer is true; fail after `limit` seconds. Never sleeps longer than it must."""
    deadline = time.monotonic() + limit
    while True:
        answer = question()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {limit:g} s: {what}")
        select.select([], [], [], 0.0005)


def readable(*sources: object, limit: float = 10.0) -> bool:
    """Wait until one of the sources can be read; False when none can in time."""
    return bool(select.select(list(sources), [], [], limit)[0])


def send_packets(count: int = 20, address: str = "127.0.0.1", port: int = 9999) -> None:
    """UDP packets over lo: each passes OUTPUT and INPUT."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sender, socket.socket(family, socket.SOCK_DGRAM) as receiver:
        receiver.bind((address, port))
        for _ in range(count):
            sender.sendto(b"x" * 100, (address, port))
