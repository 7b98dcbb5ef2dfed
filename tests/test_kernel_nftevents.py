"""A filter in the kernel tells which transactions concern us: it misses none, and floods of others cost nothing."""

import errno
import random
import shlex
import socket

import pytest
from kernel_ns import argv, in_own_namespace, sh

from nodewalld.core.words import Family
from nodewalld.kernel import nftevents, socketfilter
from nodewalld.kernel.nftables import NftablesReader
from nodewalld.kernel.nftevents import ChainEvents, GenerationEvents

V4, V6 = Family.IPV4, Family.IPV6
CHAINS = {
    (V4, "filter"): {"FORWARD", "NODEWALL-FORWARD", "DOCKER-USER"},
    (V4, "mangle"): {"PREROUTING", "NODEWALL-PREROUTING"},
    (V6, "filter"): {"FORWARD", "NODEWALL-FORWARD"},
}
SETUP = """*filter
:DOCKER-USER - [0:0]
:DOCKER - [0:0]
:KUBE-FORWARD - [0:0]
:NODEWALL-FORWARD - [0:0]
-A FORWARD -m comment --comment "nodewalld:x" -j NODEWALL-FORWARD
-A NODEWALL-FORWARD -p udp -j DROP
COMMIT
*nat
:KUBE-SVC - [0:0]
COMMIT
"""
NFT = "add table {0}; add chain {0} FORWARD; add rule {0} FORWARD accept"
BOTH = "*mangle\n-A PREROUTING -j ACCEPT\nCOMMIT\n*filter\n-A DOCKER-USER -j RETURN\nCOMMIT\n"
FILTER, FILTER6, MANGLE = (V4, "filter"), (V6, "filter"), (V4, "mangle")

# What somebody does, and which tables of ours that touches.
TRANSACTIONS = {
    "a rule on top": ("iptables-nft -I FORWARD -j ACCEPT", {FILTER}),
    "a rule in another chain": ("iptables-nft -A KUBE-FORWARD -j ACCEPT", set()),
    "a chain whose name begins alike": ("iptables-nft -A DOCKER -j ACCEPT", set()),
    "our rule deleted": ("iptables-nft -D FORWARD 1", {FILTER}),
    "a chain flushed": ("iptables-nft -F NODEWALL-FORWARD", {FILTER}),
    "a chain renamed": ("iptables-nft -E NODEWALL-FORWARD OTHER", {FILTER}),
    "a policy": ("iptables-nft -P FORWARD DROP", {FILTER}),
    "the other family": ("ip6tables-nft -I FORWARD -j ACCEPT", {FILTER6}),
    "the other family, another table": ("ip6tables-nft -t mangle -I PREROUTING -j ACCEPT", set()),
    "another table": ("iptables-nft -t nat -A KUBE-SVC -j ACCEPT", set()),
    "two tables of ours": ("iptables-nft-restore --noflush", {FILTER, MANGLE}),
    "a table of nft's own": (f"nft '{NFT.format('inet filter')}'", set()),
    "a table with a long name": (f"nft '{NFT.format('ip filter-of-somebody')}'", set()),
    "a set in our table": ("nft 'add set ip filter s { type ipv4_addr; }'", {FILTER}),
    "a table deleted": ("nft delete table ip filter", {FILTER}),
    "everything flushed": ("nft flush ruleset", {FILTER, FILTER6}),
}


def heard(events: ChainEvents) -> set[tuple[Family, str]] | None:
    touched = events.read()
    return None if touched is None else {(touch.family, touch.table) for touch in touched}


def prepare(chains: dict[tuple[Family, str], set[str]] = CHAINS) -> ChainEvents:
    argv(["iptables-nft-restore", "--noflush"], stdin=SETUP)
    sh("ip6tables-nft -N NODEWALL-FORWARD")
    events = ChainEvents()
    events.attend(chains)
    assert events.read() is None, "what was before is not known"
    assert events.read() == frozenset()
    return events


@in_own_namespace
def test_just_what_touches_our_chains_is_told() -> None:
    for what, (command, touched) in TRANSACTIONS.items():
        sh("nft flush ruleset")
        with prepare() as events:
            argv(shlex.split(command), stdin=BOTH)
            assert heard(events) == touched, what


def everything(reader: NftablesReader) -> list[object]:
    return [reader.look(family, table, sorted(names)) for (family, table), names in CHAINS.items()]


@in_own_namespace
def test_a_reader_that_reads_only_what_was_touched_sees_what_a_new_one_sees() -> None:
    for what, (command, _) in TRANSACTIONS.items():
        sh("nft flush ruleset")
        with prepare(), NftablesReader() as reader, NftablesReader() as fresh:
            reader.attend(CHAINS)
            before = everything(reader)
            assert everything(reader) == before
            argv(shlex.split(command), stdin=BOTH)
            assert everything(reader) == everything(fresh), what


@in_own_namespace
def test_it_is_told_whose_it_is_before_the_end_is() -> None:
    with prepare() as events, GenerationEvents() as ends:
        ends.read()
        sh("iptables-nft -I FORWARD -j ACCEPT")
        (end,) = ends.read().events
        assert {touch.port_id for touch in events.read() or ()} == {end.port_id}


def mixed(chance: random.Random) -> tuple[str, bool]:
    """A transaction of up to some thousand messages, perhaps with one in a chain of ours."""
    size = chance.choice((0, 1, 5, 40, 300, 2000))
    chains = ("KUBE-FORWARD", "INPUT", "OUTPUT", *(("DOCKER",) if size < 10 else ()))
    lines = [f"-A {chance.choice(chains)} -p udp --dport {number + 1} -j ACCEPT" for number in range(size)]
    ours = chance.random() < 0.5
    if ours:
        rule = chance.choice(("-I FORWARD -j ACCEPT", "-A DOCKER-USER -j RETURN", "-A NODEWALL-FORWARD -j DROP"))
        lines.insert(chance.randint(0, len(lines)), rule)
    if chance.random() < 0.3:
        lines = ["-F KUBE-FORWARD", "-F INPUT", *lines]
    return "\n".join(["*filter", *lines, "COMMIT", ""]), ours


@pytest.mark.parametrize("room", [socketfilter.INSTRUCTIONS_MAX, 700], ids=["whole", "small"])
@in_own_namespace
def test_none_is_missed_however_large_its_transaction(room: int) -> None:
    """Also where the kernel has room for a small filter only, which reads but a part of a datagram."""
    attach, sizes = socketfilter._attach, []

    def grudging(target: socket.socket, program: bytes) -> None:
        sizes.append(len(program) // 8)
        if sizes[-1] > room:
            raise OSError(errno.ENOMEM, "no room")
        attach(target, program)

    socketfilter._attach = grudging
    with prepare() as events:
        assert sizes[-1] > room // 2
        chance = random.Random(7)
        sure = 0
        for number in range(60):
            script, ours = mixed(chance)
            argv(["iptables-nft-restore", "--noflush"], stdin=script)
            found = heard(events)
            assert found is None or found == ({FILTER} if ours else set()), (number, script[:200])
            sure += found is not None
        assert sure == 60 or room < socketfilter.INSTRUCTIONS_MAX


@in_own_namespace
def test_after_a_flood_in_our_chains_it_is_not_sure_once() -> None:
    with prepare() as events:
        flood = "\n".join(f"-A FORWARD -p udp --dport {n + 1} -j ACCEPT" for n in range(3000))
        argv(["iptables-nft-restore", "--noflush"], stdin=f"*filter\n{flood}\nCOMMIT\n")
        assert events.read() is None
        assert events.read() == frozenset()
        sh("iptables-nft -I FORWARD -j ACCEPT")
        assert heard(events) == {FILTER}


@in_own_namespace
def test_nothing_is_heard_where_nothing_is_ours() -> None:
    with prepare({}) as events:
        sh("nft flush ruleset")
        assert events.read() == frozenset()


@in_own_namespace
def test_without_room_for_a_filter_every_generation_is_read_anew() -> None:
    """Also when the same chains are asked for again, as each full check does."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOMEM, "no room")

    with prepare(), NftablesReader() as reader, NftablesReader() as fresh:
        nftevents.pass_touching = refuse
        for _ in range(2):
            reader.attend(CHAINS)
            for _ in range(3):
                sh("iptables-nft -I FORWARD -j ACCEPT")
                assert everything(reader) == everything(fresh)


def test_no_room_for_any_filter_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(target: socket.socket, program: bytes) -> None:
        raise OSError(errno.ENOMEM, "no room")

    monkeypatch.setattr(socketfilter, "_attach", refuse)
    with socket.socket(socket.AF_UNIX) as any_socket, pytest.raises(OSError, match="no room for a filter"):
        socketfilter.pass_touching(any_socket, {2}, {"filter"}, {"FORWARD"})
