"""Fixtures of the system tests: packages that are built, and machines that boot with them installed.

A suite without its tools proves nothing: what can't be installed fails the tests, it does not skip them.
"""

import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from booted import Machine
from built import NEXT, ROOT, Packages, build

from nodewalld import __version__

HERE = Path(__file__).resolve().parent
_NUMBERS = itertools.count(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test of all pays for the root trees, which take longer than other tests may."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.system)
            item.add_marker(pytest.mark.timeout(400))


@pytest.fixture(scope="session")
def roots() -> Mapping[str, Path]:
    """The root tree of each Debian, after all programs that these tests need were installed."""
    if os.geteuid() != 0:
        pytest.fail("system tests boot machines, and need root", pytrace=False)
    done = subprocess.run([ROOT / "tools/prepare-system"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"tools/prepare-system failed:\n{done.stdout}{done.stderr}", pytrace=False)
    return {suite: Path(tree) for suite, tree in (line.split() for line in done.stdout.splitlines())}


@pytest.fixture(scope="session")
def packages(roots: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Packages:
    """The packages of this checkout."""
    return build(tmp_path_factory.mktemp("packages"), __version__)


@pytest.fixture(scope="session")
def next_packages(roots: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Packages:
    """The same as a later version."""
    return build(tmp_path_factory.mktemp("next"), NEXT)


@pytest.fixture(scope="session")
def installed(
    roots: Mapping[str, Path], packages: Packages, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], list[Path]]:
    """The layers of a machine on which the DEB was installed; made at the first call for each Debian."""
    made: dict[str, list[Path]] = {}

    def layers(suite: str) -> list[Path]:
        if suite not in made:
            with Machine(tmp_path_factory.mktemp(f"install-{suite}"), [roots[suite]]) as machine:
                machine.run(f"dpkg -i {machine.put(packages.deb)}")
                machine.run("systemctl stop nodewalld")
                # dockerd renames folders of its own, which an overlay takes amiss when they lie in a lower layer.
                machine.run("systemctl stop docker.socket docker; rm -rf /var/lib/docker; sync", check=False)
            made[suite] = [machine.layer, roots[suite]]
        return made[suite]

    return layers


@pytest.fixture
def boot(tmp_path: Path) -> Iterator[Callable[[list[Path]], Machine]]:
    """Boots machines from layers, and stops them at the end of the test."""
    machines: list[Machine] = []

    def booted(layers: list[Path]) -> Machine:
        folder = tmp_path / f"m{next(_NUMBERS)}"
        machine = Machine(folder, layers)
        machines.append(machine)
        machine.boot()
        return machine

    yield booted
    for machine in machines:
        machine.stop()
        shutil.rmtree(machine.folder, ignore_errors=True)


@pytest.fixture(params=["bookworm", "trixie"])
def machine(
    request: pytest.FixtureRequest,
    installed: Callable[[str], list[Path]],
    boot: Callable[[list[Path]], Machine],
) -> Machine:
    """A freshly booted machine with the DEB installed, once with each Debian."""
    return boot(installed(request.param))


@pytest.fixture
def bookworm(installed: Callable[[str], list[Path]], boot: Callable[[list[Path]], Machine]) -> Machine:
    """The same with Debian 12 only."""
    return boot(installed("bookworm"))
