"""A burst is answered move by move; a war is slowed down, never given up, and forgotten when it is over."""

from dataclasses import dataclass, field
from datetime import UTC, datetime

import pytest

from nodewalld.core.blame import contended, contention_events, suspects
from nodewalld.core.events import Contention, Culprit, Kind, Process, Reason
from nodewalld.core.pacing import FIRST_WAIT, LAST_WAIT, QUIET, ROUNDS, STUBBORN, Contest, Pacer, taken
from nodewalld.core.plan import Change
from nodewalld.core.ruletext import Rule
from nodewalld.core.words import Family, Table

FORWARD = (Table.FILTER, "FORWARD")
CALI, KUBE, DOCKER, STAGE = "-j cali-FORWARD", "-j KUBE-FORWARD", "-j DOCKER-USER", "-j DOCKER-ISOLATION-STAGE-1"
OURS = '-m comment --comment "nodewalld:at/first" -j NODEWALL-FORWARD'
YIELD = ("cali-*", "KUBE-ROUTER-*")


def culprit(pid: int, *parents: tuple[int, str], comm: str = "iptables-nft-re") -> Culprit:
    return Culprit(pid, comm, tuple(Process(*parent) for parent in parents))


@dataclass
class Chain:
    """A chain in which our jump wants to be first, and a clock."""

    rules: list[str]
    pacer: Pacer = field(default_factory=Pacer)
    now: float = 1000.0
    waited: list[float] = field(default_factory=list)
    pid: int = 100

    def __post_init__(self) -> None:
        self.rules.insert(0, OURS)

    def see(self) -> float:
        """What the guard does at each look: nothing, wait (the seconds are returned), or move ours back."""
        takers = self.rules[: self.rules.index(OURS)]
        wait = self.pacer.look(FORWARD, map(Rule, self.rules), takers or None, self.now)
        if takers and not wait:
            self.pacer.moved(FORWARD, map(Rule, self.rules), takers, self.now)
            self.rules.remove(OURS)
            self.rules.insert(0, OURS)
        return wait

    def settle(self) -> None:
        """See, and wait as long as it takes."""
        if wait := self.see():
            self.now += wait
            assert not self.see()
        self.waited.append(wait)

    def delete(self, rule: str) -> None:
        self.rules.remove(rule)

    def insert(self, rule: str) -> None:
        self.rules.insert(0, rule)

    def retake(self, rule: str = CALI, after: float = 1.0, program: int = 7) -> None:
        """As Felix does it: delete and insert in one transaction."""
        self.now += after
        self.pid += 1
        self.delete(rule)
        self.insert(rule)
        self.settle()
        self.pacer.blame(FORWARD, (culprit(self.pid, (program, "calico-node")),))

    @property
    def contests(self) -> tuple[Contest, ...]:
        return self.pacer.contests(self.now)


def calico() -> Chain:
    return Chain([CALI, KUBE])


# --- wars


def test_three_answers_in_a_row_are_contention_and_then_waits_double_up_to_a_limit() -> None:
    chain = calico()
    for _ in range(ROUNDS):
        assert not chain.contests
        chain.retake()
    (contest,) = chain.contests
    assert (contest.takers, contest.rounds, contest.wait, contest.slowed) == ((CALI,), ROUNDS, FIRST_WAIT, False)
    assert contest.by
    assert contest.by.name == "calico-node"
    for _ in range(20):
        chain.retake(after=0.1)
    doubled = [min(FIRST_WAIT * 2**n, LAST_WAIT) for n in range(20)]
    assert chain.waited == pytest.approx([0.0] * ROUNDS + [wait - 0.1 for wait in doubled])
    assert chain.contests[0].wait == LAST_WAIT
    assert chain.contests[0].slowed


def test_after_ten_minutes_of_war_there_is_less_than_one_answer_a_minute() -> None:
    chain = calico()
    written = 0
    while chain.now < 1600:
        chain.retake(after=0.1)
    while chain.now < 2200:
        chain.retake(after=0.1)
        written += 1
    assert written < 10


def test_a_slow_war_is_told_though_nothing_need_wait() -> None:
    """Felix at its refresh, every 180 s."""
    chain = calico()
    for _ in range(10):
        chain.retake(after=180.0)
    (contest,) = chain.contests
    assert not contest.slowed
    assert not any(chain.waited)
    assert chain.pacer.over(chain.now) > chain.now + 180


def test_of_two_that_fight_each_other_as_well_each_is_slowed_in_the_end() -> None:
    chain = calico()
    for _ in range(STUBBORN):
        chain.retake(CALI)
        chain.retake(KUBE)
    assert {contest.takers for contest in chain.contests} == {(CALI,), (KUBE,)}
    for _ in range(12):
        chain.retake(CALI, after=0.1)
        chain.retake(KUBE, after=0.1)
    assert chain.waited[-1] > 30


def test_who_deletes_and_inserts_in_two_transactions_again_and_again_is_slowed_in_the_end() -> None:
    chain = calico()
    for _ in range(STUBBORN + 12):
        chain.delete(CALI)
        chain.see()
        chain.insert(CALI)
        chain.settle()
        chain.now += 1.0
    (contest,) = chain.contests
    assert contest.rounds == STUBBORN + 12
    assert chain.waited[:STUBBORN] == [0.0] * STUBBORN
    assert chain.waited[-1] > 30


def test_an_unknown_program_is_fought_like_a_known_one() -> None:
    """Legacy names nobody; nft only the tool, when its parents had gone."""
    chain = calico()
    for _ in range(ROUNDS):
        chain.now += 1.0
        chain.delete(CALI)
        chain.insert(CALI)
        chain.settle()
        chain.pacer.blame(FORWARD, (culprit(chain.pid),))
        chain.pid += 1
    (contest,) = chain.contests
    assert contest.by
    assert contest.by.comm == "iptables-nft-re"


def test_a_program_that_is_restarted_goes_on_with_its_war() -> None:
    chain = calico()
    for _ in range(6):
        chain.retake(after=0.1)
    before = chain.contests[0].wait
    for _ in range(2):
        chain.retake(after=0.1, program=8)
    assert chain.contests[0].wait == before * 4


# --- bursts


def docker_restarts(chain: Chain) -> None:
    """Its jumps come anew one by one, each deleted and inserted."""
    for rule in (STAGE, DOCKER):
        chain.now += 0.05
        chain.delete(rule)
        chain.see()
        chain.now += 0.01
        chain.insert(rule)
        chain.settle()


def test_many_restarts_of_docker_in_a_row_are_answered_at_once() -> None:
    chain = Chain([DOCKER, STAGE, KUBE])
    for _ in range(STUBBORN - 1):
        chain.now += 2.0
        docker_restarts(chain)
    assert not chain.contests
    assert not any(chain.waited)


def test_restarts_that_are_seen_only_as_a_whole_are_known_by_their_program() -> None:
    chain = Chain([DOCKER, KUBE])
    for restart in range(STUBBORN - 1):
        chain.retake(DOCKER, after=2.0, program=restart)
    assert not chain.contests
    assert not any(chain.waited)


def test_rules_that_come_and_go_are_no_war() -> None:
    chain = Chain([KUBE])
    for _ in range(100):
        chain.now += 0.1
        chain.insert("-j ACCEPT")
        chain.settle()
        chain.delete("-j ACCEPT")
        chain.see()
    assert not chain.contests
    assert not any(chain.waited)


@pytest.mark.parametrize("what", ["another rule", "the same again", "it has gone"])
def test_who_moves_while_we_wait_has_not_answered_us(what: str) -> None:
    """Whoever has won a war is quiet. All else is a disturbance of its own, and put right at once."""
    chain = calico()
    for _ in range(8):
        chain.retake(after=0.1)
    assert chain.waited[-1] > 2
    chain.delete(CALI)
    chain.insert(CALI)
    assert chain.see() > 5
    if what == "another rule":
        chain.insert(DOCKER)
    elif what == "it has gone":
        chain.delete(CALI)
        chain.insert(KUBE)
    else:
        chain.delete(CALI)
        chain.see()
        chain.insert(CALI)
    assert chain.see() == 0.0
    assert chain.rules[0] == OURS


def test_who_goes_on_while_we_wait_is_answered_at_once_until_it_answers_us_again() -> None:
    chain = calico()
    for _ in range(8):
        chain.retake(after=0.1)
    chain.delete(CALI)
    chain.insert(CALI)
    assert chain.see() > 5
    chain.delete(CALI)
    chain.see()
    chain.insert(CALI)
    chain.see()
    (contest,) = chain.contests
    assert (contest.wait, contest.slowed) == (0.0, False)
    chain.waited.clear()
    for _ in range(ROUNDS):  # the take that went before is the first of them
        chain.retake(after=0.1)
    assert chain.waited == pytest.approx([0.0] * (ROUNDS - 1) + [FIRST_WAIT - 0.1])


def test_a_node_that_makes_networks_all_day_is_told_of_and_never_waits() -> None:
    chain = Chain([DOCKER, STAGE, KUBE])
    for number in range(200):
        chain.now += 4.0
        chain.insert(f"-o br-{number} -j ACCEPT")
        chain.settle()
        docker_restarts(chain)
    assert {contest.takers for contest in chain.contests} == {(DOCKER,), (STAGE,)}
    assert not any(chain.waited)


# --- what is gone


def test_what_is_taken_out_again_and_again_is_put_back_at_once_and_told() -> None:
    pacer, now = Pacer(), 1000.0
    rules = [Rule(KUBE)]
    for _ in range(STUBBORN * 2):
        now += 1.0
        assert pacer.look(FORWARD, rules, (), now) == 0.0
        pacer.moved(FORWARD, rules, (), now)
    (contest,) = pacer.contests(now)
    assert (contest.takers, contest.wait, contest.rounds) == ((), 0.0, STUBBORN * 2)


def test_places_are_told_by_chain_and_not_for_chains_of_ours() -> None:
    changes = (
        Change("FORWARD", Reason.DISPLACED, "", "", (), (CALI,)),
        Change("FORWARD", Reason.DISPLACED, "", "", (), (CALI, KUBE)),
        Change("INPUT", Reason.FLUSHED, "", ""),
        Change("OUTPUT", Reason.CHANGED, "", ""),
        Change("NODEWALL-FORWARD", Reason.MISSING, "", ""),
    )
    assert taken(changes) == {"FORWARD": (CALI, KUBE), "INPUT": ()}


# --- peace


def test_peace_is_recognised_by_itself() -> None:
    chain = calico()
    for _ in range(ROUNDS):
        chain.retake()
    over = chain.pacer.over(chain.now)
    assert over == chain.now + QUIET + FIRST_WAIT
    chain.now = over - 0.1
    assert chain.contests
    chain.now = over
    assert not chain.contests
    assert chain.pacer.over(chain.now) == float("inf")
    chain.retake()
    assert chain.waited[-1] == 0.0


def test_who_comes_back_is_met_at_the_pace_that_it_had() -> None:
    chain = calico()
    for _ in range(8):
        chain.retake(after=0.1)
    pace = chain.contests[0].wait
    chain.now = chain.pacer.over(chain.now)
    assert not chain.contests
    chain.retake(after=60.0)
    assert chain.waited[-1] == 0.0
    assert chain.contests[0].wait == pace * 2
    assert chain.contests[0].rounds == 1
    chain.now += 599.0
    assert not chain.contests
    chain.retake(after=3.0)
    assert not chain.contests


def test_a_wish_for_another_place_ends_it() -> None:
    chain = calico()
    for _ in range(ROUNDS):
        chain.retake()
    chain.pacer.forget(Table.NAT)
    assert chain.contests
    chain.pacer.forget(Table.FILTER)
    assert not chain.contests


def test_one_chain_s_war_does_not_slow_another() -> None:
    chain = calico()
    for _ in range(ROUNDS * 2):
        chain.retake(after=0.1)
    assert chain.pacer.look((Table.FILTER, "INPUT"), [Rule(CALI)], (CALI,), chain.now) == 0.0


def test_little_is_remembered() -> None:
    chain = Chain([KUBE])
    for number in range(500):
        chain.now += 1.0
        chain.insert(f"-p tcp --dport {number} -j ACCEPT")
        chain.settle()
        chain.delete(f"-p tcp --dport {number} -j ACCEPT")
    assert len(chain.pacer._chains[FORWARD].opponents) <= 8
    chain.now += 3600
    assert not chain.contests
    assert not chain.pacer.watched(Table.FILTER)


# --- words


def contest(taker: str = CALI, table: Table = Table.FILTER, *, slowed: bool = True) -> Contest:
    by = culprit(9, (7, "calico-node"))
    return Contest(table, "FORWARD", (taker,) if taker else (), by, 12, 1000.0, 1040.0, 16.0, slowed)


@pytest.mark.parametrize(
    ("of", "words"),
    [
        (
            contest(),
            (
                "filter FORWARD (IPv4): calico-node puts the jump to cali-FORWARD in the place of our jump again and "
                "again, 12 times in 40.0 s; ours is put back at most every 16 s. What would end it: "
                'position = "early", or ChainInsertMode: Append in Calico\'s FelixConfiguration, '
                "or a rule in mangle instead"
            ),
        ),
        (contest(DOCKER, Table.NAT), 'What would end it: position = "early" with "DOCKER-USER" in daemon.yield_to'),
        (contest("-p tcp -j ACCEPT"), "puts a rule in the place"),
        (contest("-p tcp -j ACCEPT"), "What would end it: another position, or a rule in mangle instead"),
        (contest(slowed=False), "ours is put back at once."),
        (contest(""), "calico-node takes our jump out again and again, 12 times in 40.0 s; it is put back at once"),
    ],
)
def test_it_is_said_where_who_how_often_and_what_would_end_it(of: Contest, words: str) -> None:
    assert words in contended(Family.IPV4, of, YIELD)


def told(*takers: str) -> Contention:
    what = contended(Family.IPV4, contest(takers[0]), YIELD)
    return Contention(
        family=Family.IPV4,
        table=Table.FILTER,
        chain="FORWARD",
        what=what,
        repairs=12,
        since=datetime.now(UTC),
        takers=takers,
    )


def test_its_begin_and_its_end_are_told_once_for_each_opponent() -> None:
    (begun,) = contention_events([told(KUBE)], [told(KUBE), told(CALI)])
    assert begun.kind is Kind.CONTENTION
    assert begun.sentence().startswith("Contention in filter FORWARD (IPv4): calico-node puts the jump to cali-FORWARD")
    (ended,) = contention_events([told(KUBE), told(CALI)], [told(KUBE)])
    assert ended.kind is Kind.PEACE
    assert ended.sentence() == (
        "Contention in filter FORWARD (IPv4) is over after 12 rounds: the other program leaves our jump alone"
    )
    assert not list(contention_events([told(CALI)], [told(CALI)]))


def test_tools_of_the_other_family_are_not_suspected() -> None:
    four, six = culprit(1, comm="iptables"), culprit(2, comm="ip6tables")
    assert suspects((four, six), Family.IPV4) == (four,)
    assert suspects((six,), Family.IPV4) == (six,)


def test_a_process_is_known_again_by_what_outlives_the_tool() -> None:
    assert culprit(1, (5, "sh"), (7, "felix")).lineage == {5, 7}
    assert culprit(1).lineage == frozenset()
    assert culprit(1, comm="kube-proxy").lineage == {1}
