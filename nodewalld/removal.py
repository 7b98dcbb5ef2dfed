"""Takes everything of ours out of the kernel, in both backends and families, and nothing else.

Law: ours are known by their tags and their prefix, so this needs no memory but for what bears neither: the sets, and a
foreign chain that was made for a `[[jump]]`, which goes with its jumps as long as nobody has put a rule into it.
"""

from collections.abc import Callable, Iterable

from nodewalld.core.desired import OWN_PREFIX
from nodewalld.core.observed import Observed
from nodewalld.core.words import Backend, Family, Table
from nodewalld.guard import ORDER, Guard
from nodewalld.kernel.firewall import Firewall, FirewallError
from nodewalld.kernel.tracerule import sweep
from nodewalld.memory import Made

Opener = Callable[[Family, Backend], Firewall]


def remove_rules(open_firewall: Opener, made: Iterable[Made]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Remove rules and chains; returns their numbers, and why something of ours is still there."""
    removed = {"rules": sweep(), "chains": 0}
    made, problems = tuple(made), []
    for backend in Backend:
        for family in Family:
            firewall = open_firewall(family, backend)
            for table in ORDER:
                empty = [chain for b, f, t, chain in made if (b, f, t) == (backend, family, table)]
                try:
                    _remove_from(firewall, table, empty, removed)
                except (FirewallError, OSError) as error:
                    if _holds_ours(firewall, table):
                        problems.append(f"{backend} {family} {table}: {error}")
            firewall.close()
    return removed, tuple(problems)


def _holds_ours(firewall: Firewall, table: Table) -> bool:
    """Whether chains of ours stand in a table; one that this kernel doesn't have holds none."""
    try:
        return bool(firewall.own_chains(table))
    except OSError:
        return False


def _remove_from(firewall: Firewall, table: Table, made: list[str], removed: dict[str, int]) -> None:
    guard = Guard(firewall)
    observed = firewall.observe_all(table)
    guard.wrote(table, (name for name, rules in observed.chains.items() if any(r.tag for r in rules)))
    settled = guard.settle(table, everything=True)
    if made:
        _remove_made(firewall, table, made)
    if settled.commits:
        removed["rules"] += sum(1 for rules in observed.chains.values() for rule in rules if rule.tag)
        removed["chains"] += sum(1 for name in observed.chains if name.startswith(OWN_PREFIX))


def _remove_made(firewall: Firewall, table: Table, made: list[str]) -> None:
    with firewall.exclusive():
        observed = firewall.observe_all(table)
        commands = [command for chain in made for command in _without(observed, chain)]
        if commands:
            firewall.commit("\n".join((f"*{table}", *commands, "COMMIT", "")))


def _without(observed: Observed, chain: str) -> list[str]:
    """The commands that take an empty chain out, with the bare jumps to it; none when it serves somebody else."""
    if observed.chains.get(chain) != ():
        return []
    jumps = [(name, rule) for name, rules in observed.chains.items() for rule in rules if rule.target == chain]
    if any(rule.words != ("-j", chain) for _, rule in jumps):
        return []
    return [*(f"-D {name} -j {chain}" for name, _ in jumps), f"-X {chain}"]
