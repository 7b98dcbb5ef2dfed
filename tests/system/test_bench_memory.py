"""The row of the bench that wants a firewalld: measured beside a real one."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from built import ROOT


def test_memory_is_measured_beside_a_real_firewalld(roots: Mapping[str, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "--scale", "tiny", "--only", "memory", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    first, _ = json.loads((tmp_path / "bench.json").read_text())["memory"]["results"]
    assert 10 < first["figure"] < 200
    assert first["reference_what"] == "firewalld"
    assert 10 < first["reference"] < 200
