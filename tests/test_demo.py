"""The demo: it tells what is so, on both backends, and leaves nothing behind."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from demo.page import Page, wants_colour, wrapped
from demo.story import CONFIGURATION
from lab.node import BackendName

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "demo"]


def told(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | (env or {})
    return subprocess.run(
        [*COMMAND, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110, check=False
    )


@pytest.mark.kernel
@pytest.mark.slow
def test_the_story_is_true(laboratory: None, backend: BackendName) -> None:
    started = time.monotonic()
    result = told("--backend", backend)
    text = result.stdout
    assert result.returncode == 0, text + result.stderr
    assert time.monotonic() - started < 60
    assert "The rule has seen 0 packets" in text
    assert re.search(rf"Enforcing: \d+ rules in force \({backend}\), \d+ ms after its start", text)
    assert text.count("in force again ") == 6
    assert len(re.findall(r"\d+ of [\d,]+ slipped through", text)) == 6
    assert text.count("gets in, served by pod") >= 6
    assert "our jump in mangle PREROUTING: displaced" in text
    assert "the set office: flushed" in text
    if backend == "nft":
        assert re.search(r"by +iptables \(pid \d+\)", text)
        assert "# nft flush ruleset" in text
    assert "Nothing to change." in text
    assert "this machine's own rules and sets are what they were" in text
    assert "\x1b" not in text
    assert [line for line in text.splitlines() if len(line) > 80] == []


@pytest.mark.kernel
def test_who_stops_it_leaves_nothing_behind(laboratory: None) -> None:
    process = subprocess.Popen(COMMAND, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    started: set[tuple[int, str]] = set()
    for line in process.stdout:
        if "nodewalld, with ten lines" in line:
            started = descendants(process.pid)
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Stopped" in errors
    assert len(started) >= 3
    assert started & everybody().keys() == set()


def everybody() -> dict[tuple[int, str], int]:
    """Every process, known by its number and start, and its parent's number."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            found[int(entry.name), fields[19]] = int(fields[1])
    return found


def descendants(ancestor: int) -> set[tuple[int, str]]:
    processes = everybody()
    found: set[tuple[int, str]] = set()
    family = {ancestor}
    while more := {known for known, parent in processes.items() if parent in family} - found:
        found |= more
        family |= {pid for pid, _ in more}
    return found


def test_without_root_it_says_what_to_do() -> None:
    code = "import os, sys; os.geteuid = lambda: 1000; from demo.__main__ import main; sys.exit(main([]))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "lacks root" in result.stderr
    assert "make demo" in result.stderr


def test_the_configuration_that_it_shows_has_ten_lines() -> None:
    assert len(CONFIGURATION.splitlines()) == 10


def test_colour_is_for_terminals_whose_user_wants_it() -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    assert wants_colour(Terminal(), {})  # type: ignore[arg-type]
    assert not wants_colour(Terminal(), {"NO_COLOR": "1"})  # type: ignore[arg-type]
    assert not wants_colour(Terminal(), {"TERM": "dumb"})  # type: ignore[arg-type]
    assert Page(colour=False).paint("plain", "red", "bold") == "plain"


def test_long_texts_are_wrapped_and_nothing_is_broken() -> None:
    text = "iptables --comment " + "x" * 30 + " " + "-j SOME-CHAIN " * 6
    lines = wrapped(text, rest="  ").split("\n")
    assert max(map(len, lines)) <= 80
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
