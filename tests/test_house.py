"""The house keeps its rules: dependencies point one way, types and style hold, modules open with their law."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nodewalld"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Who may import whom. A layer sees itself and what is named here; command line -> daemon -> reconciler -> core.
LAYERS = {
    "core": set(),
    "walk": {"core"},
    "configuration": {"core"},
    "importing": {"core", "configuration"},
    "kernel": {"core", "walk"},
    "service": {"core"},
    "guard": {"core", "kernel"},
    "memory": {"core", "service"},
    "keeper": {"core", "kernel", "memory"},
    "cutter": {"core", "kernel"},
    "removal": {"core", "kernel", "guard", "memory"},
    "reconciler": {"core", "kernel", "service", "guard", "memory", "keeper", "cutter", "removal"},
    "shield": {"core", "kernel"},
    "shielded": {"core", "service", "reconciler", "shield"},
    "follower": {"core", "configuration"},
    "setbook": {"core", "configuration", "service", "follower"},
    "governor": {"core", "configuration", "kernel", "service", "reconciler", "setbook"},
    "witness": {"core", "kernel"},
    "surroundings": {"core", "kernel", "service"},
    "desk": {"core", "service"},
    "daemon": {
        "witness",
        "surroundings",
        "core",
        "configuration",
        "kernel",
        "service",
        "reconciler",
        "follower",
        "setbook",
        "governor",
        "desk",
        "shielded",
    },
    "commands": {
        "core",
        "walk",
        "configuration",
        "importing",
        "kernel",
        "service",
        "guard",
        "memory",
        "reconciler",
        "shielded",
        "daemon",
    },
}

# What touches the world stays out of the core, and each third-party library stays at its adapter.
FORBIDDEN_IN_CORE = {
    "os",
    "sys",
    "socket",
    "subprocess",
    "time",
    "pathlib",
    "threading",
    "random",
    "logging",
    "tempfile",
}
HOMES = {
    "prometheus_client": {"service/metrics.py"},
    "pyroute2": {"kernel/links.py", "kernel/sets.py"},
    "watchdog": {"kernel/lockwatch.py"},
    "sdnotify": {"service/notify.py"},
    "subprocess": {"kernel/process.py", "kernel/trial.py"},
}
LINES = 450
LONGER = {
    "tests/test_ctl.py",
    "tests/test_lifecycle.py",
    "tests/test_lints.py",
    "tests/test_sets.py",
}
"""Modules from before there was a limit; no more may come."""


def layer(module: Path) -> str:
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(module: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("module", MODULES, ids=lambda m: str(m.relative_to(PACKAGE)))
def test_dependencies_point_one_way(module: Path) -> None:
    here = layer(module)
    if here == "__init__":
        return
    seen = {name.split(".")[1] for name in imports(module) if name.startswith("nodewalld.")} - {here, "__version__"}
    assert seen <= LAYERS[here], f"{here} must not import {seen - LAYERS[here]}"
    outside = {name.split(".")[0] for name in imports(module)}
    if here in {"core", "walk"}:
        assert not outside & FORBIDDEN_IN_CORE
    for library, homes in HOMES.items():
        assert library not in outside or str(module.relative_to(PACKAGE)) in homes


@pytest.mark.parametrize("module", MODULES, ids=lambda m: str(m.relative_to(PACKAGE)))
def test_every_module_opens_with_its_law(module: Path) -> None:
    assert ast.get_docstring(ast.parse(module.read_text()))


@pytest.mark.parametrize("folder", ["nodewalld", "lab", "neighbours", "bench", "demo", "tests"])
def test_no_module_is_longer_than_anybody_reads(folder: str) -> None:
    lengths = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in (ROOT / folder).rglob("*.py")}
    long = {name for name, lines in lengths.items() if lines > LINES}
    assert long == {name for name in LONGER if name.startswith(f"{folder}/")}


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=["style", "format", "types"]
)
def test_linters_are_content(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
