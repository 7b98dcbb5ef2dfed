"""nf_tables as the kernel tells it: one event per transaction, and chains read without being deceived by packets."""

import os
import socket
import struct
import subprocess
import time
from contextlib import nullcontext

import pytest
from kernel_ns import argv, in_own_namespace, readable, send_packets, sh

from nodewalld.core.words import Family
from nodewalld.kernel.netlink import (
    HEADER,
    NLM_F_ACK,
    NLM_F_APPEND,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_REQUEST,
    NetlinkError,
    NetlinkSocket,
    attribute,
    message,
    nested,
    netfilter_body,
    text,
)
from nodewalld.kernel.nftables import NftablesReader
from nodewalld.kernel.nftevents import GenerationEvents

V4, V6 = Family.IPV4, Family.IPV6

# What packets might change in a rule: credit, counts, quotas, pointers into the kernel. {set} is an ipset.
MATCHES = """
-m limit --limit 5/s
-m limit --limit 1/h --limit-burst 3
-m quota --quota 1000
-m quota --quota 100000000
-m statistic --mode nth --every 3 --packet 0
-m statistic --mode random --probability 0.5
-m recent --set --name one
-m recent --update --seconds 60 --hitcount 4 --name one
-m hashlimit --hashlimit-upto 5/s --hashlimit-name all
-m hashlimit --hashlimit-upto 5/s --hashlimit-mode srcip --hashlimit-name each
-m connlimit --connlimit-above 2
-m connbytes --connbytes 10:20 --connbytes-dir both --connbytes-mode packets
-m set --match-set {set} src
-m string --string x --algo bm
-m conntrack --ctstate NEW
-m time --timestart 00:00
-p udp -m multiport --dports 1,9999
-p udp -m socket
-m comment --comment hello
""".strip().splitlines()
TARGETS = """
RATEEST --rateest-name estimate --rateest-interval 250ms --rateest-ewmalog 500ms
SET --add-set {set} src
CONNMARK --save-mark
MARK --set-mark 1
NFLOG --nflog-group 9
""".strip().splitlines()


def restore(text: str, tool: str = "iptables-nft-restore") -> None:
    argv([tool, "--noflush"], stdin=text)


def datagrams(events: GenerationEvents) -> int:
    """How many datagrams wait in the socket; they are consumed."""
    raw = socket.socket(fileno=os.dup(events.fileno()))
    count = 0
    try:
        for _ in range(100_000):
            raw.recv(65536)
            count += 1
    except BlockingIOError:
        return count
    finally:
        raw.close()
    raise AssertionError("no end of datagrams")


@in_own_namespace
def test_every_foreign_transaction_is_one_event_that_names_its_writer() -> None:
    with GenerationEvents() as events, NftablesReader() as reader:
        for line in ("iptables-nft -A INPUT -p tcp", "ip6tables-nft -N SOME", "nft add table inet other"):
            with subprocess.Popen(line.split()) as writer:
                pass
            assert writer.returncode == 0
            assert readable(events)
            heard = events.read()
            assert not heard.overflow
            assert heard.events[-1].generation == reader.generation()
            assert {(event.pid, event.comm) for event in heard.events} == {(writer.pid, line.split()[0])}
            assert len(heard.events) == 1
        assert not readable(events, limit=0)


@in_own_namespace
def test_a_restore_of_five_thousand_rules_is_one_datagram() -> None:
    rules = "".join(f"-A INPUT -p tcp --dport {port}\n" for port in range(1, 5001))
    with GenerationEvents() as events:
        restore(f"*filter\n{rules}COMMIT\n")
        assert datagrams(events) == 1


@in_own_namespace
def test_reading_and_failing_are_no_events() -> None:
    sh("iptables-nft -A INPUT -p tcp")
    with GenerationEvents() as events, NftablesReader() as reader:
        for line in ("iptables-nft -S", "iptables-nft-save", "nft list ruleset", "ipset create some hash:ip"):
            sh(line)
        assert subprocess.run(["iptables-nft", "-X", "NONE"], capture_output=True, check=False).returncode != 0
        reader.rules(V4, "filter", "INPUT")
        sh("iptables-legacy -A INPUT -p tcp")
        sh("iptables-nft -A INPUT -p udp")  # the only one to be heard
        assert datagrams(events) == 1


@in_own_namespace
def test_our_own_commit_is_known_by_port_and_sequence() -> None:
    with GenerationEvents() as events, socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as writer:
        writer.bind((0, 0))
        writer.send(batch(77, [(0xA00, NLM_F_CREATE, netfilter_body(2, text(1, "mine")))]))
        assert readable(events)
        (event,) = events.read().events
        assert (event.port_id, event.sequence, event.pid) == (writer.getsockname()[0], 77, os.getpid())


@in_own_namespace
def test_lost_events_are_reported_and_then_hearing_goes_on() -> None:
    with GenerationEvents() as events:
        raw = socket.socket(fileno=os.dup(events.fileno()))
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        for number in range(40):
            sh(f"nft add table ip t{number}")
        heard = events.read()
        assert heard.overflow
        assert len(heard.events) < 40
        sh("nft add table ip last")
        again = events.read()
        assert not again.overflow
        assert len(again.events) == 1
        raw.close()


@in_own_namespace
def test_no_packet_moves_a_digest() -> None:
    for family, tool, address in ((V4, "iptables-nft", "127.0.0.1"), (V6, "ip6tables-nft", "::1")):
        name = f"seen-{family}"
        argv(["ipset", "create", name, "hash:ip", "family", "inet" if family is V4 else "inet6"])
        for target in TARGETS:
            sh(f"{tool} -t mangle -A INPUT -j " + target.format(set=name))
        for match in MATCHES:
            sh(f"{tool} -A INPUT " + match.format(set=name))
        # Two readers: one doesn't read a generation twice.
        with NftablesReader() as reader, NftablesReader() as other:
            tables = ("filter", "mangle")
            before = [reader.rules(family, table, "INPUT") for table in tables]
            counters = argv([f"{tool}-save", "-c"])
            send_packets(100, address)
            assert argv([f"{tool}-save", "-c"]) != counters
            assert [other.rules(family, table, "INPUT") for table in tables] == before
            assert len(before[0] or ()) == len(MATCHES)


@in_own_namespace
def test_no_packet_moves_a_digest_of_nft_s_own_expressions() -> None:
    argv(
        ["nft", "-f", "-"],
        stdin="""
table ip native {
  set dyn { type ipv4_addr; flags dynamic; }
  quota named { 5000 bytes }
  chain out {
    type filter hook output priority 5;
    counter
    quota 1500 bytes counter
    quota over 100 mbytes
    limit rate 5/second
    ct count 20
    numgen inc mod 3 1
    add @dyn { ip saddr counter limit rate 4/second }
    quota name "named"
    ip saddr vmap { 127.0.0.1 : continue }
  }
}
""",
    )
    last = nested(1, text(1, "last"), nested(2))
    rule = netfilter_body(2, text(1, "native"), text(2, "out"), nested(4, last))
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as writer:
        writer.bind((0, 0))
        writer.send(batch(1, [(0xA06, NLM_F_CREATE | NLM_F_APPEND, rule)]))
    with NftablesReader() as reader:
        before = reader.rules(V4, "native", "out")
        assert len(before or ()) == 10
        text_before = sh("nft list table ip native")
        for size in (5, 100):  # the second lot uses the quotas up
            send_packets(size)
            with NftablesReader() as other:
                assert other.rules(V4, "native", "out") == before
        assert sh("nft list table ip native") != text_before


@in_own_namespace
def test_a_moved_or_reworded_rule_shows() -> None:
    restore("*filter\n-A INPUT -p tcp\n-A INPUT -p udp\n-A INPUT -p icmp\nCOMMIT\n")
    with NftablesReader() as reader:
        first, second, third = reader.rules(V4, "filter", "INPUT") or ()
        assert len({first.digest, second.digest, third.digest}) == 3
        restore("*filter\n-D INPUT -p tcp\n-A INPUT -p tcp\nCOMMIT\n")
        moved = reader.rules(V4, "filter", "INPUT") or ()
        assert [rule.digest for rule in moved] == [second.digest, third.digest, first.digest]
        assert moved[2].handle not in {first.handle, second.handle, third.handle}
        for other in ("-m mark --mark 1", "-m mark --mark 2", "-p tcp -m comment --comment x", "-p tcp -g LATER"):
            sh("iptables-nft -N LATER", check=False)
            sh(f"iptables-nft -R INPUT 1 {other}")
            now = reader.rules(V4, "filter", "INPUT") or ()
            assert now[0].digest not in {rule.digest for rule in moved}
            moved = now


@in_own_namespace
def test_a_comment_is_part_of_what_a_rule_says() -> None:
    sh("nft add table ip some")
    sh("nft add chain ip some c")
    for comment in ("one", "two", "one"):
        argv(["nft", "add", "rule", "ip", "some", "c", "counter", "comment", f'"{comment}"'])
    with NftablesReader() as reader:
        one, two, again = reader.rules(V4, "some", "c") or ()
        assert one.digest == again.digest != two.digest


@in_own_namespace
def test_jumps_are_read_with_their_targets() -> None:
    restore("*filter\n:MINE -\n-A INPUT -j MINE\n-A INPUT -p tcp -g MINE\n-A INPUT -j DROP\n-A INPUT -j LOG\nCOMMIT\n")
    with NftablesReader() as reader:
        assert [rule.jump for rule in reader.rules(V4, "filter", "INPUT") or ()] == ["MINE", "MINE", None, None]


@in_own_namespace
def test_a_missing_chain_is_not_an_empty_one() -> None:
    with NftablesReader() as reader:
        assert reader.rules(V4, "filter", "INPUT") is None
        assert reader.chains(V4, "filter") == ()
        restore("*filter\n:MINE -\nCOMMIT\n")
        assert reader.rules(V4, "filter", "MINE") == ()
        assert reader.rules(V4, "filter", "OTHER") is None
        assert reader.rules(V4, "nat", "MINE") is None
        assert reader.rules(V6, "filter", "MINE") is None
        assert reader.chain_exists(V4, "filter", "MINE")
        assert not reader.chain_exists(V6, "filter", "MINE")
        sh("iptables-nft -t nat -N THEIRS")
        assert "MINE" in reader.chains(V4, "filter")
        assert "THEIRS" not in reader.chains(V4, "filter")
        sh("iptables-nft -X MINE")
        assert reader.rules(V4, "filter", "MINE") is None


@pytest.mark.parametrize("count", [40, 2500])  # one datagram; many, and a commit that tidies up for long
@in_own_namespace
def test_a_read_never_mixes_two_rulesets_nor_loses_rules(count: int) -> None:
    states = [
        "*filter\n:BIG -\n-F BIG\n"
        + "".join(f"-A BIG -p {protocol} --dport {port}\n" for port in range(1, count + 1))
        + "COMMIT\n"
        for protocol in ("tcp", "udp")
    ]
    with NftablesReader() as reader:
        known = set()
        for script in states:
            restore(script)
            known.add(tuple(rule.digest for rule in reader.rules(V4, "filter", "BIG") or ()))
        assert len(known) == 2
        deadline = time.monotonic() + 2
        looks = 0
        while time.monotonic() < deadline:
            states.reverse()
            with subprocess.Popen(["iptables-nft-restore", "--noflush"], stdin=subprocess.PIPE, text=True) as writer:
                assert writer.stdin
                present = reader.generation()
                writer.stdin.write(states[0])
                writer.stdin.close()
                if looks % 3:  # be there the moment the commit counts, while it still tidies up
                    while reader.generation() == present and writer.poll() is None:
                        pass
                    with NftablesReader() if looks % 3 == 1 else nullcontext(reader) as fresh:
                        assert tuple(rule.digest for rule in fresh.rules(V4, "filter", "BIG") or ()) in known
                while writer.poll() is None:
                    assert tuple(rule.digest for rule in reader.rules(V4, "filter", "BIG") or ()) in known
                looks += 1
        assert looks > 2


@in_own_namespace
def test_a_rule_that_moves_up_in_one_transaction_is_always_somewhere() -> None:
    restore("*filter\n:MINE -\nCOMMIT\n" + "*filter\n-A FORWARD -p tcp\n-A FORWARD -j MINE\nCOMMIT\n")
    child = os.fork()
    if child == 0:
        try:
            for _ in range(250):
                restore("*filter\n-D FORWARD -j MINE\n-I FORWARD -j MINE\nCOMMIT\n")
        finally:
            os._exit(0)
    seen = set()
    with NftablesReader() as reader:
        for _ in range(2_000_000):
            seen.add(tuple(rule.jump for rule in reader.rules(V4, "filter", "FORWARD") or ()))
            if os.waitpid(child, os.WNOHANG) != (0, 0):
                break
    assert seen <= {("MINE", None), (None, "MINE")}


@in_own_namespace
def test_a_reader_that_has_missed_events_reads_on() -> None:
    restore("*filter\n-A FORWARD -p tcp\nCOMMIT\n")
    with NftablesReader() as reader:
        assert len(reader.rules(V4, "filter", "FORWARD") or ()) == 1
        raw = socket.socket(fileno=os.dup(reader._events.fileno()))
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        for _ in range(20):
            sh("iptables-nft -A FORWARD -p tcp")
        began = time.monotonic()
        assert len(reader.rules(V4, "filter", "FORWARD") or ()) == 21
        assert time.monotonic() - began < 0.5
        raw.close()


@in_own_namespace
def test_a_refusal_keeps_the_kernel_s_errno_and_the_socket_usable() -> None:
    with NetlinkSocket() as netlink:
        with pytest.raises(NetlinkError) as refusal:
            netlink.ask(0xA07, 0, netfilter_body(2, text(1, "none"), text(2, "none")), "look for nothing")
        assert refusal.value.errno == 2
        assert "look for nothing" in str(refusal.value)
        assert netlink.ask(0xA10, 0, netfilter_body(0), "generation")


def test_a_ruleset_that_never_stands_still_is_an_error_not_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(NetlinkSocket, "_ask_once", lambda *words: asked.append(words))
    with NetlinkSocket() as netlink, pytest.raises(NetlinkError, match="changed during each of"):
        netlink.ask(0xA07, NLM_F_DUMP, b"", "read")
    assert 1 < len(asked) < 100


def batch(sequence: int, messages: list[tuple[int, int, bytes]]) -> bytes:
    """A whole nf_tables transaction; its BEGIN carries the sequence number that the event shows."""
    frame = struct.pack(">BBH", 0, 0, 10)
    parts = [message(0x10, NLM_F_REQUEST, sequence, frame)]
    parts += [message(kind, NLM_F_REQUEST | flags, sequence, body) for kind, flags, body in messages]
    parts.append(message(0x11, NLM_F_REQUEST, sequence, frame))
    return b"".join(parts)


def test_messages_are_built_as_the_kernel_reads_them() -> None:
    assert attribute(1, b"abc") == b"\x07\x00\x01\x00abc\x00"
    assert nested(2, text(1, "ab")) == b"\x0c\x00\x02\x80\x07\x00\x01\x00ab\x00\x00"
    assert HEADER.unpack(message(5, NLM_F_ACK, 9, b"1234")[:16]) == (20, 5, NLM_F_ACK, 9, 0)
