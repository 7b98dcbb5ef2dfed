"""What `make deb` and `make rpm` make: complete, the same every time, pure Python, and content to the linters."""

import gzip
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import pytest
from built import ROOT, Packages, build

from nodewalld import __version__
from nodewalld.configuration.schema import SECTIONS

sys.path.insert(0, str(ROOT / "packaging"))
import bundle
import reference

SITE = "usr/lib/nodewalld/site-packages"
NEEDED = {
    "etc/nodewalld/nodewalld.toml",
    "usr/lib/nodewalld/python",
    "usr/lib/systemd/catalog/nodewalld.catalog",
    "usr/lib/systemd/system/nodewalld.service",
    "usr/lib/tmpfiles.d/nodewalld.conf",
    "usr/sbin/nodewallctl",
    "usr/sbin/nodewalld",
    "usr/share/bash-completion/completions/nodewallctl",
    "usr/share/bash-completion/completions/nodewalld",
    "usr/share/doc/nodewalld/alerts.yml",
    "usr/share/doc/nodewalld/changelog.gz",
    "usr/share/doc/nodewalld/copyright",
    "usr/share/doc/nodewalld/nodewalld.cdx.json",
    "usr/share/man/man5/nodewalld.toml.5.gz",
    "usr/share/nodewalld/nodewalld.schema.json",
    "usr/share/man/man8/nodewallctl.8.gz",
    "usr/share/man/man8/nodewalld.8.gz",
    *(f"usr/share/doc/nodewalld/examples/{path.name}" for path in (ROOT / "etc/examples").iterdir()),
}
MEBIBYTE = 1 << 20


def output(*command: object) -> bytes:
    done = subprocess.run(list(map(str, command)), capture_output=True, check=False)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    return done.stdout


@pytest.fixture(scope="module")
def deb(packages: Packages) -> tarfile.TarFile:
    return tarfile.open(fileobj=BytesIO(output("dpkg-deb", "--fsys-tarfile", packages.deb)))


@pytest.fixture(scope="module")
def files(deb: tarfile.TarFile) -> Mapping[str, bytes]:
    content = {}
    for member in deb.getmembers():
        file = deb.extractfile(member)
        if file is not None:
            content[member.name.removeprefix("./")] = file.read()
    return content


def test_two_builds_give_the_same_bytes(roots: Mapping[str, Path], tmp_path: Path) -> None:
    """Elsewhere, later, under another umask, another home and another time zone."""
    once = build(tmp_path / "once", __version__)
    environment = os.environ | {"TZ": "Asia/Kolkata", "LC_ALL": "C", "HOME": str(tmp_path)}
    again = build(tmp_path / "again", __version__, cwd=tmp_path, umask=0o077, env=environment)
    for one, other in zip(once, again, strict=True):
        assert hashlib.sha256(one.read_bytes()).hexdigest() == hashlib.sha256(other.read_bytes()).hexdigest(), one.name


def test_the_packages_are_small_and_for_every_architecture(packages: Packages) -> None:
    assert output("dpkg-deb", "-f", packages.deb, "Architecture").decode().strip() == "all"
    assert output("rpm", "-qp", "--qf", "%{ARCH}", packages.rpm).decode() == "noarch"
    assert all(path.stat().st_size < MEBIBYTE for path in packages)


def test_everything_is_in_it_and_belongs_to_root(deb: tarfile.TarFile, files: Mapping[str, bytes]) -> None:
    assert set(files) >= NEEDED
    assert {(member.uid, member.gid) for member in deb.getmembers()} == {(0, 0)}
    assert not [member.name for member in deb.getmembers() if member.mode & 0o7022]
    outside = [name for name in files if not name.startswith((SITE, "usr/share/zsh/", "usr/share/lintian/"))]
    assert set(outside) == NEEDED


def test_nothing_in_it_is_compiled(files: Mapping[str, bytes]) -> None:
    assert not [name for name in files if name.endswith((".pyc", ".so"))]
    assert not [name for name, content in files.items() if content.startswith(b"\x7fELF")]


def test_the_rpm_holds_the_same_files(packages: Packages, files: Mapping[str, bytes]) -> None:
    listed = output("rpm", "-qlp", "--qf", "[%{FILEMODES:perms} %{FILENAMES}\n]", packages.rpm).decode().splitlines()
    held = {name for mode, name in (line.split(" ", 1) for line in listed if line.startswith("-"))}
    zsh = {name.replace("vendor-completions", "site-functions") for name in files}
    shared = {f"/{name}" for name in zsh if not name.startswith("usr/share/lintian/")}
    assert held == {*shared, "/usr/share/doc/nodewalld/LICENSE"}
    assert output("rpm", "-qp", "--configfiles", packages.rpm).decode().split() == ["/etc/nodewalld/nodewalld.toml"]


def test_the_bill_of_materials_names_each_library_with_the_hash_of_the_lock(files: Mapping[str, bytes]) -> None:
    bill = json.loads(files["usr/share/doc/nodewalld/nodewalld.cdx.json"])
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["version"] == __version__
    named = {(c["name"], c["version"], c["hashes"][0]["content"]) for c in bill["components"]}
    assert named == {(library.name, library.version, library.sha256) for library in bundle.locked()}
    assert all(c["licenses"][0]["expression"] not in {"", "UNKNOWN", None} for c in bill["components"])
    tops = {name.removeprefix(f"{SITE}/").split("/")[0] for name in files if name.startswith(SITE)}
    assert {top for top in tops if "-" not in top} == {"nodewalld", *(name for name, _, _ in named)}


def test_the_lock_holds_what_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = dict(requirement.split(">=") for requirement in project["dependencies"])
    locked = {library.name: library.version for library in bundle.locked()}
    assert set(wanted) == set(locked)
    for name, least in wanted.items():
        assert _numbers(locked[name]) >= _numbers(least), name


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def test_lintian_is_content(packages: Packages) -> None:
    done = output("lintian", "--allow-root", "--display-info", "--fail-on", "error,warning,info", packages.deb)
    assert done == b""


def test_rpmlint_is_content(packages: Packages) -> None:
    said = output("rpmlint", "-c", ROOT / "packaging/rpm/rpmlint.toml", packages.rpm).decode()
    assert "0 errors, 0 warnings" in said


def test_maintainer_scripts_are_shell(packages: Packages) -> None:
    for script in ("postinst", "prerm", "postrm"):
        output("sh", "-n", ROOT / "packaging/debian" / script)
    output("sh", "-n", ROOT / "packaging/python")


# --- manual and completions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["man8/nodewalld.8", "man8/nodewallctl.8", "man5/nodewalld.toml.5"])
def test_a_page_of_the_manual_renders_without_a_warning(files: Mapping[str, bytes], tmp_path: Path, page: str) -> None:
    path = tmp_path / page.split("/")[1]
    path.write_bytes(gzip.decompress(files[f"usr/share/man/{page}.gz"]))
    environment = os.environ | {"MANWIDTH": "100", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        ["man", "--warnings", "-l", path], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stderr == ""
    assert "@" not in re.sub(r'"!?@[a-zA-Z_-]+"', "", done.stdout)


def test_the_manual_names_every_command_and_every_option(files: Mapping[str, bytes]) -> None:
    for program, parser in reference.parsers().items():
        page = gzip.decompress(files[f"usr/share/man/man8/{program}.8.gz"]).decode().replace("\\-", "-")
        commands = list(reference.commands(parser))
        assert all(f"\\fB{name}\\fP" in page for name, _, _ in commands)
        for inner in (parser, *(inner for _, _, inner in commands)):
            options = {name for action in inner._actions for name in action.option_strings}
            assert not [name for name in options if f"\\fB{name}\\fP" not in page], program


def test_the_manual_names_every_key_of_the_configuration() -> None:
    page = (ROOT / "packaging/man/nodewalld.toml.5.md").read_text()
    sections = re.split(r"^# ", page, flags=re.MULTILINE)
    tables = {reference.heading(name): set(section.keys) for name, section in SECTIONS.items()}
    tables["[[jump]]"].remove("enforce")
    for head, keys in tables.items():
        [section] = [text for text in sections if text.startswith(f"{head}\n")]
        assert not [key for key in keys if f"**{key}**" not in section], head
    [positions] = [text for text in sections if text.startswith("POSITIONS")]
    assert all(f'"{word}"' in positions for word in ("first", "early", "last"))


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["re"], {"reload", "remove", "resume", "revert"}),
        (["check", "--s"], {"--strict", "--state-dir"}),
        (["--config", "/etc/syst"], {"/etc/systemd"}),
    ],
)
def test_bash_completes(files: Mapping[str, bytes], tmp_path: Path, words: list[str], offered: set[str]) -> None:
    script = tmp_path / "nodewallctl"
    script.write_bytes(files["usr/share/bash-completion/completions/nodewallctl"])
    line = ["nodewallctl", *words]
    text = f"""
        complete() {{ function=${{@: -2:1}}; }}
        . {script}
        COMP_WORDS=({shlex.join(line)}) COMP_CWORD={len(words)}
        $function nodewallctl {line[-1]} {line[-2]}
        echo ${{COMPREPLY[@]}}
    """
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) >= offered, done.stderr


def test_the_configuration_that_is_shipped_is_good_and_changes_nothing() -> None:
    command = [sys.executable, "-m", "nodewalld.commands.ctl", "check", "--strict", ROOT / "etc/nodewalld"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert "nothing will be enforced" in done.stdout


def test_what_the_shipped_configuration_shows_as_examples_is_good(tmp_path: Path) -> None:
    shown = (ROOT / "etc/nodewalld/nodewalld.toml").read_text()
    (tmp_path / "nodewalld.toml").write_text(re.sub(r"^# (?=\[|[a-z_]+ *= )", "", shown, flags=re.MULTILINE))
    command = [sys.executable, "-m", "nodewalld.commands.ctl", "check", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for kind in ("port", "forward", "rule", "jump", "set", "zone"):
        assert f"1 {kind}" in done.stdout
