"""Runs the tasks of docs/fleet/rollout.yml as Ansible would: the commands that people copy are the ones that are tried.

It knows the four modules and the few keys that stand there, and fails on all others.
"""

import re
import tarfile
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Any

import yaml
from built import ROOT
from session import Session

PLAYBOOK = ROOT / "docs/fleet/rollout.yml"
_PLAY = {"name", "hosts", "become", "gather_facts", "serial", "any_errors_fatal", "vars", "tasks"}
_KEYS = {"name", "changed_when"}


class Stopped(Exception):
    """The play ended before its end: `node` failed or could not be reached at `task`."""

    def __init__(self, node: str, task: str, said: str) -> None:
        super().__init__(f"{node}: {task}: {said}")
        self.node, self.task, self.said = node, task, said


def run(nodes: Mapping[str, Callable[[], Session]], files: Path, **variables: str) -> None:
    """Bring `files`/nodewalld to each node in its turn; `nodes` open a connection to each. Raises Stopped."""
    [play] = yaml.safe_load(PLAYBOOK.read_text())
    assert set(play) == _PLAY
    assert (play["serial"], play["any_errors_fatal"]) == (1, True)
    values = {**play["vars"], **variables}
    for node, connect in nodes.items():
        _run_node(node, connect, play["tasks"], files, values)


def _run_node(
    node: str, connect: Callable[[], Session], tasks: Sequence[Any], files: Path, values: Mapping[str, str]
) -> None:
    with ExitStack() as stack:
        shell: Session | None = None
        for task in tasks:
            [module] = set(task) - _KEYS
            what = _filled(task[module], values)
            if module == "ansible.builtin.meta":
                assert what == "reset_connection"
                stack.close()
                shell = None
                continue
            if shell is None:
                shell = stack.enter_context(connect())
            answer = shell.say(_command(module, what, files))
            if answer is None:
                raise Stopped(node, task["name"], "unreachable")
            if answer.splitlines()[-1] != "0":
                raise Stopped(node, task["name"], answer)


def _command(module: str, what: Any, files: Path) -> str:
    match module:
        case "ansible.builtin.command":
            return str(what)
        case "ansible.builtin.shell":
            return f"(\n{what})"
        case "ansible.builtin.copy":
            assert set(what) == {"src", "dest", "owner", "mode"}
            packed = b64encode(_packed(files / what["src"])).decode()
            target = what["dest"]
            return (
                f"mkdir -p {target} && echo {packed} | base64 -d | tar -xz --no-same-owner -C {target} && "
                f"chown -R {what['owner']} {target} && chmod -R {what['mode']} {target}"
            )
    raise AssertionError(f"{module} is not known here")


def _packed(folder: Path) -> bytes:
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.add(folder, ".")
    return buffer.getvalue()


def _filled(value: Any, values: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(part, values) for key, part in value.items()}
    return re.sub(r"{{ (\w+) }}", lambda found: values[found[1]], value)
