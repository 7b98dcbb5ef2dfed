"""Input of the worst kind, through the real commands: refused with a clear error, or in force; never half of it.

Each world is put in the place of a good configuration under a running daemon: `check` and `reload` must say the same,
within seconds and a bounded memory, without a traceback, and what was in force stays in force to the last rule.
"""

import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from live import in_force, ours

from lab.daemon import Daemon
from lab.node import Node

pytestmark = pytest.mark.kernel

SECONDS = 40.0
"""For one command on a busy machine; the slowest world takes about two on an idle one."""
MEMORY = 1 << 30
GOOD = '[set.s]\nentries = ["192.0.2.1"]\n[[port]]\nname = "good"\nports = [31002]\nallow = ["@s"]\n'
PORT = '[[port]]\nname = "p"\nports = [1]\n'
RULE = '[[rule]]\nname = "r"\ntable = "filter"\nchain = "INPUT"\nrule = {}\n'
LINE = re.compile(r"(?P<file>/.+):(?P<line>\d+): (?P<key>\S.*?): (?P<what>.+) \((?P<cure>.+)\)")


class World(NamedTuple):
    """A folder: how it is made beside a main file that says PORT, and a part of what must be said."""

    make: Callable[[Path], object]
    said: str


def main(text: str | bytes, said: str) -> World:
    content = text if isinstance(text, bytes) else text.encode()
    return World(lambda folder: (folder / "nodewalld.toml").write_bytes(content), said)


def instead(make: Callable[[Path], object], said: str) -> World:
    def made(folder: Path) -> None:
        (folder / "nodewalld.toml").unlink()
        make(folder / "nodewalld.toml")

    return World(made, said)


def set_file(make: Callable[[Path], object], said: str) -> World:
    def made(folder: Path) -> None:
        make(folder / "set.txt")
        (folder / "nodewalld.toml").write_text(f'[set.x]\nfiles = ["{folder}/set.txt"]\n')

    return World(made, said)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        here = Path.cwd()
        os.chdir(path.parent)  # the path of a socket has at most 107 bytes
        try:
            one.bind(path.name)
        finally:
            os.chdir(here)


def files_of_others(folder: Path) -> None:
    (folder / "conf.d").mkdir()
    (folder / "conf.d").chmod(0o777)


def bad_files(folder: Path) -> None:
    (folder / "conf.d").mkdir(mode=0o700)
    for number in range(500):
        (folder / f"conf.d/{number:04}.toml").write_text(PORT)


def rule(text: str) -> str:
    return RULE.format(json.dumps(text))


CUT = "-j DROP -m comment --comment x" + " " * 10_300 + "-F"
REFUSED = {
    "10 MB": main("# " + "x" * 10_000_000, "1: file: is more than the 8 MiB"),
    "8 MB of values": main("[[port]]\nports = [" + "1," * 4_000_000 + "]", "2: syntax: has more values than"),
    "thousands of problems": main(
        "\n".join(f"k{number} = 1" for number in range(50_000)), "k999: is the 1,000th problem"
    ),
    "8 MB of one number": main("[daemon]\nmark = " + "9" * 8_000_000, "2: syntax: holds a number that is too long"),
    "8 MB of one text": main(f'[daemon]\nmetrics = "/{"x" * 8_000_000}"', "2: daemon.metrics: is longer than"),
    "8 MB of one key": main(f"{'x' * 8_000_000} = 1", "is not a known key"),
    "a key of dots": main("a." * 1_000_000 + "a = 1", "1: syntax: has a key of more than 100 parts"),
    "a deep list": main(f"a = {'[' * 1_000_000}", "1: file: is nested too deeply"),
    "names that are near to none": main(
        "".join(f"[set.s{n}]\n" for n in range(20_000)) + PORT + f"allow = {[f'@t{n}' for n in range(20_000)]}",
        '20004: port.p.allow[0]: "@t0" is not a set',
    ),
    "NUL": main(PORT + "\0", "4: syntax: Invalid"),
    "not UTF-8": main(PORT.encode() + b"# \xc3\x28\n", "4: file: is not UTF-8 here"),
    "a byte order mark": main("\ufeff" + PORT, "1: file: begins with a byte order mark"),
    "old Mac's line ends": main(PORT.replace("\n", "\r"), "1: syntax: "),
    "a command in a name": main(PORT.replace('"p"', '"$(touch /tmp/x)"'), 'port[0].name: "$(touch /tmp/x)" can'),
    "restore syntax in a name": main(PORT.replace('"p"', '"p\\nCOMMIT\\n*filter\\n-F"'), "holds a line break"),
    "a second line in a rule": main(rule("-j DROP\nCOMMIT\n*filter\n-F"), "5: rule.r.rule: holds a line break"),
    "a rule that restore cuts in two": main(rule(CUT), "5: rule.r.rule: is longer than 4096 bytes"),
    "a text turned round": main(rule("-m comment --comment \u202epord -j ACCEPT"), "control character '\\u202e'"),
    "a duplicate in another file": World(
        lambda f: [(f / "conf.d").mkdir(mode=0o700), (f / "conf.d/a.toml").write_text("\n" + PORT)],
        'conf.d/a.toml:3: port.p.name: "p" is already the name of',
    ),
    "bad files": World(bad_files, "conf.d/0000.toml:2: port.p.name: "),
    "a pipe": instead(os.mkfifo, "1: file: is not a regular file"),
    "a folder": instead(Path.mkdir, "1: file: is a folder"),
    "endless zeros": instead(lambda p: p.symlink_to("/dev/zero"), "1: file: is not a regular file"),
    "a socket": instead(a_socket, "1: file: can't be read: No such device or address"),
    "a loop": instead(lambda p: p.symlink_to(p.name), "1: file: can't be read: Too many levels"),
    "a link to nothing": instead(lambda p: p.symlink_to("x"), "1: file: is a symbolic link to nothing"),
    "a kernel file without end": instead(lambda p: p.symlink_to("/proc/kmsg"), "1: file: "),
    "a folder of others": World(files_of_others, "conf.d:1: file: can be written by others than root (mode 0777)"),
    "set: 100 MB": set_file(lambda p: os.truncate(os.open(p, os.O_CREAT | os.O_WRONLY), 100 << 20), "the 64 MiB that"),
    "set: a pipe": set_file(os.mkfifo, "2: set.x.files[0]: "),
    "set: endless zeros": set_file(lambda p: p.symlink_to("/dev/zero"), "is not a regular file"),
    "set: NUL": set_file(lambda p: p.write_bytes(b"10.0.0.1\n10.0.0.2\0\n"), "set.txt:2: set.x.files[0]: holds the"),
    "set: a long line": set_file(lambda p: p.write_text("1" * 8_000_000), "set.txt:1: set.x.files[0]: is longer than"),
    "set: all bad": set_file(lambda p: p.write_text("10.0.0.1/8 # x\n" * 100_000), "set.txt:1000: set.x.files[0]: is "),
    "set: ipset syntax": set_file(lambda p: p.write_text("\n10.0.0.1 nomatch\n"), "set.txt:2: set.x.files[0]: "),
    "set: a range": set_file(lambda p: p.write_text("10.0.0.1-10.0.0.9"), "set.txt:1: set.x.files[0]: "),
    "set: an interface": set_file(lambda p: p.write_text("fe80::1%eth0"), 'names an interface ("fe80::1")'),
    "set: IPv4 in IPv6": set_file(lambda p: p.write_text("::ffff:10.0.0.1"), "is an IPv4 address"),
}


@pytest.fixture(scope="module")
def daemon(laboratory: None) -> Iterator[Daemon]:
    """One daemon for all worlds: nothing of any of them may be left for the next."""
    with Node("nft") as node, Daemon(node, GOOD, env={"PYTHONPATH": ""}) as made:
        made.wait_ready()
        yield made


def lay(daemon: Daemon, world: World) -> Path:
    daemon.configure(PORT)
    folder = daemon.config_directory
    world.make(folder)
    for path in (p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()):
        path.chmod(0o600)
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_the_worst_is_refused_and_what_was_in_force_stays(name: str, daemon: Daemon) -> None:
    before = ours(daemon.node)
    lay(daemon, REFUSED[name])
    for command in (("check",), ("reload",)):
        begun = time.monotonic()
        result = daemon.ctl(*command, timeout=60)
        assert time.monotonic() - begun < SECONDS
        is_clear(result, REFUSED[name].said)
    assert peak(daemon) < MEMORY
    assert ours(daemon.node) == before
    assert "Traceback" not in daemon.log_text()


def is_clear(result: "subprocess.CompletedProcess[str]", said: str) -> None:
    assert result.returncode == 1, result.stdout + result.stderr[-2000:]
    told = [line.strip() for line in result.stderr.splitlines() if LINE.search(line)]
    assert any(said in line for line in told), result.stderr[:2000]
    assert len(told) <= 1001
    assert max(map(len, result.stderr.splitlines())) < 2000
    assert "Traceback" not in result.stderr


def peak(daemon: Daemon) -> int:
    """The most memory that the daemon has held, in bytes."""
    status = Path(f"/proc/{daemon.pid}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024


@pytest.mark.parametrize(
    "name", ["thousands of problems", "a pipe", "set: endless zeros", "a rule that restore cuts in two"]
)
def test_a_start_with_the_worst_changes_nothing(name: str, daemon: Daemon) -> None:
    folder = lay(daemon, REFUSED[name])
    before = ours(daemon.node)
    base = daemon.node.directory / "once"
    for path in (base, base / "run", base / "lib"):
        path.mkdir(mode=0o700, exist_ok=True)
    folders = ["--config", str(folder), "--runtime-dir", str(base / "run"), "--state-dir", str(base / "lib")]
    command = [daemon.node.python(), "-m", "nodewalld.commands.daemon", "--once", *folders]
    result = daemon.node.run(command, check=False, timeout=60)
    assert result.returncode == 78, result.stderr[-2000:]
    assert REFUSED[name].said in result.stderr
    assert "Traceback" not in result.stderr
    assert ours(daemon.node) == before


def large_set_inline(folder: Path) -> None:
    lines = "".join(f'"{_address(number)}",\r\n' for number in range(100_000))
    (folder / "nodewalld.toml").write_text(f"[set.x]\r\nentries = [\r\n{lines}]\r\n", newline="")


def large_set_in_a_file(folder: Path) -> None:
    lines = "".join(f"{_address(number)}\t# {number}\r\n" for number in range(100_000))
    (folder / "set.txt").write_text(lines, newline="")
    (folder / "nodewalld.toml").write_text(f'[set.x]\nfiles = ["{folder}/set.txt"]\n')


def _address(number: int) -> str:
    return f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"


def ten_thousand_files(folder: Path) -> None:
    (folder / "conf.d").mkdir(mode=0o700)
    for number in range(10_000):
        text = PORT.replace('"p"', f'"p{number}"') if number % 100 == 0 else "\r\n# nothing\r\n"
        (folder / f"conf.d/{number:04}.toml").write_text(text, newline="")


TAKEN = {
    "100,000 entries inline": (large_set_inline, "1 set"),
    "100,000 entries in a file": (large_set_in_a_file, "1 set"),
    "ten thousand files": (ten_thousand_files, "101 ports"),
    "an empty file": (lambda f: (f / "nodewalld.toml").write_bytes(b""), "no entries"),
    "names that look like words of iptables": (
        lambda f: (f / "nodewalld.toml").write_text(
            "".join(PORT.replace('"p"', f'"{name}"') for name in ("-j", "COMMIT", "-A", "--", "filter", "RETURN"))
            + rule('-m comment --comment "$(id) `id` ; COMMIT \' *filter é" -j ACCEPT')
        ),
        "6 ports, 1 rule",
    ),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_large_or_strange_but_right_comes_into_force(name: str, daemon: Daemon) -> None:
    make, said = TAKEN[name]
    lay(daemon, World(make, ""))
    begun = time.monotonic()
    checked = daemon.ctl("check")
    assert (checked.returncode, said in checked.stdout) == (0, True), checked.stdout + checked.stderr[-2000:]
    reloaded = daemon.ctl("reload")
    assert reloaded.returncode == 0, reloaded.stderr[-2000:]
    assert time.monotonic() - begun < 2 * SECONDS
    assert in_force(daemon)
    if "100,000" in name:
        assert daemon.node.run("ipset list x | grep -c ^10").stdout.strip() == "100000"
    assert peak(daemon) < MEMORY
    assert "Traceback" not in daemon.log_text()
    assert daemon.reload(GOOD).returncode == 0
    assert "x" not in ours(daemon.node)
