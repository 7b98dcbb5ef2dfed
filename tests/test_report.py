"""`nodewallctl report`: one file that tells a maintainer how a node is, and nothing that is nobody's business."""

import json
import tarfile
from pathlib import Path

import pytest

from lab.daemon import Daemon
from lab.node import Node

pytestmark = pytest.mark.kernel

CONFIG = """
[set.friends]
entries = ["10.90.0.7"]

[[port]]
name = "vault"
ports = [31002]
allow = ["@friends"]
"""


def parts(path: Path) -> dict[str, str]:
    with tarfile.open(path) as archive:
        found = {}
        for member in archive.getmembers():
            file = archive.extractfile(member)
            assert file is not None
            found[member.name.partition("/")[2]] = file.read().decode()
    return found


def test_it_tells_rules_configuration_history_and_versions(kube_node: Node) -> None:
    with Daemon(kube_node, CONFIG) as daemon:
        daemon.wait_ready()
        path = kube_node.directory / "node.tar.gz"
        done = daemon.ctl("report", "--output", str(path), "--json", env={"NODEWALLD_SECRET": "hunter2"})
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert told["file"] == str(path)
        assert path.stat().st_mode & 0o777 == 0o600
        found = parts(path)
        assert found["etc/nodewalld.toml"] == CONFIG
        assert json.loads(found["status.json"])["state"] == "enforcing"
        assert json.loads(found["history.json"])[-1]["kind"] == "start"
        assert json.loads(found["plan.json"]) == {"changes": [], "chains": []}
        assert "--dport 31002" in found["compiled.txt"]
        for family in ("ipv4", "ipv6"):
            rules = found[f"kernel/{kube_node.backend}-{family}.txt"]
            assert "KUBE-NODEPORTS" in rules
            assert "NODEWALL-PREROUTING" in rules
        assert "friends" in found["kernel/sets.txt"]
        assert "nodewalld 0." in found["versions.txt"]
        assert "VmRSS" in found["daemon.txt"]
        assert not [name for name, text in found.items() if "hunter2" in text]


def test_what_is_not_to_be_had_is_named_and_the_rest_is_there(node: Node) -> None:
    with Daemon(node, "[[port]\n", start=False) as daemon:
        path = node.directory / "node.tar.gz"
        done = daemon.ctl("report", "--output", str(path))
        assert done.returncode == 0, done.stderr
        assert "not in it: status.json: nodewalld is not running" in done.stderr
        assert "not in it: compiled.txt: " in done.stderr
        found = parts(path)
        assert found["etc/nodewalld.toml"] == "[[port]\n"
        assert found["status.json"].startswith("not to be had: nodewalld is not running")
        # Looking must not make legacy tables.
        assert node.run(["cat", "/proc/net/ip_tables_names"], check=False).stdout == ""


def test_no_file_is_overwritten(node: Node) -> None:
    with Daemon(node, CONFIG, start=False) as daemon:
        path = node.directory / "node.tar.gz"
        path.write_text("precious")
        done = daemon.ctl("report", "--output", str(path))
        assert (done.returncode, path.read_text()) == (1, "precious")
        assert f"{path} can't be written: File exists" in done.stderr
