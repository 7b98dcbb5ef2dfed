"""Builds the packages: one staged tree for both, then dpkg-deb or rpmbuild. `make deb` and `make rpm` call it.

Law: the same commit gives the same bytes. Times come from SOURCE_DATE_EPOCH (or the last commit), order from sorting,
libraries from the lock; nothing of the machine that builds gets in.
"""

import argparse
import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from email.utils import format_datetime, parsedate_to_datetime
from pathlib import Path
from typing import NamedTuple

import bundle
import reference

from nodewalld import __version__

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CACHE = ROOT / "build"

_LIBRARY = "usr/lib/nodewalld"
_ENTRY = re.compile(
    r"(?P<name>\S+) \((?P<version>\S+)\) .*\n\n(?P<text>(?:(?: .*)?\n)+?) -- (?P<who>.*?)  (?P<when>.*)\n"
)
_STARTER = """\
#!/usr/lib/nodewalld/python
\"\"\"Starts {program} from the libraries that came with it.\"\"\"

import sys

sys.path.insert(0, "/usr/lib/nodewalld/site-packages")
from nodewalld.commands.{module} import main

sys.exit(main())
"""


class BuildError(Exception):
    """Something that the packages need is not as it should be."""


class Release(NamedTuple):
    """What is built, and the time that all its files bear."""

    version: str
    epoch: int
    changelog: str


def release(version: str | None) -> Release:
    """The checkout's release; another `version` is for trying upgrades, and gets an entry in the changelog."""
    told = os.environ.get("SOURCE_DATE_EPOCH") or _run("git", "-C", str(ROOT), "log", "-1", "--format=%ct")
    epoch, changelog = int(told), (HERE / "debian/changelog").read_text()
    written = _ENTRY.match(changelog)
    if written is None or written["version"] != __version__:
        raise BuildError(f"packaging/debian/changelog does not begin with {__version__}")
    if version and version != __version__:
        when = format_datetime(datetime.fromtimestamp(epoch, UTC))
        changes = "  * Built from the working tree."
        entry = f"nodewalld ({version}) UNRELEASED; urgency=medium\n\n{changes}\n\n -- {written['who']}  {when}\n\n"
        changelog = entry + changelog
    return Release(version or __version__, epoch, changelog)


# --- the tree -----------------------------------------------------------------------------------------------


def stage(tree: Path, made: Release) -> None:
    """Everything that is installed, where it is installed."""
    site = tree / _LIBRARY / "site-packages"
    site.mkdir(parents=True)
    bundle.unpack(bundle.fetch(CACHE), site)
    shutil.copytree(ROOT / "nodewalld", site / "nodewalld", ignore=shutil.ignore_patterns("__pycache__"))
    init = site / "nodewalld/__init__.py"
    init.write_text(init.read_text().replace(f'"{__version__}"', f'"{made.version}"'))

    _copy(HERE / "python", tree / _LIBRARY / "python")
    for program, module in (("nodewalld", "daemon"), ("nodewallctl", "ctl")):
        _write(tree / "usr/sbin" / program, _STARTER.format(program=program, module=module))
    _copy(ROOT / "systemd/nodewalld.service", tree / "usr/lib/systemd/system/nodewalld.service")
    _copy(ROOT / "systemd/nodewalld.catalog", tree / "usr/lib/systemd/catalog/nodewalld.catalog")
    _copy(ROOT / "systemd/nodewalld.tmpfiles", tree / "usr/lib/tmpfiles.d/nodewalld.conf")
    _copy(ROOT / "etc/nodewalld/nodewalld.toml", tree / "etc/nodewalld/nodewalld.toml")
    (tree / "etc/nodewalld/conf.d").mkdir()

    for name, parser in reference.parsers().items():
        _write(tree / "usr/share/bash-completion/completions" / name, reference.completion(parser, "bash"))
        _write(tree / f"usr/share/zsh/vendor-completions/_{name}", reference.completion(parser, "zsh"))
    for page, text in man_pages().items():
        _write_compressed(tree / f"usr/share/man/man{page[-1]}/{page}.gz", text)
    documents = tree / "usr/share/doc/nodewalld"
    _copy(HERE / "debian/copyright", documents / "copyright")
    _copy(ROOT / "docs/alerts.yml", documents / "alerts.yml")
    for example in (ROOT / "etc/examples").glob("*.toml"):
        _copy(example, documents / "examples" / example.name)
    _copy(reference.SCHEMA, tree / "usr/share/nodewalld/nodewalld.schema.json")
    _write(documents / "nodewalld.cdx.json", bundle.bill_of_materials(site, made.version, made.epoch))
    _write_compressed(documents / "changelog.gz", made.changelog)
    _settle(tree, made.epoch)


def man_pages() -> dict[str, str]:
    """The manual in roff, by page name."""
    parsers = reference.parsers()
    parts = {
        "@NODEWALLD_OPTIONS@": reference.options_section(parsers["nodewalld"]),
        "@NODEWALLCTL_OPTIONS@": reference.options_section(parsers["nodewallctl"]),
        "@NODEWALLCTL_COMMANDS@": reference.commands_section(parsers["nodewallctl"]),
    }
    pages = {}
    for source in sorted((HERE / "man").glob("*.md")):
        text = source.read_text()
        for mark, part in parts.items():
            text = text.replace(mark, part)
        done = subprocess.run(["go-md2man"], input=text, capture_output=True, text=True, check=True)
        pages[source.stem] = done.stdout
    return pages


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _write(target: Path, text: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)


def _write_compressed(target: Path, text: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def _settle(tree: Path, epoch: int) -> None:
    """Modes and times, whatever the builder's umask and clock."""
    programs = {tree / "usr/sbin/nodewalld", tree / "usr/sbin/nodewallctl", tree / _LIBRARY / "python"}
    for path in [tree, *tree.rglob("*")]:
        path.chmod(0o755 if path.is_dir() or path in programs else 0o644)
        os.utime(path, (epoch, epoch))


# --- the packages -------------------------------------------------------------------------------------------


def deb(tree: Path, made: Release, output: Path) -> Path:
    """A Debian package of the tree, by dpkg-deb."""
    control = tree / "DEBIAN"
    _copy(HERE / "debian/lintian-overrides", tree / "usr/share/lintian/overrides/nodewalld")
    files = sorted(path for path in tree.rglob("*") if path.is_file())
    kept = (HERE / "debian/conffiles").read_text().split()
    sums = "".join(_sum(path, tree) for path in files if f"/{path.relative_to(tree)}" not in kept)
    size = sum(-(-path.stat().st_size // 1024) if path.is_file() else 1 for path in tree.rglob("*"))
    control.mkdir()
    text = (HERE / "debian/control").read_text()
    text = text.replace("@VERSION@", made.version).replace("@INSTALLED_SIZE@", str(size))
    _write(control / "control", text)
    _write(control / "md5sums", sums)
    _copy(HERE / "debian/conffiles", control / "conffiles")
    for script in ("postinst", "prerm", "postrm"):
        _copy(HERE / "debian" / script, control / script)
    _settle(tree, made.epoch)
    for script in ("postinst", "prerm", "postrm"):
        (control / script).chmod(0o755)
    package = output / f"nodewalld_{made.version}_all.deb"
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(made.epoch)}
    _run("dpkg-deb", "-Zxz", "--root-owner-group", "--build", str(tree), str(package), env=environment)
    return package


def _sum(path: Path, tree: Path) -> str:
    digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()  # what dpkg --verify compares
    return f"{digest}  {path.relative_to(tree)}\n"


def rpm(tree: Path, made: Release, output: Path) -> Path:
    """An RPM of the tree, by rpmbuild."""
    zsh = tree / "usr/share/zsh"
    (zsh / "vendor-completions").rename(zsh / "site-functions")  # where Fedora's zsh looks
    _copy(ROOT / "LICENSE", tree / "usr/share/doc/nodewalld/LICENSE")  # Debian has it in /usr/share/common-licenses
    # "-" parts version from release; "~" sorts before, as it does in dpkg.
    version = made.version.replace("-", "~")
    top = tree.with_name("rpmbuild")
    changelog = top / "changelog"
    _write(changelog, rpm_changelog(made.changelog))
    _settle(tree, made.epoch)
    spec = top / "nodewalld.spec"
    _write(spec, (HERE / "rpm/nodewalld.spec").read_text().replace("%{nodewalld_changelog}", changelog.read_text()))
    defines = {"_topdir": str(top), "_rpmdir": str(top), "nodewalld_version": version, "nodewalld_tree": str(tree)}
    # A user's own macros and database have no say.
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(made.epoch), "HOME": str(top), "LC_ALL": "C.UTF-8"}
    options = [word for name, value in defines.items() for word in ("--define", f"{name} {value}")]
    _run("rpmbuild", "-bb", "--quiet", "--target", "noarch-linux", *options, str(spec), env=environment)
    built = top / "noarch" / f"nodewalld-{version}-1.noarch.rpm"
    return Path(shutil.copyfile(built, output / built.name))


def rpm_changelog(changelog: str) -> str:
    """Debian's changelog in RPM's words."""
    entries = []
    for entry in _ENTRY.finditer(changelog):
        day = parsedate_to_datetime(entry["when"]).strftime("%a %b %d %Y")
        text = re.sub(r"^  \* ", "- ", entry["text"].strip("\n"), flags=re.MULTILINE)
        text = re.sub(r"^    ", "  ", text, flags=re.MULTILINE).strip().replace("%", "%%")
        entries.append(f"* {day} {entry['who']} - {entry['version'].replace('-', '~')}-1\n{text}\n")
    return "\n".join(entries)


def _run(*command: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise BuildError(f"{command[0]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> int:
    """Build what is asked for; prints the paths of the packages."""
    parser = argparse.ArgumentParser(description="Builds nodewalld's packages.")
    parser.add_argument("what", nargs="+", choices=("deb", "rpm", "lock"))
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="where packages go (default dist)")
    parser.add_argument("--version", help="another version than the checkout's, to try an upgrade")
    options = parser.parse_args()
    try:
        if "lock" in options.what:
            bundle.lock(CACHE)
        options.output.mkdir(parents=True, exist_ok=True)
        for kind in [kind for kind in (deb, rpm) if kind.__name__ in options.what]:
            made = release(options.version)
            with tempfile.TemporaryDirectory(prefix="nodewalld-build-") as folder:
                tree = Path(folder) / "tree"
                stage(tree, made)
                print(kind(tree, made, options.output))
    except (BuildError, bundle.BundleError, OSError) as error:
        print(f"build: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
