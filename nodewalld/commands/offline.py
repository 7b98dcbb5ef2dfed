"""What `nodewallctl` does by itself, without asking the daemon: compile, try, plan, show; and remove without one."""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from nodewalld.commands import shielding
from nodewalld.configuration.load import load
from nodewalld.core.config import Config, Problem, Where
from nodewalld.core.decide import decide, kernel_set_name
from nodewalld.core.desired import OWN_PREFIX, Desired, DesiredTable
from nodewalld.core.difference import Entries, differences
from nodewalld.core.environment import Environment
from nodewalld.core.iptables.render import render
from nodewalld.core.lints.facts import NodeFacts
from nodewalld.core.lockout import parse_connection
from nodewalld.core.plan import TablePlan
from nodewalld.core.ruletext import Rule
from nodewalld.core.setbook import filled, without_ended
from nodewalld.core.steps import chain_of
from nodewalld.core.words import Backend, Family, Table
from nodewalld.guard import Guard
from nodewalld.kernel import backends, trial
from nodewalld.kernel.firewall import FirewallError, open_firewall
from nodewalld.kernel.links import Links
from nodewalld.kernel.sets import Sets
from nodewalld.kernel.survey import survey as take_survey
from nodewalld.memory import Memory
from nodewalld.reconciler import Refused
from nodewalld.service.additions import AdditionStore
from nodewalld.service.state import StateFolder
from nodewalld.shielded import ShieldedReconciler

_COUNTED = re.compile(r"\[(\d+):(\d+)\] -A (\S+) ?(.*)")


def environment() -> Environment:
    """The node as it is now."""
    with Links() as links:
        return links.environment()


def desired(config: Config, node: Environment) -> dict[Family, Desired]:
    """What a configuration wants of this node, in each of its families."""
    return {family: render(decide(config, family, node)) for family in config.daemon.families}


def compiled(config_dir: Path) -> str:
    """The configuration as iptables text, family by family."""
    config = load(config_dir)
    parts = []
    for family, wanted in desired(config, environment()).items():
        for table, content in wanted.tables.items():
            lines = [f":{chain.name} - [0:0]" for chain in content.chains]
            lines += [f"-A {chain.name} {line.text}" for chain in content.chains for line in chain.lines]
            lines += [f"-A {place.chain} {place.text}" for place in content.placements]
            parts.append("\n".join((f"# {family}", f"*{table}", *lines, "COMMIT")))
    if shield := shielding.wanted(config, environment()):
        parts.append("\n".join(("# nft", *shield.lines())))
    return "\n".join(parts) + "\n" if parts else ""


def try_texts(config: Config) -> tuple[Problem, ...] | str:
    """The rule texts that a private kernel namespace refuses, or a sentence why they could not be tried."""
    try:
        backend = _backend(config)
        refusals = trial.attempt(desired(config, _somewhere(config)), backend)
    except (trial.NoTrialError, FirewallError) as error:
        return str(error)
    places = {f"rule/{rule.name}": rule.where for rule in config.rules}
    problems = []
    for refusal in refusals:
        where = places.get(refusal.entry, Where(config.path, 0))
        key = f"{refusal.entry.replace('/', '.')}.rule" if refusal.entry else "the compiled rules"
        cure = f"a rule that {refusal.family.tool} takes, or other `families`" if refusal.entry else ""
        problems.append(Problem(where, key, f"{refusal.family}: {refusal.words}", cure))
    return tuple(problems)


def survey(config: Config, connection: str) -> NodeFacts:
    """What lints can know of this node now."""
    families = config.daemon.families
    names = [kernel_set_name(entry.name, family) for entry in config.sets for family in families]
    backend = partial(_backend, config)
    return take_survey(families, backend, names, parse_connection(connection))


def _backend(config: Config) -> Backend:
    return config.daemon.backend or _shown_backend()


def _shown_backend() -> Backend:
    shown = backends.evidence()
    return shown[0] if shown else backends.of_tool()


def _somewhere(config: Config) -> Environment:
    """A node on which everything of a configuration is written: with a default route, an address, a Service."""
    families = config.daemon.families
    addresses = {f: ("192.0.2.1",) if f is Family.IPV4 else ("2001:db8::1",) for f in families}
    return Environment(addresses, addresses, dict.fromkeys(families, ("eth0",)))


def plan(config_dir: Path, state_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """What enforcing a configuration would change now: {"changes": why and how, "chains": rule by rule}."""
    state = StateFolder(state_dir)
    config, memory, added = load(config_dir), Memory(state), AdditionStore(state)
    config = filled(config, without_ended(added.read(), added.clock()))
    changes: list[dict[str, Any]] = []
    chains: list[dict[str, Any]] = []
    backend = backends.choose(config.daemon.backend, memory.backend)
    prints = memory.prints(backend)
    for family, wanted in desired(config, environment()).items():
        changes.extend(_set_changes(wanted))
        firewall = open_firewall(family, backend, state_dir)
        guard = Guard(firewall, prints.get(family))
        guard.desired = wanted
        for table in guard.concerned():
            planned, observed = guard.preview(table)
            changes.extend(_changes(planned))
            different = differences(planned, wanted.tables.get(table, DesiredTable()), observed)
            chains.extend(chain.to_json() for chain in different)
        firewall.close()
    changes.extend(shielding.changes(config, environment()))
    return {"changes": changes, "chains": chains}


def _changes(planned: TablePlan) -> Iterator[dict[str, Any]]:
    told: set[str] = set()
    for change in planned.changes:
        commands = [c for c in planned.commands if chain_of(c) == change.chain and change.chain not in told]
        told.add(change.chain)
        yield {
            "family": planned.family.value,
            "table": planned.table.value,
            "chain": change.chain,
            "reason": change.reason.value,
            "why": f"{change.subject} {change.wrong}",
            "entries": list(change.entries),
            "commands": commands,
        }


def _set_changes(wanted: Desired) -> Iterator[dict[str, Any]]:
    with Sets() as sets:
        for entry in wanted.sets:
            header = sets.header(entry.name)
            if header and sets.holds(entry.name, entry.networks):
                continue
            found = frozenset(map(str, sets.entries(entry.name))) if header else frozenset()
            content = frozenset(map(str, entry.networks))
            yield {
                "family": entry.family.value,
                "table": "ipset",
                "chain": entry.name,
                "reason": "changed" if found else "flushed" if header else "missing",
                "why": f"the set {entry.name} holds {len(found)} entries instead of {len(content)}",
                "commands": [
                    *(f"add {entry.name} {network}" for network in sorted(content - found)),
                    *(f"del {entry.name} {network}" for network in sorted(found - content)),
                ],
            }


def show(config_dir: Path, state_dir: Path) -> list[dict[str, Any]]:
    """Our rules as the kernel holds them now, in packet order, with their counters."""
    config, memory = load(config_dir), Memory(StateFolder(state_dir))
    backend = backends.choose(config.daemon.backend, memory.backend)
    rows: list[dict[str, Any]] = []
    for family, wanted in desired(config, environment()).items():
        firewall = open_firewall(family, backend, state_dir)
        for table in Table:
            entries = Entries(wanted.tables.get(table, DesiredTable()))
            if firewall.own_chains(table) or table in memory.prints(backend).get(family, {}):
                with firewall.exclusive():
                    rows.extend(_rows(family, table, firewall.counters(table), entries))
        firewall.close()
    return [*rows, *shielding.rows(config, environment())]


def iptables_only(config_dir: Path) -> list[dict[str, Any]]:
    """What of a configuration the shield doesn't carry, and why."""
    return shielding.iptables_only(load(config_dir), environment())


def _rows(family: Family, table: Table, text: str, entries: Entries) -> Iterator[dict[str, Any]]:
    """A rule of ours in a foreign chain, followed by what it leads to, each chain once."""
    chains: dict[str, list[tuple[int, int, Rule]]] = {}
    for line in text.splitlines():
        found = _COUNTED.fullmatch(line)
        if found:
            chains.setdefault(found[3], []).append((int(found[1]), int(found[2]), Rule(found[4])))
    order = [name for name in table.builtin_chains if name in chains]
    order += [name for name in chains if name not in order and not name.startswith(OWN_PREFIX)]
    shown: set[str] = set()

    def walk(name: str) -> Iterator[dict[str, Any]]:
        own = name.startswith(OWN_PREFIX)
        for number, (packets, octets, rule) in enumerate(chains.get(name, []), 1):
            named = entries.of(name, rule)
            if not own and not named and not rule.tag and not rule.target.startswith(OWN_PREFIX):
                continue
            yield {
                "family": family.value,
                "table": table.value,
                "chain": name,
                "position": number,
                "entry": rule.tag,
                "entries": list(named),
                "rule": rule.text,
                "packets": packets,
                "bytes": octets,
            }
            if rule.target.startswith(OWN_PREFIX) and rule.target not in shown:
                shown.add(rule.target)
                yield from walk(rule.target)

    for name in order:
        yield from walk(name)


def remove(state_dir: Path) -> dict[str, Any]:
    """Take everything of ours out of the kernel, without a daemon."""
    state = StateFolder(state_dir)
    reconciler = ShieldedReconciler(
        environment=environment, state=state, runtime_dir=state_dir, record=lambda _event: None
    )
    AdditionStore(state).write({})
    try:
        return {"removed": reconciler.remove()}
    except Refused as error:
        raise FirewallError(f"some of our rules are still there: {error}") from error
