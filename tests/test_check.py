"""`nodewallctl check` finds what iptables would refuse, before anything is enforced, with iptables' own words."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lab.daemon import Daemon
from lab.node import Node

pytestmark = pytest.mark.kernel

# Each with the line that it stands on, and a part of what iptables says of it. The first two pass iptables' own --test.
GOOD = """\
[set.hosts]
entries = ["192.0.2.1"]

[[rule]]
name = "good"
table = "mangle"
chain = "PREROUTING"
rule = "-m set --match-set hosts src -p tcp --dport 80 -j DROP"

[[port]]
name = "vault"
ports = [31002]
action = "redirect"

[[jump]]
name = "docker"
table = "filter"
from = "FORWARD"
to = "DOCKER-USER"

"""
BAD = """\
[[rule]]
name = "rejected"
table = "mangle"
chain = "PREROUTING"
rule = "-p tcp -j REJECT"

[[rule]]
name = "redirected"
table = "filter"
chain = "INPUT"
rule = "-p tcp -j REDIRECT --to-ports 1"

[[rule]]
name = "no-match"
table = "filter"
chain = "INPUT"
rule = "-m nosuchmatch -j ACCEPT"

[[rule]]
name = "no-option"
table = "filter"
chain = "DOCKER-USER"
rule = "-p tcp --nosuchoption 5 -j ACCEPT"

[[rule]]
name = "no-target"
table = "raw"
chain = "PREROUTING"
rule = "-j LOG --log-level nosuchlevel"

[[rule]]
name = "no-port"
table = "filter"
chain = "INPUT"
rule = "-p udp -m udp --dport nosuchservice -j ACCEPT"

[[rule]]
name = "returns"
table = "filter"
chain = "INPUT"
rule = "--nosuchoption -j RETURN"
"""
WORDS = {
    "rejected": ("RULE_APPEND failed", "restore: line"),
    "redirected": ("RULE_APPEND failed", "restore: line"),
    "no-match": ("nosuchmatch",),
    "no-option": ("nosuchoption",),
    "no-target": ("nosuchlevel", "log level"),
    "no-port": ("nosuchservice",),
    "returns": ("nosuchoption",),
}


def line_of(name: str, text: str) -> int:
    return text.splitlines().index(f'name = "{name}"')  # the line above it, from 1: the head of the table


@pytest.fixture
def tried(node: Node) -> Daemon:
    """A daemon that is never started: its folders are what nodewallctl is given."""
    return Daemon(node, "", start=False)


def head(backend: str) -> str:
    return f'[daemon]\nbackend = "{backend}"\n\n'


def is_told(errors: list[dict], text: str, file: Path) -> None:
    """Every bad text of the configuration is told, each at its line and in iptables' words, and nothing else."""
    assert {error["key"].split(".")[1] for error in errors} == set(WORDS)
    for error in errors:
        name = error["key"].split(".")[1]
        assert error["file"] == str(file)
        assert error["line"] in range(line_of(name, text), line_of(name, text) + 6)
        assert any(word in error["message"] for word in WORDS[name]), error
        assert error["message"].startswith(("ipv4: ip", "ipv6: ip")), error


def test_a_good_configuration_is_good_and_nothing_is_changed(tried: Daemon) -> None:
    tried.configure(head(tried.node.backend) + GOOD)
    before = [tried.node.rules(family) for family in ("ipv4", "ipv6")]
    result = tried.ctl("check")
    assert result.returncode == 0, result.stderr
    assert "good" in result.stdout
    assert [strip(rules) for rules in before] == [strip(tried.node.rules(f)) for f in ("ipv4", "ipv6")]
    assert tried.node.run(["ipset", "list", "-name"]).stdout == ""


def strip(saved: str) -> str:
    return "\n".join(line for line in saved.splitlines() if not line.startswith("#"))


def test_all_that_iptables_refuses_is_told_at_once_in_its_own_words(tried: Daemon) -> None:
    text = head(tried.node.backend) + GOOD + BAD
    tried.configure(text)
    result = tried.ctl("check", "--json")
    assert result.returncode == 1
    is_told(json.loads(result.stdout)["errors"], text, tried.config_directory / "nodewalld.toml")
    plain = tried.ctl("check")
    assert plain.returncode == 1
    for name in WORDS:
        assert f"nodewalld.toml:{line_of(name, text)}: rule.{name}.rule:" in plain.stderr
    assert "Traceback" not in plain.stderr


def test_a_user_without_rights_is_told_the_same(tried: Daemon) -> None:
    node, text = tried.node, head(tried.node.backend) + GOOD + BAD
    with readable_copy(node, text) as (folder, code):
        result = unprivileged(node, ["check", str(folder), "--json"], code)
        assert result.returncode == 1, result.stderr
        is_told(json.loads(result.stdout)["errors"], text, folder / "nodewalld.toml")


def test_a_user_without_rights_gets_a_good_configuration_tried(tried: Daemon) -> None:
    node = tried.node
    with readable_copy(node, head(node.backend) + GOOD) as (folder, code):
        result = unprivileged(node, ["check", str(folder), "--json"], code)
        assert result.returncode == 0, result.stdout + result.stderr
        found = json.loads(result.stdout)
        assert (found["tried"], found["node_read"]) == (True, False)
        assert "Permission denied" in found["node_unread_reason"]
        plain = unprivileged(node, ["check", str(folder)], code)
        assert sum("could not read all of this node" in line for line in plain.stderr.splitlines()) == 1


def test_where_namespaces_are_forbidden_nothing_is_claimed(tried: Daemon) -> None:
    fake = tried.node.directory / "fake"
    fake.mkdir()
    (fake / "unshare").write_text("#!/bin/sh\necho 'unshare: unshare failed: Operation not permitted' >&2\nexit 1\n")
    (fake / "unshare").chmod(0o755)
    tried.configure(head(tried.node.backend) + GOOD + BAD)
    env = {"PATH": f"{fake}:{tried.node.environment()['PATH']}"}
    result = tried.ctl("check", env=env)
    assert result.returncode == 0, result.stderr
    assert "could not try the rule texts" in result.stderr
    assert "Operation not permitted" in result.stderr
    found = json.loads(tried.ctl("check", "--json", env=env).stdout)
    assert (found["tried"], found["errors"]) == (False, [])
    assert "Operation not permitted" in found["untried_reason"]


class readable_copy:  # noqa: N801 - used as a function
    """The configuration and the program where everybody may read them: the checkout may lie in root's own folder."""

    def __init__(self, node: Node, text: str) -> None:
        self._folder, self._text = node.directory, text

    def __enter__(self) -> tuple[Path, Path]:
        self._folder.chmod(0o755)
        config, code = self._folder / "etc", self._folder / "code"
        config.mkdir()
        (config / "nodewalld.toml").write_text(self._text)
        checkout = Path(__file__).resolve().parent.parent
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(checkout / "nodewalld", code / "nodewalld", ignore=ignored)
        for path in (config, config / "nodewalld.toml", *code.rglob("*"), code):
            path.chmod(0o755 if path.is_dir() else 0o644)
        return config, code

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder / "code")


def unprivileged(node: Node, args: list[str], code: Path) -> subprocess.CompletedProcess[str]:
    """Run nodewallctl as a user without any right, by a python that lies where everybody may read."""
    python = shutil.which("python3", path="/usr/bin:/bin") or sys.executable
    as_nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--inh-caps=-all"]
    command = [*as_nobody, python, "-m", "nodewalld.commands.ctl", *args]
    site = [path for path in sys.path if path.endswith("site-packages")]
    env = {"PYTHONPATH": ":".join([str(code), *site]), "HOME": "/nonexistent"}
    return node.run(command, check=False, env=env)


@pytest.mark.parametrize("member", ['sources = ["10.0.0.0/8"]', 'sources = ["fd00::/8"]', ""], ids=["v4", "v6", "none"])
def test_a_zone_without_members_in_a_family_keeps_nothing_from_being_taken(tried: Daemon, member: str) -> None:
    tried.configure(f'{head(tried.node.backend)}[zone.trusted]\n{member}\ntarget = "accept"\n')
    result = tried.ctl("check", "--json")
    assert result.returncode == 0, result.stdout
    assert json.loads(result.stdout)["tried"]
