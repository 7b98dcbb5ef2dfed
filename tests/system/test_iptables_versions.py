"""What is put back without a process is iptables' own rule, to the iptables of each Debian."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from test_hot_repair import test_what_is_written_without_a_process_is_iptables_own as is_iptables_own

from nodewalld.core.words import Family

TOOLS = [f"{tool}-nft{action}" for tool in ("iptables", "ip6tables") for action in ("", "-save", "-restore")]
VERSIONS = {"bookworm": "v1.8.9", "trixie": "v1.8.11"}


@pytest.mark.parametrize("family", list(Family))
@pytest.mark.parametrize("suite", VERSIONS)
def test_every_version_takes_it_for_its_own(
    suite: str, family: Family, roots: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written, listed, saved, found and deleted by this version alone, which runs in its own root tree."""
    for name in TOOLS:
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\nexec chroot {roots[suite]} /usr/sbin/{name} "$@"\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    shown = subprocess.run(["iptables-nft", "-V"], capture_output=True, text=True, check=True).stdout
    assert VERSIONS[suite] in shown
    is_iptables_own(family)
