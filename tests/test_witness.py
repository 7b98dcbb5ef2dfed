"""A storm of transactions that are not about us is looked at now and then; what is about us is heard at once."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from kernel_ns import in_own_namespace
from live import at_rest

from bench.stage import configuration, inside
from lab.daemon import Daemon
from lab.node import Node
from nodewalld import witness as module
from nodewalld.core.words import Family
from nodewalld.witness import Witness

OUR_CHAIN = {(Family.IPV4, "filter"): frozenset({"FORWARD"})}


def write(*commands: str) -> None:
    subprocess.run(["sh", "-ec", "; ".join(commands)], check=True)


def elsewhere() -> None:
    write("iptables-nft -t nat -N ELSEWHERE", "iptables-nft -t nat -X ELSEWHERE")


@contextmanager
def in_a_storm(rest: float) -> Iterator[tuple[Witness, int, int]]:
    """A witness that has just heard of what is not about it, with a bell; a rest that nothing ends takes so long."""
    module._REST, module._STORM = rest, 60.0
    heard, (bell, ring) = Witness(frozenset), os.pipe()
    heard.listen()
    heard.attend(OUR_CHAIN)
    write("iptables-nft -A FORWARD -j LOG")
    assert heard.heard(0.0) is not None  # the first time it can't tell
    elsewhere()
    assert heard.heard(0.0) is None
    assert not heard.rest(60.0, bell)  # the first time is no storm yet
    elsewhere()
    assert heard.heard(0.0) is None
    try:
        yield heard, bell, ring
    finally:
        heard.close()


@in_own_namespace
def test_in_a_storm_others_transactions_gather() -> None:
    with in_a_storm(rest=0.2) as (heard, bell, _):
        elsewhere()
        begun = time.monotonic()
        assert heard.rest(60.0, bell)
        assert time.monotonic() - begun >= 0.2
        begun = time.monotonic()
        assert heard.rest(0.1, bell)
        assert time.monotonic() - begun < 10  # as long as something else allows, however long the rest is


@in_own_namespace
def test_what_is_about_us_ends_the_rest_and_has_not_come_before_it() -> None:
    with in_a_storm(rest=60.0) as (heard, bell, _):
        begun = time.monotonic()
        touch = threading.Timer(0.3, write, ["iptables-nft -A FORWARD -j LOG"])
        touch.start()
        assert heard.rest(60.0, bell)
        touch.join()
        assert 0.3 <= time.monotonic() - begun < 30
        wake = heard.heard(begun)
        assert wake is not None
        assert {chain for _, _, chain in wake.touched} == {"FORWARD"}


@in_own_namespace
def test_there_is_no_rest_when_something_about_us_has_come() -> None:
    with in_a_storm(rest=60.0) as (heard, bell, _):
        write("iptables-nft -A FORWARD -j LOG")
        begun = time.monotonic()
        assert not heard.rest(60.0, bell)
        assert time.monotonic() - begun < 30


@in_own_namespace
def test_the_bell_ends_the_rest() -> None:
    with in_a_storm(rest=60.0) as (heard, bell, ring):
        os.write(ring, b"x")
        begun = time.monotonic()
        assert heard.rest(60.0, bell)
        assert time.monotonic() - begun < 30


@in_own_namespace
def test_who_wrote_is_known_for_good_once_it_was_asked_in_the_midst_of_a_pass() -> None:
    write("iptables-nft -A FORWARD -j LOG")
    code = (
        "from bench.writer import Writer; Writer().insert('filter', 'FORWARD'); print('written', flush=True); input()"
    )
    with closing(Witness(frozenset)) as heard:
        heard.listen()
        heard.attend(OUR_CHAIN)
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"written\n"
            (early,) = heard.overhear().who()
            writer.communicate(b"\n")
        assert early.pid == writer.pid
        assert os.getpid() in [parent.pid for parent in early.parents]
        wake = heard.heard(0.0)
        assert wake is not None
        assert wake.who() == (early,)


@pytest.mark.kernel
def test_a_storm_wakes_the_daemon_now_and_then(laboratory: None) -> None:
    with Node("nft") as node, Daemon(node, configuration()) as daemon:
        daemon.wait_ready()
        node.run("iptables-nft -t nat -N BENCH-NOISE")
        at_rest(daemon)
        status = Path(f"/proc/{daemon.pid}/status")

        def sleeps() -> int:
            return int(status.read_text().partition("voluntary_ctxt_switches:")[2].split()[0])

        before = sleeps()
        inside(node, "noise", transactions=400, pause=0.002)
        assert sleeps() - before < 200
