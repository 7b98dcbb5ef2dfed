"""plan(desired, observed) is pure, and planning after committing finds nothing to do."""

from dataclasses import replace

import pytest
from fake_table import FakeTable
from hypothesis import given
from hypothesis import strategies as st

from nodewalld.core.config import Anchor, AnchorKind, Place, Position
from nodewalld.core.desired import DesiredTable, Line, OwnChain, Placement
from nodewalld.core.events import Reason
from nodewalld.core.observed import Learned
from nodewalld.core.plan import TablePlan, plan
from nodewalld.core.position import room
from nodewalld.core.ruletext import Rule
from nodewalld.core.steps import Delete, Insert
from nodewalld.core.words import Family, Table

YIELD = ("cali-*", "KUBE-ROUTER-*")
FOREIGN = (
    '-m comment --comment "cali:wUHhoiAYhphO9Mso" -j cali-FORWARD',
    '-m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD',
    "-j DOCKER-USER",
    "-j DOCKER-ISOLATION-STAGE-1",
    "-o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    "-s 10.42.0.0/16 -j ACCEPT",
    "-d 10.42.0.0/16 -j ACCEPT",
    '-m comment --comment "Policy \\"x\\" accepted" -m mark --mark 0x10000/0x10000 -j ACCEPT',
    "-j KUBE-ROUTER-FORWARD",
)
ANCHORS = (
    Anchor(AnchorKind.TARGET, "DOCKER*"),
    Anchor(AnchorKind.TARGET, "KUBE-FORWARD"),
    Anchor(AnchorKind.RULE, "-s 10.42.0.0/16 -j ACCEPT"),
    Anchor(AnchorKind.RULE, "-d 10.42.0.0/16 -j ACCEPT"),
    Anchor(AnchorKind.COMMENT, "cali:*"),
)


TO_STALE = "-i eth9 -j NODEWALL-stale"
STALE = (["-j DROP"], ['-m comment --comment "nodewalld:rule/gone" -j DROP', "-j DROP"], [])


def placement(position: Position, number: int = 0, chain: str = "FORWARD", target: str = "") -> Placement:
    tag = f"at/{position.place.value}-{number}"
    target = target or f"NODEWALL-{number}"
    text = f'-m comment --comment "nodewalld:{tag}" -j {target}'
    return Placement(chain, position, (0, number), tag, text, (f"rule/{number}",))


def own(number: int = 0, lines: int = 2) -> OwnChain:
    rules = [f'-p tcp -m comment --comment "nodewalld:rule/{number}" --dport {i + 1} -j DROP' for i in range(lines)]
    return OwnChain(f"NODEWALL-{number}", tuple(Line(f"rule/{number}", text) for text in rules))


def desired(*positions: Position) -> DesiredTable:
    chains = tuple(own(i) for i in range(len(positions)))
    return DesiredTable(chains, tuple(placement(p, i) for i, p in enumerate(positions)))


def planned(wanted: DesiredTable, table: FakeTable, held: tuple[str, ...] = ()) -> TablePlan:
    return plan(Family.IPV4, table.table, wanted, table.observed(), Learned(), YIELD, held)


def settle(wanted: DesiredTable, table: FakeTable) -> TablePlan:
    first = planned(wanted, table)
    table.commit(first.script)
    second = planned(wanted, table)
    assert second.commands == (), second.commands
    return first


positions = st.one_of(
    st.sampled_from([Position(Place.FIRST), Position(), Position(Place.LAST)]),
    st.builds(
        lambda after, before: Position(Place.BETWEEN, tuple(after), tuple(before)),
        st.lists(st.sampled_from(ANCHORS), max_size=2),
        st.lists(st.sampled_from(ANCHORS), max_size=2),
    ).filter(lambda p: bool(p.after or p.before)),
)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[DesiredTable, FakeTable]:
    """A desired table, and a chain in which foreign rules and remains of ours stand in any order."""
    wanted = desired(*draw(st.lists(positions, min_size=1, max_size=4, unique=True)))
    remains = [p.text for p in wanted.placements] + ['-m comment --comment "nodewalld:at/stale" -j ACCEPT']
    rules = draw(st.lists(st.sampled_from([*FOREIGN, *remains]), max_size=12))
    chains: dict[str, list[str]] = {"FORWARD": rules}
    for chain in wanted.chains:
        lines = [line.text for line in chain.lines]
        chains[chain.name] = draw(st.sampled_from([lines, lines[:1], [], [*lines, "-j ACCEPT"]]))
    if draw(st.booleans()):
        chains["NODEWALL-stale"] = draw(st.sampled_from(STALE))
        if draw(st.booleans()):
            rules.insert(draw(st.integers(0, len(rules))), TO_STALE)
    return wanted, FakeTable(Table.FILTER, chains)


@given(worlds())
def test_planning_after_committing_finds_nothing_to_do(world: tuple[DesiredTable, FakeTable]) -> None:
    wanted, table = world
    foreign = table.foreign()
    settle(wanted, table)
    assert table.foreign() == foreign
    assert ("NODEWALL-stale" in table.chains) == (TO_STALE in table.chains["FORWARD"])


@pytest.mark.parametrize(
    ("content", "left"), [(STALE[0], STALE[0]), (STALE[1], []), (STALE[2], [])], ids=["foreign", "ours", "empty"]
)
def test_a_chain_that_a_foreign_rule_leads_to_blocks_nothing_and_keeps_what_is_foreign(
    content: list[str], left: list[str]
) -> None:
    """The kernel refuses to delete it, and the transaction with it: then nothing at all would be in force."""
    table = FakeTable(Table.FILTER, {"FORWARD": [TO_STALE], "NODEWALL-stale": content})
    settle(desired(Position()), table)
    assert table.chains["NODEWALL-stale"] == left
    assert [Rule(text).target for text in table.chains["FORWARD"]] == ["NODEWALL-0", "NODEWALL-stale"]


@given(worlds())
def test_by_the_rules_they_mean_the_steps_do_what_they_do_as_text(world: tuple[DesiredTable, FakeTable]) -> None:
    """As the kernel does it, which is told the rule to delete and the one to stand above, and no number."""
    wanted, table = world
    change = planned(wanted, table)
    rules: list[tuple[int, str]] = list(enumerate(table.chains["FORWARD"]))
    for step in change.steps:
        if isinstance(step, Delete):
            rules = [rule for rule in rules if rule[0] != step.index]
        elif isinstance(step, Insert):
            at = len(rules) if step.above is None else [index for index, _ in rules].index(step.above)
            rules.insert(at, (-1, step.text))
    table.commit(change.script)
    assert table.chains["FORWARD"] == [text for _, text in rules]


@given(worlds())
def test_afterwards_every_rule_stands_in_its_room_and_exactly_once(world: tuple[DesiredTable, FakeTable]) -> None:
    wanted, table = world
    settle(wanted, table)
    rules = [Rule(text) for text in table.chains["FORWARD"]]
    foreign = [rule for rule in rules if not rule.tag]
    for place in wanted.placements:
        at = [i for i, rule in enumerate(rules) if rule.tag == place.tag]
        assert len(at) == 1
        space = room(place.position, foreign, YIELD)
        above = sum(1 for rule in rules[: at[0]] if not rule.tag)
        assert space.low <= above <= space.high
    last = [i for i, rule in enumerate(rules) if rule.tag.startswith("at/last")]
    assert last in ([], [len(rules) - 1])


@given(worlds(), st.data())
def test_what_stands_in_its_room_is_not_moved(world: tuple[DesiredTable, FakeTable], data: st.DataObject) -> None:
    """Foreign rules that come where they violate nothing cause no write."""
    wanted, table = world
    settle(wanted, table)
    rules = table.chains["FORWARD"]
    rules.insert(data.draw(st.integers(0, len(rules))), "-p icmp -j ACCEPT")
    change = planned(wanted, table)
    if change.commands:
        foreign = [Rule(text) for text in rules if not Rule(text).tag]
        observed = [Rule(text) for text in rules]
        broken = []
        for place in wanted.placements:
            at = next(i for i, rule in enumerate(observed) if rule.tag == place.tag)
            above = sum(1 for rule in observed[:at] if not rule.tag)
            space = room(place.position, foreign, YIELD)
            broken.append(not space.low <= above <= space.high)
        assert any(broken) or len(wanted.placements) > 1


def forward(*rules: str) -> FakeTable:
    return FakeTable(Table.FILTER, {"FORWARD": list(rules)})


def order(table: FakeTable) -> list[str]:
    return [Rule(text).tag or Rule(text).target for text in table.chains["FORWARD"]]


SEED_002 = Position(
    Place.BETWEEN,
    (Anchor(AnchorKind.RULE, "-s 10.42.0.0/16 -j ACCEPT"),),
    (Anchor(AnchorKind.RULE, "-d 10.42.0.0/16 -j ACCEPT"),),
)


def test_the_rule_of_seed_002_goes_between_the_two_rules_whatever_their_numbers() -> None:
    table = forward(FOREIGN[0], FOREIGN[1], FOREIGN[5], FOREIGN[6], FOREIGN[7])
    settle(desired(SEED_002), table)
    assert table.chains["FORWARD"].index(FOREIGN[5]) + 1 == order(table).index("at/between-0")
    table.chains["FORWARD"][0:0] = [FOREIGN[2], FOREIGN[3]]
    assert planned(desired(SEED_002), table).commands == ()


def test_before_wins_when_the_anchors_stand_the_wrong_way_round() -> None:
    table = forward(FOREIGN[6], FOREIGN[1], FOREIGN[5])
    plan_ = settle(desired(SEED_002), table)
    assert order(table)[0] == "at/between-0"
    crossed = "-s 10.42.0.0/16 -j ACCEPT stands below -d 10.42.0.0/16 -j ACCEPT"
    assert f"its anchors are in the wrong order ({crossed}), so only `before` is kept" in plan_.unmet[0]


def test_a_vanished_anchor_moves_nothing_downwards_while_it_is_held() -> None:
    table = forward(FOREIGN[6], FOREIGN[1], FOREIGN[5])
    wanted = desired(SEED_002)
    settle(wanted, table)
    table.chains["FORWARD"].remove(FOREIGN[6])
    held = planned(wanted, table, ("FORWARD at/between-0",))
    assert held.commands == ()
    assert held.held
    assert planned(wanted, table).commands


def test_an_anchor_that_vanished_a_moment_ago_is_no_news_yet() -> None:
    table = forward(FOREIGN[5], FOREIGN[1], FOREIGN[6])
    wanted = desired(SEED_002)
    settle(wanted, table)
    table.chains["FORWARD"] = [rule for rule in table.chains["FORWARD"] if "10.42" not in rule]
    held = planned(wanted, table, ("FORWARD at/between-0",))
    assert (held.commands, held.unmet, held.held) == ((), (), True)
    assert planned(wanted, table).unmet


@pytest.mark.parametrize(
    ("anchor", "hint"),
    [
        (
            Anchor(AnchorKind.TARGET, "DOCKER-FORWARD"),
            "(DOCKER-FORWARD; there is DOCKER-USER, DOCKER-ISOLATION-STAGE-1)",
        ),
        (Anchor(AnchorKind.TARGET, "FLANNEL-FWD"), "(FLANNEL-FWD)"),
        (Anchor(AnchorKind.TARGET, "ACCEPTED"), "(ACCEPTED)"),
        (Anchor(AnchorKind.COMMENT, "cali:*"), "(the comment cali:*)"),
    ],
)
def test_what_may_have_taken_a_missing_anchor_s_place_is_named(anchor: Anchor, hint: str) -> None:
    table = forward(*FOREIGN[1:5])
    change = settle(desired(Position(Place.BETWEEN, (anchor,))), table)
    assert change.unmet[0].endswith(hint)


def test_early_goes_below_a_leading_run_of_those_it_yields_to_and_above_the_rest() -> None:
    table = forward(FOREIGN[0], FOREIGN[8], FOREIGN[1])
    settle(desired(Position()), table)
    assert order(table) == ["cali-FORWARD", "KUBE-ROUTER-FORWARD", "at/early-0", "KUBE-FORWARD"]


def test_with_every_anchor_missing_a_rule_stays_and_says_so() -> None:
    table = forward(FOREIGN[0], FOREIGN[1])
    change = settle(desired(SEED_002), table)
    assert order(table) == ["cali-FORWARD", "at/between-0", "KUBE-FORWARD"]
    words = "none of its anchors is in the chain (-s 10.42.0.0/16 -j ACCEPT, -d 10.42.0.0/16 -j ACCEPT)"
    assert change.unmet == (f"rule/0 in filter FORWARD: {words}",)
    table.chains["FORWARD"].append(table.chains["FORWARD"].pop(1))
    assert planned(desired(SEED_002), table).commands == ()


def test_ours_stand_in_their_order_at_one_place() -> None:
    after_docker = Position(Place.BETWEEN, (ANCHORS[0],))
    table = forward(FOREIGN[2])
    wanted = desired(after_docker, Position(Place.LAST), Position(Place.FIRST), Position())
    settle(wanted, table)
    assert order(table) == ["at/first-2", "at/early-3", "DOCKER-USER", "at/between-0", "at/last-1"]


@pytest.mark.parametrize(
    ("spoil", "reason", "chain"),
    [
        (lambda t: t.chains["FORWARD"].clear(), Reason.FLUSHED, "FORWARD"),
        (lambda t: t.chains["FORWARD"].remove(next(r for r in t.chains["FORWARD"] if "nodewalld" in r)),
         Reason.MISSING, "FORWARD"),
        (lambda t: t.chains["FORWARD"].insert(0, "-j ACCEPT"), Reason.DISPLACED, "FORWARD"),
        (lambda t: t.chains["FORWARD"].append(placement(Position()).text), Reason.CHANGED, "FORWARD"),
        (lambda t: t.chains["NODEWALL-0"].clear(), Reason.FLUSHED, "NODEWALL-0"),
        (lambda t: t.chains["NODEWALL-0"].pop(), Reason.CHANGED, "NODEWALL-0"),
        (lambda t: t.chains["NODEWALL-0"].append("-j ACCEPT"), Reason.CHANGED, "NODEWALL-0"),
        (lambda t: t.chains.update({"OLD": t.chains.pop("NODEWALL-0")}), Reason.MISSING, "NODEWALL-0"),
    ],
)  # fmt: skip
def test_each_disturbance_is_named_and_undone(spoil, reason: Reason, chain: str) -> None:
    table = forward(FOREIGN[1], FOREIGN[2])
    wanted = desired(Position())
    settle(wanted, table)
    spoil(table)
    change = planned(wanted, table)
    assert (reason, chain) in {(c.reason, c.chain) for c in change.changes}
    table.commit(change.script)
    assert planned(wanted, table).commands == ()
    assert "OLD" not in table.chains


def test_a_jump_is_written_bare_and_stands_exactly_once() -> None:
    jump = Placement("FORWARD", Position(), (0, 0), "", "-j DOCKER-USER", ("jump/docker-user",), "", "DOCKER-USER")
    wanted = DesiredTable((), (jump,))
    table = forward(FOREIGN[1], "-j DOCKER-USER", "-j DOCKER-USER")
    table.chains["DOCKER-USER"] = ["-j RETURN"]
    settle(wanted, table)
    assert order(table) == ["DOCKER-USER", "KUBE-FORWARD"]
    assert table.chains["DOCKER-USER"] == ["-j RETURN"]


def test_a_missing_jump_target_is_created() -> None:
    jump = Placement("FORWARD", Position(), (0, 0), "", "-j DOCKER-USER", ("jump/docker-user",), "", "DOCKER-USER")
    table = forward()
    settle(DesiredTable((), (jump,)), table)
    assert table.chains["DOCKER-USER"] == []


def test_a_foreign_chain_that_holds_nothing_but_ours_stays() -> None:
    jump = Placement("FORWARD", Position(), (0, 0), "", "-j DOCKER-USER", ("jump/docker-user",), "", "DOCKER-USER")
    back = '-m comment --comment "nodewalld:rule/friends" -j RETURN'
    stands = Placement("DOCKER-USER", Position(), (0, 1), "rule/friends", back, ("rule/friends",))
    leads = replace(placement(Position()), chain="DOCKER-USER")
    table = forward()
    settle(DesiredTable((own(),), (jump, stands, leads)), table)
    assert table.chains["DOCKER-USER"] == [leads.text, back]
    settle(DesiredTable(), table)
    assert table.chains["DOCKER-USER"] == []
    assert table.chains["FORWARD"] == ["-j DOCKER-USER"]


def test_a_rule_in_a_missing_foreign_chain_waits_and_says_so() -> None:
    waiting = replace(placement(Position()), chain="DOCKER-USER")
    table = forward()
    change = settle(DesiredTable((own(),), (waiting,)), table)
    assert "waits: there is no chain DOCKER-USER" in change.unmet[0]
    assert change.in_place + 1 < change.desired + 1
    table.chains["DOCKER-USER"] = ["-j RETURN"]
    again = settle(DesiredTable((own(),), (waiting,)), table)
    assert again.unmet == ()
    assert len(table.chains["DOCKER-USER"]) == 2


def test_a_line_that_needs_a_missing_chain_is_left_out_until_it_is_there() -> None:
    line = Line("rule/0", '-m comment --comment "nodewalld:rule/0" -j KUBE-MARK-DROP', "KUBE-MARK-DROP")
    wanted = DesiredTable((OwnChain("NODEWALL-0", (line,)),), (placement(Position()),))
    table = forward()
    assert "KUBE-MARK-DROP" in settle(wanted, table).unmet[0]
    table.chains["KUBE-MARK-DROP"] = []
    settle(wanted, table)
    assert table.chains["NODEWALL-0"] == [line.text]


def test_planning_does_not_touch_its_arguments() -> None:
    table = forward(FOREIGN[1])
    observed = table.observed()
    plan(Family.IPV4, Table.FILTER, desired(Position()), observed, Learned(), YIELD)
    assert observed == table.observed()
