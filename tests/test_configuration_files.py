"""Several files make one configuration, and what is wrong with a file or a folder is told with its name."""

import os
import shutil
from ipaddress import IPv4Network
from pathlib import Path

import pytest
from written import Write, problems

from nodewalld.configuration.errors import ConfigError
from nodewalld.configuration.load import load
from nodewalld.core.config import (
    DaemonConfig,
    Problem,
    Where,
)


def test_later_files_override_values_merge_tables_and_add_entries(write: Write) -> None:
    port = "[[port]]\nname = '{}'\nports = [1]\n"
    folder = write(
        "[daemon]\nresync = '10s'\nmark = 3\n[set.a]\nentries = ['10.0.0.1']\n" + port.format("main"),
        b="[daemon]\nmark = 1\n[set.b]\n" + port.format("b"),
        a="\n\n[daemon]\nyield_to = ['x']\nmark = 5\n[set.a]\nentries = ['10.0.0.2']\n" + port.format("a"),
    )
    config = load(folder)
    assert config.daemon == DaemonConfig(resync=10.0, yield_to=("x",), mark=1)
    assert [(s.name, s.networks, s.where.line) for s in config.sets] == [
        ("a", (IPv4Network("10.0.0.2/32"),), 4),
        ("b", (), 3),
    ]
    assert [(p.name, p.where) for p in config.ports] == [
        ("main", Where(f"{folder}/nodewalld.toml", 6, 0)),
        ("a", Where(f"{folder}/conf.d/a.toml", 8, 1)),
        ("b", Where(f"{folder}/conf.d/b.toml", 4, 2)),
    ]


def test_an_empty_list_adds_nothing_to_entries_of_other_files(write: Write) -> None:
    folder = write("[[port]]\nname = 'p'\nports = [1]", a="port = []", b="failsafe.ports = ['23/tcp']", c="[failsafe]")
    assert len(load(folder).ports) == 1


def test_a_name_taken_in_another_file_names_both_places(write: Write) -> None:
    jump = "[[jump]]\nname = '{0}'\ntable = 'nat'\nfrom = 'OUTPUT'\nto = '{0}'\n"
    folder = write(jump.format("Same"), a="\n" + jump.format("same"))
    with pytest.raises(ConfigError) as caught:
        load(folder)
    assert caught.value.problems == (
        Problem(
            Where(f"{folder}/conf.d/a.toml", 3, 1),
            "jump.same.name",
            f'"same" is already the name of {folder}/nodewalld.toml:2',
            "another name",
        ),
    )


def test_one_bad_file_does_not_hide_what_is_wrong_in_the_others(write: Write) -> None:
    folder = write("x = 1", a="a = \n", b="[[port]]\nname = 'p'\nports = [0]\nallow = ['@in-a']", c=b"\n# \xff\n")
    known = "daemon, failsafe, forward, jump, port, rule, service, set, zone"
    assert problems(folder) == [
        f"nodewalld.toml:1: x: is not a known key (known here: {known})",
        "conf.d/a.toml:1: syntax: Invalid value, at column 5 (see https://toml.io)",
        'conf.d/b.toml:3: port.p.ports[0]: 0 is out of range (a number from 1 to 65535, or "FIRST-LAST")',
        "conf.d/c.toml:2: file: is not UTF-8 here (save the file as UTF-8)",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"a = 1\n\nb = [1,\n", "3: syntax: "),
        (b"[daemon]\n[daemon]\n", "2: syntax: "),
        (b"\xef\xbb\xbf[daemon]\n", "1: file: begins with a byte order mark (save the file as UTF-8 without BOM)"),
        (b'a = "x\x00"', "1: syntax: Illegal character '\\x00', at column 7"),
    ],
)
def test_a_syntax_error_has_its_line(text: bytes, expected: str, write: Write) -> None:
    [found] = problems(write(text))
    assert found.startswith(f"nodewalld.toml:{expected}")


def test_a_missing_folder_or_main_file_is_told_with_a_cure(write: Write, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert problems(missing) == [f"{missing}:1: file: does not exist (create it)"]
    folder = write(None)
    shutil.rmtree(folder / "conf.d")
    assert problems(folder) == ["nodewalld.toml:1: file: does not exist (create it)"]


def test_what_is_no_file_is_told_apart(write: Write, tmp_path: Path) -> None:
    folder = write("")
    (folder / "conf.d/a.toml").mkdir(mode=0o755)
    (folder / "conf.d/b.toml").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "conf.d/c.toml", 0o600)
    (folder / "conf.d/d.toml").symlink_to("d.toml")
    (folder / "conf.d/.hidden.toml").write_text("nonsense")
    (folder / "conf.d/README").write_text("nonsense")
    assert problems(folder) == [
        "conf.d/a.toml:1: file: is a folder (a text file in its place)",
        "conf.d/b.toml:1: file: is a symbolic link to nothing (make it point to a file, or remove it)",
        "conf.d/c.toml:1: file: is not a regular file (a text file in its place)",
        "conf.d/d.toml:1: file: can't be read: Too many levels of symbolic links (see: ls -ld conf.d/d.toml)",
    ]


def test_a_file_in_the_place_of_a_folder_is_told(write: Write, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert problems(file) == [f"{file}:1: file: is not a folder (a folder in its place)"]
    folder = write("")
    (folder / "conf.d").rmdir()
    (folder / "conf.d").write_text("")
    assert problems(folder) == ["conf.d:1: file: is not a folder (a folder in its place)"]


def test_symbolic_links_to_trusted_files_are_followed(write: Write, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("[daemon]\nmark = 1\n")
    target.chmod(0o600)
    folder = write("")
    (folder / "conf.d/a.toml").symlink_to(target)
    assert load(folder).daemon.mark == 1


@pytest.mark.parametrize("path", ["", "nodewalld.toml", "conf.d", "conf.d/a.toml"])
@pytest.mark.parametrize("bits", [0o020, 0o002])
def test_what_others_can_write_is_refused(path: str, bits: int, write: Write) -> None:
    folder = write("", a="")
    target = folder / path
    mode = target.stat().st_mode & 0o777 | bits
    target.chmod(mode)
    with pytest.raises(ConfigError) as caught:
        load(folder)
    assert [str(problem) for problem in caught.value.problems] == [
        f"{target}:1: file: can be written by others than root (mode {mode:04o}) (chmod go-w {target})"
    ]
    assert load(folder, check_owner=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_another_user_owns_is_refused(write: Write) -> None:
    folder = write("")
    os.chown(folder / "nodewalld.toml", 4711, 0)
    (folder / "nodewalld.toml").chmod(0o664)
    [found] = problems(folder)
    assert found == (
        "nodewalld.toml:1: file: belongs to user 4711, who can write it and can be written by others than root "
        "(mode 0664) (chown root nodewalld.toml && chmod go-w nodewalld.toml)"
    )


def test_a_link_into_a_folder_that_others_can_write_is_refused(write: Write, tmp_path: Path) -> None:
    loose = tmp_path / "loose"
    loose.mkdir()
    (loose / "a.toml").touch(0o600)
    loose.chmod(0o777)
    folder = write("")
    (folder / "conf.d/a.toml").symlink_to(loose / "a.toml")
    says = f"lies in {loose}, which can be written by others than root (mode 0777) (chmod go-w {loose})"
    assert problems(folder) == [f"conf.d/a.toml:1: file: {says}"]
    loose.chmod(0o1777)
    assert load(folder)


def test_a_set_files_faults_have_its_own_name_and_lines(write: Write, tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_text("10.0.0.1\r\n# 10.0.0.300\nten # ten\n\n\t10.0.0.1/8\n@set\nany\n")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"10.0.0.1\n\xff\n")
    loose = tmp_path / "loose.txt"
    loose.touch()
    for path, mode in ((bad, 0o644), (binary, 0o644), (loose, 0o646)):
        path.chmod(mode)
    folder = write(f"[set.s]\nfiles = [\n '{bad}',\n '{binary}',\n '{loose}',\n '{tmp_path}']")
    address = '(such as "10.0.0.1", "10.0.0.0/8" or "fd00::/64")'
    writable = f"can be written by others than root (mode 0646) (chmod go-w {loose})"
    assert sorted(problems(folder)) == sorted(
        [
            f'{bad}:3: set.s.files[0]: "ten" is not an address or CIDR {address}',
            f'{bad}:5: set.s.files[0]: "10.0.0.1/8" has host bits set ("10.0.0.0/8" or "10.0.0.1/32")',
            f'{bad}:6: set.s.files[0]: "@set" is a set, and sets have no place here {address}',
            f'{bad}:7: set.s.files[0]: any has no place here ("0.0.0.0/0" and "::/0")',
            f"{binary}:2: set.s.files[1]: is not UTF-8 here (save the file as UTF-8)",
            f"nodewalld.toml:5: set.s.files[2]: {loose} {writable}",
            f"nodewalld.toml:6: set.s.files[3]: {tmp_path} is a folder (a text file in its place)",
        ]
    )


def test_names_that_no_terminal_should_see_are_escaped(write: Write) -> None:
    folder = write("", **{"a\n\x1b[31m": "x = 1"})
    (folder / "conf.d/a\n\x1b[31m.toml").rename(os.fsdecode(os.fsencode(folder) + b"/conf.d/a\n\x1b\xff.toml"))
    [found] = problems(folder)
    assert found.startswith(r"conf.d/a\n\x1b\\xff.toml:1: x: is not a known key")
