"""What neighbours lose is told once, with who did it and the cure, and never what they do themselves on purpose."""

import errno
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from nodewalld.core.blame import Wake
from nodewalld.core.events import Culprit, Event, Kind, Process, Reason
from nodewalld.core.lifelines import KNOWN, PATIENCE, Jump, Ledger, keys
from nodewalld.core.words import Backend, Family, Table
from nodewalld.kernel.firewall import parse_tables
from nodewalld.kernel.jumps import JumpReader
from nodewalld.kernel.nftables import NetlinkError, NftablesReader
from nodewalld.service.state import StateFolder
from nodewalld.service.tenure import boot_id
from nodewalld.surroundings import Surroundings

WHEN = datetime(2026, 1, 2, 12, 3, 4, tzinfo=UTC)
FIREWALLD = Culprit(900, "iptables-restor", (Process(77, "firewalld"), Process(1, "systemd")))
DOCKERD = Culprit(901, "iptables", (Process(50, "dockerd"),))
NEIGHBOURS = re.compile(r"DOCKER|KUBE-|cali-|FLANNEL-|NETAVARK[-_](HOSTPORT|FORWARD)|CNI-(HOSTPORT|FORWARD)")
CAPTURES = sorted(Path(__file__).with_name("captures").glob("*.v4.*"))


def jump(table: Table, chain: str, target: str, family: Family = Family.IPV4, backend: Backend = Backend.NFT) -> Jump:
    return Jump(backend, family, table, chain, target)


PUBLISHED = jump(Table.NAT, "PREROUTING", "DOCKER")
USER = jump(Table.FILTER, "FORWARD", "DOCKER-USER")
OLD = jump(Table.FILTER, "FORWARD", "DOCKER")
NEW = jump(Table.FILTER, "FORWARD", "DOCKER-FORWARD")
KUBE = jump(Table.FILTER, "FORWARD", "KUBE-FORWARD")


class Watched:
    """A ledger and its clock; `sees` returns the sentences that are told."""

    def __init__(self) -> None:
        self.ledger, self.now = Ledger(), 1000.0

    def sees(self, *jumps: Jump, after: float = 0.0, by: tuple[Culprit, ...] = ()) -> list[str]:
        self.now += after
        wall = WHEN + timedelta(seconds=self.now - 1000)
        lost, healed = self.ledger.look(keys(jumps), by, self.now, wall, wall)
        return [*(each.what for each in lost), *healed]


@pytest.fixture
def watched() -> Watched:
    return Watched()


def test_a_lost_jump_is_told_once_with_culprit_and_cure_and_cleared_when_it_is_healed(watched: Watched) -> None:
    assert watched.sees(PUBLISHED, KUBE) == []
    assert watched.sees(KUBE, by=(FIREWALLD,)) == []
    assert watched.ledger.due == watched.now + PATIENCE
    assert watched.ledger.neighbours() == ()
    told = (
        "published ports of Docker are dead since 12:03:04 UTC, flushed by firewalld (pid 77): systemctl restart docker"
    )
    assert watched.sees(KUBE, after=PATIENCE) == [told]
    assert watched.ledger.due == float("inf")
    assert watched.sees(KUBE, after=3600) == []
    [lost] = watched.ledger.neighbours()
    assert (lost.what, lost.by, lost.jumps) == (told, FIREWALLD, ("nat PREROUTING -> DOCKER (ipv4, nft)",))
    assert watched.sees(PUBLISHED, KUBE, after=5) == ["the jumps of Docker stand again, after 60 min"]
    assert watched.ledger.neighbours() == ()


def test_who_moves_a_jump_of_its_own_is_not_accused(watched: Watched) -> None:
    watched.sees(USER)
    for _ in range(20):  # delete, then insert: milliseconds, however often
        assert watched.sees(by=(DOCKERD,)) == []
        assert watched.sees(USER, after=0.012) == []
    assert watched.sees(after=PATIENCE) == []
    assert watched.sees(USER, after=PATIENCE - 0.1) == []
    assert watched.ledger.neighbours() == ()


def test_what_its_owner_has_taken_out_is_not_lost(watched: Watched) -> None:
    watched.sees(PUBLISHED, KUBE)
    watched.sees(KUBE, by=(DOCKERD,))
    assert watched.sees(KUBE, after=PATIENCE) == []
    assert watched.ledger.neighbours() == ()


def test_what_was_never_seen_is_not_missed(watched: Watched) -> None:
    assert watched.sees() == []
    assert watched.sees(after=PATIENCE) == []


def test_a_version_that_names_its_chain_otherwise_has_lost_nothing(watched: Watched) -> None:
    watched.sees(OLD, USER)
    watched.sees(NEW, USER)
    assert watched.sees(NEW, USER, after=PATIENCE) == []


def test_what_moved_to_the_other_backend_is_not_lost_but_what_is_stale_there_hides_nothing(watched: Watched) -> None:
    legacy = PUBLISHED._replace(backend=Backend.LEGACY)
    watched.sees(legacy)
    watched.sees(legacy, PUBLISHED)
    watched.sees(PUBLISHED)
    assert watched.sees(PUBLISHED, after=PATIENCE) == []
    stale = Watched()
    stale.sees(legacy)
    stale.sees(legacy, PUBLISHED)
    stale.sees(legacy)
    assert len(stale.sees(legacy, after=PATIENCE)) == 1


def test_on_legacy_nobody_is_named(watched: Watched) -> None:
    watched.sees(PUBLISHED._replace(backend=Backend.LEGACY))
    watched.sees(by=(FIREWALLD,))
    [told] = watched.sees(after=PATIENCE)
    assert "flushed" not in told


def test_each_neighbour_is_told_of_by_itself_and_the_family_when_the_other_one_is_well(watched: Watched) -> None:
    other = PUBLISHED._replace(family=Family.IPV6)
    watched.sees(PUBLISHED, other, KUBE)
    watched.sees(other)
    docker, kube = watched.sees(other, after=PATIENCE)
    assert docker.startswith("published ports of Docker (IPv4) are dead")
    assert kube.startswith("forwards to pods of kube-proxy are dead")
    assert watched.sees(after=1) == []
    assert watched.sees(after=PATIENCE) == []  # more of the same neighbour: in status, and no second event
    assert watched.ledger.neighbours()[0].what.startswith("published ports of Docker are dead since 12:03:04")


def test_the_event_names_the_culprit_once() -> None:
    event = Event(time=WHEN, kind=Kind.NEIGHBOUR, what="x is dead, flushed by firewalld (pid 77)", by=FIREWALLD)
    assert event.sentence() == "X is dead, flushed by firewalld (pid 77)"
    assert event.kind.level == "warning"


def standing(capture: Path) -> Iterator[Jump]:
    for table, chains in parse_tables(capture.read_text()).items():
        for chain in table.builtin_chains:
            yield from (jump(table, chain, rule.target) for rule in chains.get(chain, ()) if rule.target)


@pytest.mark.parametrize("capture", CAPTURES, ids=lambda path: path.name)
def test_every_jump_that_a_real_neighbour_wrote_is_known(capture: Path) -> None:
    for one in standing(capture):
        if NEIGHBOURS.match(one.target):
            assert keys([one]), one


def test_names_by_which_lifelines_are_remembered_are_their_own() -> None:
    assert len({line.name for line in KNOWN}) == len(KNOWN)
    assert len({line.owner for line in KNOWN}) == len({line.owner.name for line in KNOWN})


class Reader:
    """A kernel with these jumps."""

    jumps: tuple[Jump, ...] = (PUBLISHED,)

    def rules(self) -> frozenset[Jump]:
        return frozenset(self.jumps)


BASH, KUBE_PROXY = (
    Culprit(8, "iptables", (Process(7, "bash"),)),
    Culprit(9, "iptables-restor", (Process(6, "kube-proxy"),)),
)
FLUSHED = Event(time=WHEN, kind=Kind.REPAIR, what="x", reason=Reason.FLUSHED, by=FIREWALLD)


@pytest.mark.parametrize(
    ("strangers", "wakes", "repairs", "named"),
    [
        ((BASH, BASH), (), (), "bash"),
        ((), (BASH,), (), "bash"),
        ((BASH, KUBE_PROXY), (), (), None),
        ((BASH,), (KUBE_PROXY,), (), None),
        (None, (), (), None),
        ((BASH,), (BASH,) * 40, (), None),
        ((BASH, KUBE_PROXY), (KUBE_PROXY,), (FLUSHED,), "firewalld"),
        ((), (), (), None),
    ],
)
def test_who_flushed_is_named_only_beyond_doubt(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    strangers: tuple[Culprit, ...] | None,
    wakes: tuple[Culprit, ...],
    repairs: tuple[Event, ...],
    named: str | None,
) -> None:
    monkeypatch.setattr("nodewalld.surroundings.JumpReader", Reader)
    monkeypatch.setattr(Reader, "jumps", (PUBLISHED,))
    told: list[Event] = []
    heard = iter([(KUBE_PROXY,), strangers, ()])
    now = iter(range(0, 1000, 10))
    around = Surroundings(StateFolder(tmp_path), told.append, lambda: next(heard), lambda: float(next(now)))
    around.look(None)
    monkeypatch.setattr(Reader, "jumps", ())
    for who in wakes:
        around.woken(Wake(0.0, who=lambda who=who: (who,)), ())
    around.woken(Wake(0.0), repairs)
    around.look(None)
    around.look(None)
    [event] = told
    assert (event.by and event.by.name) == named
    assert ("flushed by" in event.what) == (named is not None)


def test_a_kernel_without_nf_tables_has_no_jumps_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_reader: object) -> int:
        raise NetlinkError(errno.EINVAL, "read the nf_tables generation")  # nfnetlink.c: no such subsystem

    monkeypatch.setattr(NftablesReader, "generation", refuse)
    assert JumpReader()._nft() == ()


def surroundings(folder: Path) -> Surroundings:
    return Surroundings(StateFolder(folder), lambda _event: None, lambda: ())


@pytest.mark.parametrize(
    "stored",
    [
        '{"boot": "BOOT", "seen": 7, "lost": {"a": 1}}',
        '{"boot": "BOOT", "seen": [[DOCKER, 1]], "lost": [["nft"], [1, 2, 3], [[]]]}',
        '{"boot": "BOOT", "seen": [["x", "y", "z"], [[], {}, 1]], "lost": [["nft", "ipv4", "?", "soon", [[]]]]}',
        '{"boot": "other", "seen": [[DOCKER, 1]], "lost": [[DOCKER, "2026-01-02T12:03:04Z", []]]}',
        "[1]",
    ],
)
def test_what_is_remembered_of_another_boot_or_damaged_is_not_missed(tmp_path: Path, stored: str) -> None:
    text = stored.replace("DOCKER,", '"nft", "ipv4", "nat PREROUTING DOCKER",').replace("BOOT", boot_id())
    (tmp_path / "neighbours.json").write_text(text)
    assert surroundings(tmp_path).neighbours == ()
