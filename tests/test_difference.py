"""What `plan` shows is what its steps do: numbers before are those of now, numbers after those of afterwards."""

from fake_table import FakeTable
from hypothesis import given
from test_plan import FOREIGN, desired, own, planned, worlds

from nodewalld.core.config import Place, Position
from nodewalld.core.desired import DesiredTable, Line, OwnChain
from nodewalld.core.difference import ChainChange, differences
from nodewalld.core.observed import Learned
from nodewalld.core.plan import plan
from nodewalld.core.ruletext import untagged
from nodewalld.core.words import Family, Table

JUMP = '-m comment --comment "nodewalld:at/{}-0" -j NODEWALL-0'


def shown(wanted: DesiredTable, table: FakeTable) -> dict[str, ChainChange]:
    found = differences(planned(wanted, table), wanted, table.observed())
    return {chain.chain: chain for chain in found}


def numbers(chain: ChainChange) -> list[tuple[int | None, int | None, str]]:
    return [(rule.before, rule.after, rule.rule) for rule in chain.rules]


@given(worlds())
def test_each_number_is_the_rules_before_and_after_the_commit(world: tuple[DesiredTable, FakeTable]) -> None:
    wanted, table = world
    change = planned(wanted, table)
    before = {name: list(rules) for name, rules in table.chains.items()}
    found = shown(wanted, table)
    table.commit(change.script)
    assert {name for name in before | table.chains if before.get(name) != table.chains.get(name)} <= found.keys()
    assert {c.chain for c in change.changes} <= found.keys()
    for name, chain in found.items():
        assert chain.exists == (name in before, name in table.chains)
        assert [r.rule for r in chain.rules if r.before is not None] == before.get(name, [])
        assert [r.rule for r in chain.rules if r.after is not None] == table.chains.get(name, [])
        for side in ("before", "after"):
            counted = [n for n in (getattr(rule, side) for rule in chain.rules) if n is not None]
            assert counted == list(range(1, len(counted) + 1))


@given(worlds())
def test_no_foreign_rule_is_shown_to_come_or_go(world: tuple[DesiredTable, FakeTable]) -> None:
    wanted, table = world
    for rule in shown(wanted, table).get("FORWARD", ChainChange(Family.IPV4, Table.FILTER, "", (True, True), ())).rules:
        if rule.rule in FOREIGN:
            assert None not in (rule.before, rule.after)
            assert rule.entries == ()


def test_a_displaced_jump_goes_and_comes_and_names_its_entry() -> None:
    wanted = desired(Position())
    settled = [line.text for line in own().lines]
    table = FakeTable(Table.FILTER, {"FORWARD": ["-j ACCEPT", JUMP.format("early")], "NODEWALL-0": settled})
    chain = shown(wanted, table)["FORWARD"]
    jump = JUMP.format("early")
    assert numbers(chain) == [(None, 1, jump), (1, 2, "-j ACCEPT"), (2, None, jump)]
    assert [rule.entries for rule in chain.rules] == [("rule/0",), (), ("rule/0",)]


def test_of_a_chain_that_is_written_anew_only_what_differs_is_marked() -> None:
    """Though iptables prints a lone address without its mask, and quotes otherwise."""
    lines = ("-s 10.0.0.1/32 -j ACCEPT", "-s 10.0.0.2/32 -j ACCEPT", "-j DROP")
    wanted = DesiredTable((OwnChain("NODEWALL-p-x", tuple(Line("port/x", text) for text in lines)),))
    table = FakeTable(Table.FILTER, {"NODEWALL-p-x": ["-s 10.0.0.1 -j ACCEPT", "-j DROP"]})
    change = plan(Family.IPV4, Table.FILTER, wanted, table.observed(), Learned())
    (chain,) = differences(change, wanted, table.observed())
    assert [(rule.before, rule.after) for rule in chain.rules] == [(1, 1), (None, 2), (2, 3)]


def test_a_chain_that_only_looks_alike_is_not_shown_as_unchanged() -> None:
    wanted = DesiredTable((OwnChain("NODEWALL-p-x", (Line("port/x", "-s 10.0.0.1/32 -j ACCEPT"),)),))
    table = FakeTable(Table.FILTER, {"NODEWALL-p-x": ["-s 10.0.0.1 -j ACCEPT"]})
    change = plan(Family.IPV4, Table.FILTER, wanted, table.observed(), Learned())
    (chain,) = differences(change, wanted, table.observed())
    assert [(rule.before, rule.after) for rule in chain.rules] == [(1, None), (None, 1)]


def test_a_left_over_chain_goes_and_a_new_one_comes_whole() -> None:
    table = FakeTable(Table.FILTER, {"NODEWALL-old": ["-j DROP"]})
    found = shown(desired(Position(Place.LAST)), table)
    assert (found["NODEWALL-old"].exists, numbers(found["NODEWALL-old"])) == ((True, False), [(1, None, "-j DROP")])
    assert found["NODEWALL-0"].exists == (False, True)
    assert [(rule.before, rule.after) for rule in found["NODEWALL-0"].rules] == [(None, 1), (None, 2)]


def test_the_mark_of_ours_is_left_out_and_nothing_else() -> None:
    assert untagged(JUMP.format("early")) == "-j NODEWALL-0"
    both = '-m comment --comment "nodewalld:rule/x" -m comment --comment "my own" -j DROP'
    assert untagged(both) == '-m comment --comment "my own" -j DROP'
    assert (
        untagged('-m comment --comment "not nodewalld:x" -j DROP') == '-m comment --comment "not nodewalld:x" -j DROP'
    )
