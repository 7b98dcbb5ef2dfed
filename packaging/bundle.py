"""The libraries that the packages carry: fetched by pip, checked against the lock, unpacked as they are; their list.

Law: nothing is built. What lies in site-packages depends on the hashes in requirements.lock and on nothing else, so
it is the same on every machine; and it is pure Python, so it serves them all.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import uuid
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LOCK = HERE / "requirements.lock"

_LINE = re.compile(r"(?P<name>[\w.-]+)==(?P<version>\S+) --hash=sha256:(?P<sha256>[0-9a-f]{64})")
_LEFT_OUT = {"RECORD", "WHEEL", "INSTALLER", "entry_points.txt", "top_level.txt"}
_NATIVE = {".so", ".pyd", ".dll", ".dylib"}
_LICENCES = {"License :: OSI Approved :: MIT License": "MIT"}


@dataclass(frozen=True, slots=True)
class Library:
    """One line of the lock."""

    name: str
    version: str
    sha256: str


class BundleError(Exception):
    """The lock or what it names is not as it should be."""


def locked() -> list[Library]:
    """The lock's lines."""
    lines = [line for line in LOCK.read_text().splitlines() if line and not line.startswith("#")]
    matches = [_LINE.fullmatch(line) for line in lines]
    if not all(matches):
        raise BundleError(f"{LOCK} holds a line that is not NAME==VERSION --hash=sha256:...")
    return [Library(**match.groupdict()) for match in matches if match]


def fetch(cache: Path) -> dict[Library, Path]:
    """The archive of each library; pip has compared the hashes."""
    digest = uuid.uuid5(uuid.NAMESPACE_URL, LOCK.read_text()).hex[:12]
    folder = cache / f"libraries-{digest}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as fresh:
            _pip_download(["--require-hashes", "-r", str(LOCK)], Path(fresh) / folder.name)
            with suppress(OSError):  # another build was quicker, and has fetched the same
                (Path(fresh) / folder.name).rename(folder)
    return {library: _archive(folder, library) for library in locked()}


def _pip_download(wanted: list[str], folder: Path) -> None:
    # One platform for all builders: elsewhere pip would choose watchdog's wheel for another, with another hash.
    target = ["--platform", "manylinux_2_17_x86_64", "--platform", "any", "--python-version", "3.11"]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check", *target]
    done = subprocess.run([*command, "-d", str(folder), *wanted], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BundleError(f"pip could not fetch the libraries:\n{done.stderr}")


def _archive(folder: Path, library: Library) -> Path:
    found = [path for path in folder.iterdir() if path.name.lower().startswith(f"{library.name}-{library.version}")]
    if len(found) != 1:
        raise BundleError(f"{folder} holds {len(found)} archives of {library.name} {library.version}")
    return found[0]


def unpack(archives: dict[Library, Path], site: Path) -> None:
    """Into a site-packages folder, with metadata and licences, without what only pip needs."""
    for library, archive in archives.items():
        if archive.suffix == ".whl":
            _unpack_wheel(archive, site)
        else:
            _unpack_source(library, archive, site)
    for path in site.rglob("*"):
        if path.suffix in _NATIVE:
            raise BundleError(f"{path.relative_to(site)} is no pure Python: the package could not be for all machines")


def _unpack_wheel(archive: Path, site: Path) -> None:
    with zipfile.ZipFile(archive) as wheel:
        for name in wheel.namelist():
            if not name.endswith("/") and Path(name).name not in _LEFT_OUT:
                wheel.extract(name, site)


def _unpack_source(library: Library, archive: Path, site: Path) -> None:
    """A source archive of pure Python: its package, and what a wheel would have kept beside it."""
    top, info = f"{library.name}-{library.version}", site / f"{library.name}-{library.version}.dist-info"
    with tarfile.open(archive) as source:
        for member in source.getmembers():
            path = Path(member.name).relative_to(top)
            content = source.extractfile(member)
            if content is None:
                continue
            if path.parts[0] == library.name:
                target = site / path
            elif str(path) == "PKG-INFO":
                target = info / "METADATA"
            elif path.name.startswith("LICENSE"):
                target = info / "licenses" / path.name
            else:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content.read())


def lock(cache: Path) -> None:
    """Write the lock anew, with the newest releases of what it names."""
    folder = cache / "libraries-newest"
    shutil.rmtree(folder, ignore_errors=True)
    _pip_download([library.name for library in locked()], folder)
    head = "".join(line for line in LOCK.read_text().splitlines(keepends=True) if line.startswith("#"))
    lines = []
    for path in sorted(folder.iterdir()):
        name, version = re.sub(r"(\.tar\.gz|-py.*\.whl)$", "", path.name).rsplit("-", 1)
        lines.append(f"{name}=={version} --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n")
    LOCK.write_text(head + "".join(lines))


def bill_of_materials(site: Path, version: str, epoch: int) -> str:
    """A CycloneDX document of what is bundled."""
    components = [_component(site, library) for library in locked()]
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps([version, components]))
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        "metadata": {
            "timestamp": datetime.fromtimestamp(epoch, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "component": {
                "type": "application",
                "bom-ref": "nodewalld",
                "name": "nodewalld",
                "version": version,
                "licenses": [{"expression": "Apache-2.0"}],
            },
        },
        "components": components,
        "dependencies": [{"ref": "nodewalld", "dependsOn": [component["bom-ref"] for component in components]}],
    }
    return json.dumps(document, indent=2) + "\n"


def _component(site: Path, library: Library) -> dict[str, Any]:
    metadata = HeaderParser().parsestr((_info(site, library) / "METADATA").read_text())
    classified = next((_LICENCES[c] for c in metadata.get_all("Classifier", []) if c in _LICENCES), "")
    purl = f"pkg:pypi/{library.name}@{library.version}"
    return {
        "type": "library",
        "bom-ref": purl,
        "name": library.name,
        "version": library.version,
        "description": metadata["Summary"],
        "licenses": [{"expression": metadata["License-Expression"] or classified or metadata["License"]}],
        "purl": purl,
        "hashes": [{"alg": "SHA-256", "content": library.sha256}],
    }


def _info(site: Path, library: Library) -> Path:
    return site / f"{library.name}-{library.version}.dist-info"
