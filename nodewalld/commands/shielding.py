"""What `nodewallctl` tells of the shield without asking the daemon: what it should be, and what stands."""

from collections.abc import Iterator
from typing import Any

from nodewalld.core.config import Config, ShieldMode
from nodewalld.core.decide import decide
from nodewalld.core.environment import Environment
from nodewalld.core.events import SHIELD
from nodewalld.core.shield.render import render
from nodewalld.core.shield.rules import TABLE, Shield
from nodewalld.core.words import Family
from nodewalld.kernel.nftshield import ShieldTable, stamp


def wanted(config: Config, node: Environment) -> Shield | None:
    """The shield of a configuration; None where it is off, or has nothing to refuse."""
    shield = _rendered(config, node)
    return shield if config.daemon.shield is not ShieldMode.OFF and shield.rules else None


def _rendered(config: Config, node: Environment) -> Shield:
    return render({family: decide(config, family, node) for family in config.daemon.families})


def iptables_only(config: Config, node: Environment) -> list[dict[str, Any]]:
    """What of a configuration the shield doesn't carry, and why; nothing where there is no shield."""
    if config.daemon.shield is ShieldMode.OFF:
        return []
    return [{"entry": entry, "reason": reason} for entry, reason in _rendered(config, node).iptables_only]


def changes(config: Config, node: Environment) -> Iterator[dict[str, Any]]:
    """What enforcing a configuration would change of the shield now."""
    shield = wanted(config, node)
    table = ShieldTable()
    try:
        held, about = table.held(), table.about()
        if held is None and shield is None:
            return
        if shield is None:
            yield _change("flushed", "the shield is not wanted, and stands", [f"delete table inet {TABLE}"])
        elif held is None:
            yield _change("missing", "the shield does not stand", shield.lines())
        elif about != stamp(shield) or not table.holds_rules(shield):
            yield _change("changed", "the shield holds other rules than it should", shield.lines())
        elif not table.holds_sets(shield):
            yield _change("changed", "the sets of the shield hold other addresses than they should", ())
    except OSError:
        if config.daemon.shield is ShieldMode.REQUIRE:
            raise
    finally:
        table.close()


def _change(reason: str, why: str, commands: Any) -> dict[str, Any]:
    where = {"family": None, "table": SHIELD, "chain": f"inet {TABLE}"}
    return {**where, "reason": reason, "why": why, "commands": list(commands)}


def rows(config: Config, node: Environment) -> Iterator[dict[str, Any]]:
    """The rules of the shield that refuse, as they stand; with their texts where these are those of the configuration.

    What only leads to them does not count, and is in `show --compiled` and `nft list table inet nodewalld`.
    """
    table = ShieldTable()
    try:
        shield = wanted(config, node) or Shield()
        texts = {chain.name: [str(rule) for rule in chain.rules] for chain in shield.chains}
        known = bool(shield.rules) and table.about() == stamp(shield) and table.holds_rules(shield)
        numbers: dict[str, int] = {}
        for tally in table.tallies():
            number = numbers[tally.chain] = numbers.get(tally.chain, 0) + 1
            if tally.packets is None:
                continue
            family = next((family.value for family in Family if tally.chain.startswith(f"{family}-")), None)
            yield {
                "family": family,
                "table": SHIELD,
                "chain": tally.chain,
                "position": number,
                "entry": tally.entry,
                "rule": texts[tally.chain][number - 1] if known else "",
                "packets": tally.packets,
                "bytes": tally.octets,
            }
    except OSError:
        return  # a kernel without nf_tables has no shield
    finally:
        table.close()
