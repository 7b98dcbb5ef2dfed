"""The content of sets beside their configuration: what is granted, what is kept, which file is read and when."""

import json
import math
import os
from collections.abc import Callable
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodewalld.configuration.setfiles import typed_networks
from nodewalld.core import flows
from nodewalld.core.config import Config, DaemonConfig, SetEntry, SetFile, Sources, Where
from nodewalld.core.setbook import (
    MOST,
    Additions,
    Declined,
    Listed,
    Term,
    add,
    entries_of,
    filled,
    moved,
    next_end,
    still_held,
    take_out,
    with_file,
    without_ended,
)
from nodewalld.core.words import Family, Network
from nodewalld.follower import Follower, Found, read_found
from nodewalld.service.additions import AdditionStore
from nodewalld.service.state import StateFolder

FILE = "/etc/nodewalld/sets/office.txt"
TOML = Where("/etc/nodewalld/nodewalld.toml", 4)


def net(word: str) -> Network:
    return ip_network(word)


def nets(*words: str) -> tuple[Network, ...]:
    return tuple(map(net, words))


def config(*families: Family) -> Config:
    office = SetEntry("office", ((net("10.0.0.0/8"), TOML),), (SetFile(FILE, nets("192.0.2.7", "fd00::7")),), TOML)
    text = "# office\n192.0.2.7 # printer\n\nfd00::7\n"
    daemon = DaemonConfig(families=families or tuple(Family))
    return Config("/etc/nodewalld", daemon, sets=(office,), sources=Sources(sets={FILE: text}))


def declined(what: Callable[[], object]) -> Declined:
    with pytest.raises(Declined) as caught:
        what()
    return caught.value


# --- what is granted


def test_what_is_added_is_held_beside_what_is_configured() -> None:
    added = add(config(), {}, "office", nets("192.0.2.9", "10.1.0.0/16", "fd00::/64"), None)
    assert filled(config(), added).sets[0].networks == nets(
        "10.0.0.0/8", "192.0.2.7", "fd00::7", "192.0.2.9", "10.1.0.0/16", "fd00::/64"
    )
    assert filled(config(), {"gone": {net("192.0.2.9"): None}}) == config()


def test_who_is_there_already_gets_the_new_time() -> None:
    first = add(config(), {}, "office", nets("192.0.2.9", "192.0.2.10"), Term(60, 60))
    assert next_end(first) == 60
    longer = add(config(), first, "office", nets("192.0.2.9"), Term(120, 120))
    assert longer["office"][net("192.0.2.9")] == Term(120, 120)
    for_good = add(config(), first, "office", nets("192.0.2.9", "192.0.2.10"), None)
    assert next_end(for_good) == math.inf


def test_what_is_over_is_gone_and_the_rest_stays() -> None:
    added = add(config(), {}, "office", nets("192.0.2.9"), Term(60, 60))
    added = add(config(), added, "office", nets("192.0.2.10"), None)
    assert without_ended(added, 59.9) == added
    assert without_ended(added, 60) == {"office": {net("192.0.2.10"): None}}


def test_each_entry_is_listed_with_the_line_that_it_comes_from() -> None:
    added = add(config(), {}, "office", nets("192.0.2.7"), Term(60, 60))
    assert list(entries_of(config(), added, "office")) == [
        Listed(net("10.0.0.0/8"), TOML),
        Listed(net("192.0.2.7"), Where(FILE, 2)),
        Listed(net("fd00::7"), Where(FILE, 4)),
        Listed(net("192.0.2.7"), term=Term(60, 60)),
    ]


def test_only_what_was_added_is_taken_out_and_the_rest_is_told_with_its_place() -> None:
    added = add(config(), {}, "office", nets("192.0.2.7", "192.0.2.9"), None)
    assert take_out(config(), added, "office", nets("192.0.2.7", "192.0.2.9")) == {"office": {}}
    wrong = nets("10.0.0.0/8", "10.1.2.3", "fd00::7", "198.51.100.1", "192.0.2.9")
    assert sorted(declined(lambda: take_out(config(), added, "office", wrong)).problems) == [
        f"10.0.0.0/8: stands in {TOML.file}:4; take it out there",
        f"10.1.2.3: was not added at run time (10.0.0.0/8 in {TOML.file}:4 covers it)",
        "198.51.100.1: was not added at run time",
        f"fd00::7: stands in {FILE}:4; take it out there",
    ]


def test_what_is_taken_out_and_still_held_by_the_configuration_is_told() -> None:
    asked = nets("192.0.2.7", "10.1.2.3", "198.51.100.1", "fd00::7", "fd00::8", "0.0.0.0/0")
    assert still_held(config(), "office", asked) == (
        f"192.0.2.7 is still in the set: 192.0.2.7 stands in {FILE}:2",
        f"10.1.2.3 is still in the set: 10.0.0.0/8 stands in {TOML.file}:4",
        f"fd00::7 is still in the set: fd00::7 stands in {FILE}:4",
    )


def test_a_set_that_is_not_there_is_told_with_what_there_is() -> None:
    for change in (
        lambda name: add(config(), {}, name, nets("::1"), None),
        lambda name: take_out(config(), {}, name, ()),
    ):
        assert str(declined(lambda change=change: change("offices"))) == (
            "there is no set offices (the configuration has: office)"
        )
        assert str(declined(lambda change=change: change("@office"))) == "there is no set @office (say office)"


def test_a_family_that_the_daemon_does_not_have_is_refused() -> None:
    error = declined(lambda: add(config(Family.IPV4), {}, "office", nets("192.0.2.9", "fd00::9"), None))
    assert error.problems == ("fd00::9: IPv6 is not in daemon.families",)


def test_more_than_the_most_is_refused() -> None:
    many = tuple(ip_network((0x0B000000 + number, 32)) for number in range(MOST))
    full = add(config(), {}, "office", many, None)
    assert len(full["office"]) == MOST
    assert add(config(), full, "office", many, Term(1, 1))
    assert "files of [set.office]" in str(declined(lambda: add(config(), full, "office", nets("::1"), None)))


def test_typed_addresses_are_judged_as_those_of_files_are() -> None:
    assert typed_networks(["192.0.2.7", "2001:DB8::/32", "0.0.0.0/0"]) == (
        nets("192.0.2.7", "2001:db8::/32", "::/0")[:2] + nets("0.0.0.0/0"),
        (),
    )
    for bad in (
        "10.0.0.1/8",
        "ten",
        "",
        "@office",
        "any",
        "10.0.0.0/255.0.0.0",
        "fe80::1%eth0",
        "1.2.3.4\n5.6.7.8",
        "0x1",
        "10.0.0.0/33",
        "1",
    ):
        networks, problems = typed_networks(["192.0.2.7", bad])
        assert networks == nets("192.0.2.7")
        assert len(problems) == 1, bad
        assert problems[0].isprintable()


@given(
    st.lists(st.integers(0, 32).flatmap(lambda n: st.tuples(st.integers(0, (1 << n) - 1), st.just(n))), max_size=8),
    st.integers(0, (1 << 32) - 1),
)
def test_an_address_is_in_a_set_when_a_network_of_the_set_holds_it(blocks: list[tuple[int, int]], number: int) -> None:
    networks = frozenset(ip_network((block << (32 - length), length)) for block, length in blocks)
    address = ip_address(number)
    assert flows._in_set(address, networks) is any(address in network for network in networks)


# --- what files hold


def test_the_new_content_of_a_file_takes_the_place_of_the_old_and_of_nothing_else() -> None:
    before = config()
    after = with_file(
        before, "192.0.2.8\nfd00::7\n192.0.2.9\n", SetFile(FILE, nets("192.0.2.8", "fd00::7", "192.0.2.9"))
    )
    assert after.sets[0].networks == nets("10.0.0.0/8", "192.0.2.8", "fd00::7", "192.0.2.9")
    assert after.sources.sets[FILE].startswith("192.0.2.8")
    assert list(moved(before, after)) == [("office", 2, 1)]
    assert with_file(before, before.sources.sets[FILE], SetFile(FILE, ())) is before
    assert with_file(before, "::1\n", SetFile("/elsewhere", nets("::1"))) is before


class Looks:
    """A follower whose looks are taken one by one."""

    def __init__(self, *paths: Path, read: Callable[[str], Found] = read_found) -> None:
        self.follower = Follower(lambda: None, read=read)
        self.follower.follow(map(str, paths))

    def __call__(self, times: int = 1) -> list[str]:
        """The texts that these looks have found; "!" for what is bad."""
        for _ in range(times):
            self.follower.look()
        return ["!" if found.problems else found.text for found in self.follower.take()]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "office.txt"
    put(path, "192.0.2.7\n")
    return path


def put(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o600)


def test_a_file_is_read_once_and_again_when_it_has_changed(file: Path) -> None:
    looks = Looks(file)
    assert looks() == []
    assert looks(3) == ["192.0.2.7\n"]
    put(file, "192.0.2.8\n")
    assert looks() == []
    assert looks(3) == ["192.0.2.8\n"]
    looks.follower.follow([str(file)])
    assert looks(4) == ["192.0.2.8\n"]
    looks.follower.follow([])
    put(file, "192.0.2.9\n")
    assert looks(4) == []


def test_a_file_that_is_being_written_is_left_alone_until_it_is_at_rest(file: Path) -> None:
    looks = Looks(file)
    looks(2)
    with file.open("w") as writing:
        for number in range(9):
            writing.write(f"192.0.2.{number}\n")
            writing.flush()
            assert looks() == []
    assert looks(3) == [file.read_text()]


def test_a_file_that_changes_while_it_is_read_is_read_again(file: Path) -> None:
    reads = []

    def read(path: str) -> Found:
        found = read_found(path)
        reads.append(found.text)
        if len(reads) == 1:
            put(file, "192.0.2.8\n")
        return found

    looks = Looks(file, read=read)
    assert looks(5) == ["192.0.2.8\n"]
    assert reads == ["192.0.2.7\n", "192.0.2.8\n"]


def test_what_was_read_for_an_earlier_configuration_is_forgotten(file: Path) -> None:
    def read(path: str) -> Found:
        looks.follower.follow([])
        return read_found(path)

    looks = Looks(file, read=read)
    assert looks(3) == []


def test_every_way_of_becoming_bad_and_good_again_is_noticed(file: Path, tmp_path: Path) -> None:
    looks = Looks(file)
    looks(2)
    ways: list[tuple[Callable[[], object], Callable[[], object]]] = [
        (lambda: file.rename(tmp_path / "away"), lambda: (tmp_path / "away").rename(file)),
        (lambda: file.chmod(0o666), lambda: file.chmod(0o600)),
        (lambda: tmp_path.chmod(0o777), lambda: tmp_path.chmod(0o700)),
        (lambda: os.truncate(file, 9 << 20), lambda: os.truncate(file, len("192.0.2.7\n"))),
        (lambda: (file.unlink(), os.mkfifo(file, 0o600)), lambda: (file.unlink(), put(file, "192.0.2.7\n"))),
        (lambda: (file.unlink(), file.symlink_to(file)), lambda: (file.unlink(), put(file, "192.0.2.7\n"))),
        (lambda: put(file, "192.0.2.7\nten\n"), lambda: put(file, "192.0.2.7\n")),
    ]
    for number, (spoil, heal) in enumerate(ways):
        spoil()
        assert looks(3) == ["!"], number
        heal()
        assert looks(3) == ["192.0.2.7\n"], number


# --- what outlives the daemon


class Machine:
    """The clocks of a machine, and its state folder."""

    def __init__(self, folder: Path) -> None:
        self.up, self.wall, self.boot, self.state = 1000.0, 1.8e9, "boot-1", StateFolder(folder)

    def store(self) -> AdditionStore:
        return AdditionStore(self.state, clock=lambda: self.up, wall=lambda: self.wall, boot=lambda: self.boot)

    def left(self) -> float:
        """The seconds that the one addition has left."""
        ((term,),) = (held.values() for held in self.store().read().values())
        assert term
        return term.end - self.up


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    made = Machine(tmp_path)
    made.store().write({"office": {net("192.0.2.9"): Term(made.up + 60, 60)}})
    return made


def test_no_clock_change_moves_the_end_within_a_boot(machine: Machine) -> None:
    for wall in (0.0, 1.8e9, 4e9):
        machine.wall = wall
        assert machine.left() == 60
    machine.up += 50
    assert machine.left() == 10


def test_the_next_boot_goes_by_the_wall_clock(machine: Machine) -> None:
    machine.boot, machine.up, machine.wall = "boot-2", 5.0, machine.wall + 20
    assert machine.left() == 40
    machine.wall += 50
    assert machine.left() < 0


def test_however_the_clock_was_set_back_nothing_lives_longer_than_its_time_once_more(machine: Machine) -> None:
    machine.boot, machine.up, machine.wall = "boot-2", 5.0, 0.0
    assert machine.left() == 60
    store = machine.store()
    store.write(store.read())
    machine.up += 50
    assert machine.left() == 10


def test_nothing_added_leaves_no_file(machine: Machine, tmp_path: Path) -> None:
    assert len(list(tmp_path.iterdir())) == 1
    machine.store().write({"office": {}})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("stored", "good"),
    [
        ("{", {}),
        ("[]", {}),
        ('{"sets": 3}', {}),
        ('{"sets": {"office": 3}}', {}),
        ('{"sets": {"office": {"ten": null}}}', {}),
        ('{"sets": {"office": {"10.0.0.1/8": null}}}', {}),
        ('{"sets": {"office": {"::1": [1, 2]}}}', {}),
        ('{"sets": {"office": {"::1": "soon", "::2": null}}}', {"office": {net("::2"): None}}),
    ],
)
def test_what_is_damaged_is_left_out_and_told(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str], stored: str, good: Additions
) -> None:
    (tmp_path / "additions.json").write_text(stored)
    found = machine.store().read()
    assert {name: held for name, held in found.items() if held} == good
    assert "damaged" in capsys.readouterr().out or stored == "[]"


@pytest.mark.parametrize("times", [[math.inf] * 3, [math.nan] * 3, [1e300, 1e300, 1e300], [10**400, 1, 1]])
def test_no_damage_makes_an_entry_live_for_ever(machine: Machine, tmp_path: Path, times: list[float]) -> None:
    (tmp_path / "additions.json").write_text(json.dumps({"boot": "boot-1", "sets": {"office": {"::1": times}}}))
    found = machine.store().read()
    assert without_ended(found, machine.up + 367 * 86400).get("office", {}) == {}
