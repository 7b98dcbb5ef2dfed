"""ipsets: replaced at one stroke or left alone."""

import os
import socket
import subprocess
import time
from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_ns import argv, in_own_namespace, sh, until

from nodewalld.core.words import Family, Network
from nodewalld.kernel.netlink import NLM_F_DUMP, NLM_F_REQUEST, attribute, message, netfilter_body, text
from nodewalld.kernel.process import Result, run
from nodewalld.kernel.sets import SetError, Sets, SetTypeConflict, capacity, render_swap, temporary_name

V4, V6 = Family.IPV4, Family.IPV6


def nets(*words: str) -> list[Network]:
    return [ip_network(word) for word in words]


@in_own_namespace
def test_what_is_put_in_is_what_is_read_back() -> None:
    with Sets() as sets:
        for name, family, content in (
            ("four", V4, nets("10.0.0.0/8", "192.0.2.1/32", "10.1.0.0/16")),
            ("six", V6, nets("fd00::/8", "2001:db8::1/128")),
            ("none", V4, []),
        ):
            sets.replace(name, family, content)
            assert sets.entries(name) == set(content)
            assert sets.holds(name, content)
            header = sets.header(name)
            assert header is not None
            assert (header.type_name, header.family, header.maxelem) == ("hash:net", family, 65536)
            assert (header.size, header.references) == (len(content), 0)
        assert set(sets.names()) == {"four", "six", "none"}
        sets.replace("four", V4, nets("192.0.2.2/32"))
        assert sets.entries("four") == set(nets("192.0.2.2/32"))
        assert not sets.holds("four", nets("192.0.2.2/32", "192.0.2.3/32"))
        assert not sets.holds("four", [])


@in_own_namespace
def test_everywhere_is_two_halves() -> None:
    with Sets() as sets:
        sets.replace("all", V4, nets("0.0.0.0/0", "10.0.0.0/8"))
        assert sets.entries("all") == set(nets("0.0.0.0/1", "128.0.0.0/1", "10.0.0.0/8"))
        assert sets.holds("all", nets("10.0.0.0/8", "0.0.0.0/0"))
        sets.replace("all6", V6, nets("::/0"))
        assert sets.entries("all6") == set(nets("::/1", "8000::/1"))


@in_own_namespace
def test_an_exception_that_somebody_slipped_in_shows() -> None:
    with Sets() as sets:
        sets.replace("some", V4, nets("10.0.0.0/8"))
        sh("ipset add some 10.1.0.0/16 nomatch")
        assert sets.entries("some") == {*nets("10.0.0.0/8"), "10.1.0.0/16 nomatch"}
        assert not sets.holds("some", nets("10.0.0.0/8"))
        assert not sets.holds("some", nets("10.0.0.0/8", "10.1.0.0/16"))


@in_own_namespace
def test_a_set_that_is_not_there_is_no_error() -> None:
    with Sets() as sets:
        assert sets.names() == ()
        assert sets.header("none") is None
        assert sets.entries("none") == frozenset()
        assert sets.destroy("none") is False


@in_own_namespace
def test_a_set_in_use_is_replaced_but_not_destroyed() -> None:
    with Sets() as sets:
        sets.replace("used", V4, nets("10.0.0.0/8"))
        sh("iptables-nft -A INPUT -m set --match-set used src")
        sets.replace("used", V4, nets("192.0.2.0/24"))
        assert sets.entries("used") == set(nets("192.0.2.0/24"))
        assert sets.names() == ("used",)
        with pytest.raises(SetError, match="still refers"):
            sets.destroy("used")
        sh("iptables-nft -F INPUT")

        def destroyed() -> bool:
            try:
                return sets.destroy("used")
            except SetError:  # the kernel frees an nft rule somewhat later
                return False

        until(destroyed, "the set is free")
        assert sets.names() == ()


@in_own_namespace
def test_nobody_ever_sees_a_set_half_full() -> None:
    """A member of both contents is a member throughout, asked of the kernel's match by real packets."""
    everyone = nets("127.0.0.0/8")
    many = [ip_network((0x0A000000 + number * 256, 24)) for number in range(3000)]
    with Sets() as sets, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sets.replace("known", V4, everyone)
        sh("iptables-nft -A OUTPUT -m set ! --match-set known dst -j DROP")
        child = os.fork()
        if child == 0:
            try:
                for number in range(20):
                    sets.replace("known", V4, everyone + many[: 3000 * (number % 2)])
            finally:
                os._exit(0)
        sent = 0
        deadline = time.monotonic() + 20
        while os.waitpid(child, os.WNOHANG) == (0, 0) and time.monotonic() < deadline:
            sender.sendto(b"x", ("127.0.0.1", 9999))  # EPERM, were it dropped
            sent += 1
        assert sent > 100
        assert sets.holds("known", everyone + many)


def never(_words: list[str], **_: object) -> Result:
    raise AssertionError("a few entries start no program")


@in_own_namespace
def test_a_few_entries_of_a_set_change_without_a_program() -> None:
    for family, old, new in (
        (V4, nets("10.0.0.0/8", "192.0.2.1/32"), nets("10.0.0.0/8", "192.0.2.2/32", "198.51.100.0/24")),
        (V6, nets("fd00::/8"), nets("fd00::/8", "2001:db8::1/128")),
    ):
        with Sets() as filled:
            filled.replace("some", family, old)
        with Sets(never) as sets:
            sets.change("some", family, frozenset(old), frozenset(new))
            assert sets.holds("some", new)
            sets.change("some", family, frozenset(new), frozenset(old))
            assert sets.holds("some", old)
            sets.change("some", family, frozenset(old), frozenset(old))
            sets.destroy("some")


@in_own_namespace
def test_a_set_that_cannot_be_changed_a_little_is_replaced() -> None:
    """It is full, has lost its content, is not there, or the change is no small one."""
    many = [ip_network((0x0A000000 + number * 256, 24)) for number in range(600)]
    everywhere = nets("0.0.0.0/0", "10.0.0.0/24", "0.0.0.0/1")
    with Sets() as sets:

        def becomes(old: list[Network], new: list[Network]) -> bool:
            sets.change("mine", V4, frozenset(old), frozenset(new))
            return sets.holds("mine", new)

        argv("ipset create mine hash:net maxelem 2".split())
        argv("ipset add mine 10.0.0.0/24".split())
        assert becomes(many[:1], many[:3])
        sh("ipset flush mine")
        assert becomes(many[:3], many[:4])
        sets.destroy("mine")
        assert becomes(many[:4], many[:5])
        assert becomes(many[:5], many)
        assert becomes(many, everywhere)
        assert becomes(everywhere, many[:2])
        assert becomes(many[:2], everywhere[:2])
        assert becomes(everywhere[:2], everywhere)


@in_own_namespace
def test_leftovers_of_a_killed_load_do_not_matter() -> None:
    with Sets() as sets:
        for leftover in ("hash:net", "hash:ip family inet6", "bitmap:port range 1-5"):
            argv(["ipset", "create", temporary_name("mine"), *leftover.split()])
            sets.replace("mine", V4, nets("10.0.0.0/8"))
            assert sets.entries("mine") == set(nets("10.0.0.0/8"))
            assert sets.names() == ("mine",)


@in_own_namespace
def test_a_set_with_other_parameters_is_taken_over() -> None:
    argv("ipset create mine hash:net maxelem 2 hashsize 64 timeout 60 counters comment".split())
    with Sets() as sets:
        content = nets("10.0.0.0/8", "10.1.0.0/16", "10.2.0.0/16")
        sets.replace("mine", V4, content)
        assert sets.holds("mine", content)


@in_own_namespace
def test_a_set_of_another_type_is_left_alone_and_reported_with_a_cure() -> None:
    for words in ("hash:ip", "hash:net family inet6", "bitmap:port range 1-5", "list:set"):
        argv(["ipset", "create", "theirs", *words.split()])
        before = sh("ipset save")
        with Sets() as sets, pytest.raises(SetTypeConflict) as conflict:
            sets.replace("theirs", V4, nets("10.0.0.0/8"))
        assert "`ipset destroy theirs`, or choose another name" in str(conflict.value)
        assert words.split()[0] in str(conflict.value)
        assert sh("ipset save") == before
        sh("ipset destroy theirs")


@in_own_namespace
def test_a_refused_load_leaves_the_old_content_and_no_rest() -> None:
    def broken(words: list[str], *, stdin: str) -> Result:
        done = subprocess.run(
            words, input=stdin.replace("swap", "add NW-none 1.1.1.1\nswap"), capture_output=True, text=True, check=False
        )
        return Result(done.returncode, done.stdout, done.stderr, 0)

    with Sets() as sets:
        sets.replace("mine", V4, nets("10.0.0.0/8"))
    with Sets(broken) as sets:
        with pytest.raises(SetError, match=r"mine could not be loaded: .*line"):
            sets.replace("mine", V4, nets("192.0.2.0/24"))
        assert sets.holds("mine", nets("10.0.0.0/8"))
        assert sets.names() == ("mine",)


@in_own_namespace
def test_a_set_that_somebody_is_listing_is_replaced_once_he_is_through() -> None:
    many = [ip_network((0x0A000000 + number * 256, 24)) for number in range(20_000)]
    attempts = []

    def run_and_then_end_the_listing(words: list[str], *, stdin: str) -> Result:
        attempts.append(run(words, stdin=stdin))
        listing.close()
        return attempts[-1]

    with Sets(run_and_then_end_the_listing, lambda _: None) as sets:
        with Sets() as before:
            before.replace("mine", V4, many)
        listing = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
        body = netfilter_body(0, attribute(1, b"\6"), text(2, "mine"))
        listing.send(message(6 << 8 | 7, NLM_F_REQUEST | NLM_F_DUMP, 1, body))
        listing.recv(65536)
        sets.replace("mine", V4, nets("192.0.2.0/24"))
        assert [attempt.status for attempt in attempts] == [1, 0]
        assert sets.holds("mine", nets("192.0.2.0/24"))
        assert sets.names() == ("mine",)


@in_own_namespace
def test_a_large_set_is_read_whole() -> None:
    content = [ip_network((0x0A000000 + number * 256, 24)) for number in range(20_000)]
    content6 = [ip_network((0xFD << 120 | number << 64, 64)) for number in range(5_000)]
    with Sets() as sets:
        sets.replace("large", V4, content)
        sets.replace("large6", V6, content6)
        assert sets.entries("large") == set(content)
        assert sets.holds("large6", content6)
        header = sets.header("large")
        assert header is not None
        assert header.size == 20_000


def test_the_script_is_one_swap() -> None:
    name = temporary_name("cluster_nodes")
    assert render_swap("cluster_nodes", V4, nets("10.0.0.2/32", "10.0.0.0/8"), exists=True) == (
        f"create {name} hash:net family inet maxelem 65536\n"
        f"add {name} 10.0.0.0/8\n"
        f"add {name} 10.0.0.2/32\n"
        f"swap {name} cluster_nodes\n"
        f"destroy {name}\n"
    )
    fresh = render_swap("cluster_nodes", V6, nets("::/0"), exists=False, maxelem=7)
    assert "create cluster_nodes hash:net family inet6 maxelem 7\nswap" in fresh


@given(st.text(min_size=1, max_size=31))
def test_a_temporary_name_fits_and_is_always_the_same(name: str) -> None:
    assert temporary_name(name) == temporary_name(name)
    assert len(temporary_name(name)) == 11


@given(st.integers(min_value=0, max_value=1 << 24))
def test_a_set_has_room_to_double(count: int) -> None:
    assert capacity(count) >= 65536
    assert capacity(count) > 2 * count
    assert capacity(count) & (capacity(count) - 1) == 0


@pytest.mark.parametrize("family", list(Family))
@in_own_namespace
def test_what_differs_a_little_is_changed_a_little(family: Family) -> None:
    """Also where somebody else changed the set, or an entry is a /0; what can't be done so is replaced."""
    started = []

    def counted(*words: object, **more: object) -> Result:
        started.append(words)
        return run(*words, **more)  # type: ignore[arg-type]

    def net(number: int) -> str:
        return f"10.{number >> 8}.{number & 255}.0/24" if family is Family.IPV4 else f"fd00:{number}::/64"

    everything = "0.0.0.0/0" if family is Family.IPV4 else "::/0"
    most = [net(n) for n in range(200)]
    with Sets(counted) as sets:

        def fill(*wanted: str) -> tuple[bool, int]:
            before = len(started)
            changed = sets.fill("mine", family, frozenset(nets(*wanted)))
            assert sets.holds("mine", nets(*wanted))
            return changed, len(started) - before

        assert fill(*most) == (True, 1)
        assert fill(*most) == (False, 0)
        assert fill(*most[1:], net(201)) == (True, 0)
        sh(f"ipset del mine {most[7]}")
        sh(f"ipset add mine {net(202)}")
        assert fill(*most) == (True, 0)
        assert fill(*most, everything) == (True, 0)
        assert fill(everything) == (True, 0)
        assert fill(*[net(n) for n in range(300)]) == (True, 1)
        sh(f"ipset add mine {net(299).replace('/24', '/25').replace('/64', '/65')} nomatch")
        assert fill(*most) == (True, 1)
        sh("ipset destroy mine")
        sh(f"ipset create mine hash:net family {'inet' if family is Family.IPV4 else 'inet6'} maxelem 2")
        assert fill(*most[:2]) == (True, 0)
        assert fill(*most[:3]) == (True, 1)
        sh("ipset destroy mine")
        sh("ipset create mine hash:ip")
        with pytest.raises(SetTypeConflict):
            fill(*most)
