"""docs/fleet.md: a configuration goes out to three nodes, one after the other, and stops where it would do harm."""

import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import playbook
import pytest
from booted import Machine, wait_for
from guarded import CONFIG, UNIT, rules
from test_trial import SHUT, connect, in_force, join_the_network, way_in

NODES = ("first", "second", "third")
LASTS = 4
GOOD = CONFIG.format(backend="nft")
# What no look at the configuration can tell: a [[rule]] may do anything.
SHUTS_UNSEEN = '[[rule]]\nname = "oops"\ntable = "mangle"\nchain = "INPUT"\nrule = "-p tcp --dport 22 -j DROP"\n'


@pytest.fixture
def fleet(installed: Callable[[str], list[Path]], boot: Callable[[list[Path]], Machine]) -> Mapping[str, Machine]:
    """Three nodes, each with a way in."""
    machines = {name: boot(installed("bookworm")) for name in NODES}
    for machine in machines.values():
        join_the_network(machine)
    return machines


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "nodewalld/conf.d").mkdir(parents=True)
    return tmp_path


def roll_out(fleet: Mapping[str, Machine], files: Path, config: str) -> None:
    (files / "nodewalld/nodewalld.toml").write_text(config)
    playbook.run({name: partial(connect, m) for name, m in fleet.items()}, files, confirm_within=f"{LASTS}s")


def taken(machine: Machine) -> str:
    return machine.path("/etc/nodewalld/nodewalld.toml").read_text()


def test_a_good_configuration_reaches_all_and_a_harmful_one_only_the_first_and_not_for_long(
    fleet: Mapping[str, Machine], files: Path
) -> None:
    roll_out(fleet, files, GOOD)
    assert [taken(machine) for machine in fleet.values()] == [GOOD] * 3
    assert all(any("31002" in rule for rule in rules(machine)) for machine in fleet.values())
    began = [_confirmed_at(machine) for machine in fleet.values()]
    assert began == sorted(began), "one after the other"
    before = {name: in_force(machine) for name, machine in fleet.items()}
    generations = {name: _generation(machine) for name, machine in fleet.items()}

    def untouched(*names: str) -> None:
        for name in names:
            assert in_force(fleet[name]) == before[name]
            assert _generation(fleet[name]) == generations[name]
            assert taken(fleet[name]) == GOOD

    # An error: nothing is tried.
    with pytest.raises(playbook.Stopped, match=r"nodewalld\.toml:\d+: .*99999") as stopped:
        roll_out(fleet, files, GOOD.replace("31005", "99999"))
    assert (stopped.value.node, stopped.value.task) == ("first", "Refuse what is wrong, before anything changes")
    untouched(*NODES)

    # It would shut the connection that rolls it out, and says so.
    with pytest.raises(playbook.Stopped, match="would refuse your connection") as stopped:
        roll_out(fleet, files, SHUT)
    assert (stopped.value.node, stopped.value.task) == ("first", "Try it, with an automatic return")
    untouched(*NODES)

    # It shuts everybody out: the first node comes back by itself, the others never heard of it.
    tried = time.monotonic()
    with pytest.raises(playbook.Stopped, match="unreachable") as stopped:
        roll_out(fleet, files, GOOD + SHUTS_UNSEEN)
    assert (stopped.value.node, stopped.value.task) == ("first", "Keep it, since there is still a way in")
    assert way_in(fleet["first"]) == {"silent"}
    untouched("second", "third")
    wait_for(lambda: way_in(fleet["first"]) == {"open"}, LASTS + 2, "the way in")
    print(f"open again {time.monotonic() - tried:.1f} s after the play began, with {LASTS} s to confirm")
    wait_for(lambda: in_force(fleet["first"]) == before["first"], 2, "all the rest")
    assert taken(fleet["first"]) == GOOD

    # And the next good one reaches all again, through the folder that was left behind.
    roll_out(fleet, files, GOOD.replace("31005", "31015"))
    assert all(any("31015" in rule for rule in rules(machine)) for machine in fleet.values())


def _confirmed_at(machine: Machine) -> int:
    [entry] = [e for e in machine.journal(f"-u {UNIT} NODEWALLD_KIND=reload") if "was confirmed" in e["MESSAGE"]]
    return int(entry["__REALTIME_TIMESTAMP"])


def _generation(machine: Machine) -> str:
    found = re.search(r'"generation": (\d+)', machine.run("nodewallctl status --json", check=False).stdout)
    assert found
    return found[1]
