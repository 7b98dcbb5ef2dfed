"""The packages under test, and how they are built."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from nodewalld import __version__

ROOT = Path(__file__).resolve().parent.parent.parent
NEXT = f"{__version__}+next"


class Packages(NamedTuple):
    """A release in both forms."""

    deb: Path
    rpm: Path


def build(
    output: Path, version: str, *, cwd: Path | None = None, umask: int = -1, env: Mapping[str, str] | None = None
) -> Packages:
    """What `make deb rpm` makes."""
    command = [sys.executable, ROOT / "packaging/build.py", "deb", "rpm", "--version", version, "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, umask=umask, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return Packages(*map(Path, done.stdout.split()))
