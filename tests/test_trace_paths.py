"""From packets' bytes and the kernel's messages to paths and stories: pure, and right whatever comes."""

import struct
from dataclasses import replace
from datetime import UTC, datetime
from ipaddress import ip_address, ip_network

import pytest
from fake_table import FakeTable
from hypothesis import given
from hypothesis import strategies as st

from nodewalld.core.config import Anchor, AnchorKind, Place, Position
from nodewalld.core.desired import DesiredTable, Line, OwnChain, Placement
from nodewalld.core.observed import Learned
from nodewalld.core.plan import plan
from nodewalld.core.ruletext import Rule, join
from nodewalld.core.tracing.header import Header, parse
from nodewalld.core.tracing.path import QUIET, Kind, Path, Paths, Sighting, Spot
from nodewalld.core.tracing.story import Said, Story, tell
from nodewalld.core.tracing.traffic import Traffic, left_by, word_of
from nodewalld.core.words import Backend, Family, Table

UNTIL = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
TRACE_RULE = join(Traffic("tcp").rule(Family.IPV4, word_of(4000000000, "nf_log_ipv4"), UNTIL))


def ip(source: str, destination: str, protocol: int, rest: bytes, identity: int = 7) -> bytes:
    """A packet, in the family of its addresses."""
    ends = ip_address(source).packed + ip_address(destination).packed
    if ":" in source:
        return struct.pack(">IHBB", 6 << 28 | identity, len(rest), protocol, 64) + ends + rest
    return struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(rest), identity, 0, 64, protocol, 0) + ends + rest


def tcp(sport: int, dport: int, flags: int = 2, sequence: int = 1) -> bytes:
    return struct.pack(">HHIIBBHHH", sport, dport, sequence, 0, 5 << 4, flags, 0, 0, 0)


def header(destination: str = "10.0.0.1", dport: int = 31002, identity: int = 7) -> Header:
    found = parse(ip("192.0.2.1", destination, 6, tcp(4000, dport), identity))
    assert found
    return found


def spot(table: str, chain: str, kind: Kind = Kind.POLICY, backend: Backend = Backend.NFT, number: int = 0) -> Spot:
    return Spot(backend, "ip", table, chain, kind, number)


START = spot("start", "PREROUTING", Kind.RULE, number=2)


def followed(paths: Paths, *sightings: Sighting) -> list[Path]:
    for sighting in sightings:
        paths.add(sighting, 0.0)
    return list(paths.done(QUIET))


def chains(path: Path) -> list[str]:
    return [f"{sighting.spot.table} {sighting.spot.chain}" for sighting in path.sightings]


@pytest.mark.parametrize(
    ("packet", "line"),
    [
        (ip("192.0.2.1", "10.0.0.1", 6, tcp(1, 2, 0x12)), "tcp 192.0.2.1:1 -> 10.0.0.1:2 SYN ACK"),
        (ip("2001:db8::1", "fd00::1", 6, tcp(1, 2)), "tcp [2001:db8::1]:1 -> [fd00::1]:2 SYN"),
        (ip("192.0.2.1", "10.0.0.1", 17, struct.pack(">HHHH", 5, 53, 8, 0)), "udp 192.0.2.1:5 -> 10.0.0.1:53"),
        (ip("192.0.2.1", "10.0.0.1", 1, bytes([8, 0, 0, 0, 1, 2, 3, 4])), "icmp 192.0.2.1 -> 10.0.0.1 echo request"),
        (ip("fd00::1", "fd00::2", 58, bytes([1, 4, 0, 0, 0, 0, 0, 0])), "icmpv6 fd00::1 -> fd00::2 type 1 code 4"),
        (ip("fd00::1", "fd00::2", 0, bytes([6, 0, *range(6)]) + tcp(1, 2)), "tcp [fd00::1]:1 -> [fd00::2]:2 SYN"),
        (ip("192.0.2.1", "10.0.0.1", 99, b""), "protocol 99 192.0.2.1 -> 10.0.0.1"),
        (ip("192.0.2.1", "10.0.0.1", 6, b"\0\1"), "tcp 192.0.2.1 -> 10.0.0.1"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,
)
def test_a_packet_is_said_in_one_line(packet: bytes, line: str) -> None:
    found = parse(packet)
    assert found
    assert found.line == line


@given(st.binary(max_size=120), st.none() | st.binary(max_size=24))
def test_any_bytes_have_an_answer(packet: bytes, transport: bytes | None) -> None:
    found = parse(packet, transport)
    assert (found is not None) == (packet[:1] != b"" and {4: 20, 6: 40}.get(packet[0] >> 4, 999) <= len(packet))


def test_a_packet_is_known_again_behind_every_nat_and_others_are_not_taken_for_it() -> None:
    key = header().key
    nat = parse(ip("10.0.0.9", "10.42.0.2", 6, tcp(61000, 8200)))
    assert nat
    assert nat.key == key
    others = [
        ip("192.0.2.1", "10.0.0.1", 6, tcp(4000, 31002), 8),
        ip("192.0.2.1", "10.0.0.1", 6, tcp(4000, 31002, 2, 2)),
    ]
    assert all(found and found.key != key for found in map(parse, others))


def test_packets_are_told_apart_and_put_together_across_a_nat() -> None:
    one, two = header(), header(identity=8)
    paths = followed(
        Paths("PREROUTING", "start"),
        Sighting(START, Family.IPV4, one, identity=1),
        Sighting(START, Family.IPV4, two, identity=2),
        Sighting(spot("nat", "PREROUTING"), Family.IPV4, one, identity=1),
        Sighting(spot("nat", "KUBE-SERVICES"), Family.IPV4, None, identity=1),
        Sighting(spot("nat", "PREROUTING"), Family.IPV4, two, identity=2),
        Sighting(spot("filter", "FORWARD"), Family.IPV4, header("10.42.0.2", 8200), identity=3),
        Sighting(spot("filter", "cali-FORWARD"), Family.IPV4, None, identity=3),
    )
    assert [chains(path) for path in paths] == [
        ["nat PREROUTING", "nat KUBE-SERVICES", "filter FORWARD", "filter cali-FORWARD"],
        ["nat PREROUTING"],
    ]


@pytest.mark.parametrize("backend", Backend)
def test_two_packets_that_are_exactly_alike_are_two(backend: Backend) -> None:
    start = "start" if backend is Backend.NFT else ""
    places = [
        ("raw", "OUTPUT"),
        ("raw", "x"),
        ("raw", "OUTPUT"),
        ("filter", "OUTPUT"),
    ]
    spots = [START] * bool(start) + [spot(*place, backend=backend) for place in places]
    one = [Sighting(each, Family.IPV4, header(), identity=1) for each in spots]
    assert [len(path.sightings) for path in followed(Paths("OUTPUT", start), *one, *one)] == [4, 4]


def test_what_others_trace_is_not_shown() -> None:
    """Such packets meet the end of our chain, but not our rule."""
    theirs = [replace(START, kind=kind, number=0) for kind in (Kind.RETURN, Kind.POLICY)]
    seen = [Sighting(each, Family.IPV4, header(), identity=1) for each in (*theirs, spot("filter", "INPUT"))]
    assert followed(Paths("PREROUTING", "start"), *seen) == []
    assert followed(Paths("OUTPUT", "start"), Sighting(spot("raw", "OUTPUT"), Family.IPV4, header(), identity=1)) == []
    assert followed(Paths("OUTPUT"), Sighting(spot("raw", "OUTPUT"), Family.IPV4, None)) == []


def test_a_path_ends_with_a_drop_or_when_it_is_quiet_and_is_told_once() -> None:
    paths = Paths("OUTPUT")
    assert paths.due == float("inf")
    paths.add(Sighting(spot("raw", "OUTPUT"), Family.IPV4, header()), 1.0)
    assert (paths.due, list(paths.done(1.0))) == (1.0 + QUIET, [])
    paths.add(Sighting(spot("filter", "OUTPUT"), Family.IPV4, header(), "drop"), 1.1)
    assert paths.due == 1.1
    assert [chains(path) for path in paths.done(1.1)] == [["raw OUTPUT", "filter OUTPUT"]]
    assert list(paths.done(9.0, all_of_them=True)) == []


def test_the_end_of_a_base_chain_is_told_once_by_its_policy() -> None:
    ended = [spot("nat", "OUTPUT", Kind.RETURN), spot("nat", "OUTPUT", Kind.POLICY)]
    others = [spot("filter", "a", Kind.RETURN), spot("filter", "OUTPUT", Kind.RETURN), spot("filter", "OUTPUT")]
    seen = [Sighting(each, Family.IPV4, header()) for each in (*ended, *others)]
    (path,) = followed(Paths("OUTPUT"), *seen)
    assert [sighting.spot for sighting in path.sightings] == [ended[1], others[0], others[2]]


@pytest.mark.parametrize("order", [(Backend.NFT, Backend.LEGACY), (Backend.LEGACY, Backend.NFT)])
def test_what_two_backends_tell_is_put_in_the_order_of_the_hooks(order: tuple[Backend, Backend]) -> None:
    told = {
        Backend.NFT: [
            ("raw", "PREROUTING"),
            ("raw", "a"),
            ("nat", "PREROUTING"),
            ("filter", "INPUT"),
            ("theirs", "in"),
        ],
        Backend.LEGACY: [
            ("raw", "PREROUTING"),
            ("mangle", "PREROUTING"),
            ("mangle", "b"),
            ("security", "INPUT"),
            ("nat", "INPUT"),
        ],
    }
    seen = [Sighting(spot(*place, backend=b), Family.IPV4, header()) for b in order for place in told[b]]
    (path,) = followed(Paths("PREROUTING"), *seen)
    assert chains(path) == [
        "raw PREROUTING",
        "raw a",
        "raw PREROUTING",
        "mangle PREROUTING",
        "mangle b",
        "nat PREROUTING",
        "filter INPUT",
        "theirs in",
        "security INPUT",
        "nat INPUT",
    ]


def story(*steps: tuple[Sighting, Said]) -> Story:
    path = Path(0.0, 0.0, header(), "eth0", [sighting for sighting, _ in steps])
    return tell(path, [said for _, said in steps])


@pytest.mark.parametrize(
    ("table", "chain", "said", "going", "outcome"),
    [
        (
            "filter",
            "INPUT",
            Said('-m comment --comment "nodewalld:port/a" -j DROP', 1),
            "",
            "dropped by port/a, in filter INPUT",
        ),
        ("filter", "INPUT", Said("-j REJECT --reject-with tcp-reset", 1), "", "dropped in filter INPUT"),
        (
            "filter",
            "FORWARD",
            Said(policy="drop", kind=Kind.POLICY),
            "eth1",
            "dropped by the policy, in filter FORWARD",
        ),
        ("filter", "INPUT", Said(policy="accept", kind=Kind.POLICY), "", "delivered to this node"),
        ("filter", "FORWARD", Said("-j ACCEPT", 3), "eth1", "sent out by eth1"),
        ("mangle", "POSTROUTING", Said(policy="accept", kind=Kind.POLICY), "eth1", "sent out by eth1"),
        ("filter", "OUTPUT", Said("-j ACCEPT", 3), "lo", "sent; no rule has seen it after filter OUTPUT"),
        ("raw", "PREROUTING", Said("-j NOTRACK", 1), "", "not seen again after raw PREROUTING"),
    ],
)
def test_the_outcome_is_told_in_words(table: str, chain: str, said: Said, going: str, outcome: str) -> None:
    seen = Sighting(spot(table, chain, backend=Backend.LEGACY), Family.IPV4, header(), "", "eth0", going)
    assert story((seen, said)).outcome == outcome


def test_marks_are_told_with_the_rule_that_made_them_in_either_backend() -> None:
    mark = Said("-j MARK --set-xmark 0x4000/0x4000", 1)
    for backend, marks in ((Backend.NFT, (0, 4, 4)), (Backend.LEGACY, (0, 0, 4))):
        places = [
            spot("mangle", "OUTPUT", backend=backend),
            spot("nat", "m", backend=backend),
            spot("nat", "OUTPUT", backend=backend),
        ]
        seen = [Sighting(place, Family.IPV4, header(), mark=value) for place, value in zip(places, marks, strict=True)]
        told = story(*zip(seen, (Said("x"), mark, Said("y")), strict=True))
        assert [step.mark for step in told.steps] == [None, 4, None]


def test_changes_of_a_packet_are_told_where_they_are_seen_and_a_traces_own_rule_is_not() -> None:
    seen = [
        Sighting(spot("raw", "PREROUTING"), Family.IPV4, header(), coming="eth0"),
        Sighting(spot("nat", "PREROUTING"), Family.IPV4, header(), coming="eth0"),
        Sighting(spot("filter", "FORWARD"), Family.IPV4, header("10.42.0.2", 8200), coming="eth0", going="cni0"),
        Sighting(spot("filter", "x"), Family.IPV4, None),
    ]
    told = story(*zip(seen, (Said(TRACE_RULE, 1), Said("-j DNAT"), Said("-j x"), Said("-j ACCEPT")), strict=True))
    assert [step.rule for step in told.steps] == ["-j DNAT", "-j x", "-j ACCEPT"]
    assert [step.packet and step.packet.line for step in told.steps] == [
        None,
        "tcp 192.0.2.1:4000 -> 10.42.0.2:8200",
        None,
    ]
    assert [(step.coming, step.going) for step in told.steps] == [("", ""), ("", "cni0"), ("", "")]


def test_a_traces_rule_says_how_to_undo_it() -> None:
    rule = Rule(TRACE_RULE)
    assert rule.target == "TRACE"
    assert left_by(rule.tag) == (4000000000, "nf_log_ipv4")
    assert [left_by(tag) for tag in ("port/a", "trace/x/NONE", "trace/1", "trace/1/2/3", "")] == [None] * 5
    asked = Traffic("icmp", None, ip_network("fd00::/8"), None, "eth+")
    assert asked.families == (Family.IPV6,)
    assert join(asked.rule(Family.IPV6, "1/-", UNTIL)).startswith(
        "-s fd00::/8 -i eth+ -p ipv6-icmp -m time --datestop 2026-01-02T03:04:05 "
    )


@given(
    st.lists(st.sampled_from(["trace", "ours", "-j A", "-j B", "-j C"]), max_size=7),
    st.sampled_from(["first", "early", "last", "between"]),
)
def test_a_traces_rule_is_neither_foreign_nor_ours_to_a_plan(rules: list[str], place: str) -> None:
    """The plan with such rules in the chain is the plan without, and when it is done there is nothing to do."""
    between = Position(Place.BETWEEN, after=(Anchor(AnchorKind.TARGET, "A"),), before=(Anchor(AnchorKind.TARGET, "B"),))
    position = between if place == "between" else Position(Place(place))
    jump = '-m comment --comment "nodewalld:at/x" -j NODEWALL-x'
    placed = Placement("PREROUTING", position, (0, 0), "at/x", jump, ("rule/x",))
    desired = DesiredTable((OwnChain("NODEWALL-x", (Line("rule/x", "-j DROP"),)),), (placed,))
    written = {"trace": TRACE_RULE, "ours": jump}

    def settled(kept: list[str]) -> list[str]:
        table = FakeTable(Table.RAW, {"PREROUTING": [written.get(rule, rule) for rule in kept]})
        for _ in range(2):
            planned = plan(Family.IPV4, Table.RAW, desired, table.observed(), Learned())
            table.commit(planned.script)
        assert plan(Family.IPV4, Table.RAW, desired, table.observed(), Learned()).commands == ()
        return table.chains["PREROUTING"]

    after = settled(rules)
    assert after.count(TRACE_RULE) == rules.count("trace")
    assert [rule for rule in after if rule != TRACE_RULE] == settled([rule for rule in rules if rule != "trace"])
