"""The order in which the kernel asks: hooks, and what is asked at each, from include/uapi/linux/netfilter_ipv4.h.

Law: the nat tables of both backends, and nft chains of type nat, are one engine at each hook, which binds a flow once:
who binds it first, by their own priorities, has decided (net/netfilter/nf_nat_core.c, nf_nat_inet_fn).
"""

from dataclasses import dataclass

from nodewalld.core.words import Table

PREROUTING, INPUT, FORWARD, OUTPUT, POSTROUTING = "PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"

CONNTRACK = -200
"""Where conntrack looks at a packet."""

_PRIORITIES = {Table.RAW: -300, Table.MANGLE: -150, Table.FILTER: 0, Table.SECURITY: 50}
_NAT = {PREROUTING: -100, OUTPUT: -100, INPUT: 100, POSTROUTING: 100}


@dataclass(frozen=True, slots=True, order=True)
class Station:
    """One place where a packet is looked at; `table` None is conntrack's."""

    priority: int
    table: Table | None


def stations(hook: str) -> tuple[Station, ...]:
    """Everything of iptables, and conntrack, at a hook, in order."""
    found = [Station(_priority(table, hook), table) for table in Table if hook in table.builtin_chains]
    if hook in {PREROUTING, OUTPUT}:
        found.append(Station(CONNTRACK, None))
    return tuple(sorted(found, key=lambda station: station.priority))


def _priority(table: Table, hook: str) -> int:
    return _NAT[hook] if table is Table.NAT else _PRIORITIES[table]
