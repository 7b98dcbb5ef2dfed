"""The base chains of nf_tables that aren't iptables': found through netlink, read by the program nft where it is there.

Law: a chain that can't be read is told as it stands, never left out. Sources: include/uapi/linux/netfilter/nf_tables.h
(NFTA_CHAIN_*, NFTA_HOOK_*), include/uapi/linux/netfilter.h (hooks, families).
"""

import json
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from nodewalld.core.words import Family, Table
from nodewalld.kernel.netlink import BODY, NLM_F_DUMP, NetlinkSocket, netfilter_body, spans, string
from nodewalld.kernel.process import ProgramError, installed, run
from nodewalld.walk import BaseChain, Unread, read_table

_GETCHAIN = 10 << 8 | 4
_TABLE, _NAME, _HOOK = 1, 3, 4
_HOOK_NUMBER, _HOOK_PRIORITY, _HOOK_DEVICE = 1, 2, 3
_FAMILIES = {1: "inet", 2: "ip", 5: "netdev", 10: "ip6"}
_HOOKS = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")
_SEEN_BY = {Family.IPV4: ("ip", "inet"), Family.IPV6: ("ip6", "inet")}
_INGRESS_OF_INET = 5
_FIRST, _LAST = -(1 << 31), (1 << 31) - 1
_PATIENCE = 30.0  # seconds


class _Base(NamedTuple):
    """A base chain as the kernel lists it."""

    family: str
    table: str
    name: str
    hook: int
    priority: int
    device: str

    @property
    def place(self) -> str:
        return f"nft table {self.family} {self.table}, chain {self.name}"

    @property
    def of_iptables(self) -> bool:
        return self.family in {"ip", "ip6"} and self.table in set(Table) and self.name in _HOOKS


def base_chains(family: Family) -> tuple[BaseChain | Unread, ...]:
    """Those that packets of a family pass. Raises NetlinkError or ProgramError."""
    found = [base for base in _listed() if not base.of_iptables]
    readable = [base for base in found if base.family in _SEEN_BY[family] and base.hook < len(_HOOKS)]
    if not installed("nft"):
        read: list[BaseChain | Unread] = [Unread(b.place, _HOOKS[b.hook], b.priority) for b in readable]
    else:
        tables = dict.fromkeys((base.family, base.table) for base in readable)
        read = [chain for table in tables for chain in read_table(_table(*table))]
    return (*read, *_on_devices(found, family))


def _on_devices(found: list[_Base], family: Family) -> Iterator[Unread]:
    """Chains at ingress, before everything, and at egress, after it."""
    for base in found:
        ingress = base.hook == (0 if base.family == "netdev" else _INGRESS_OF_INET)
        if base.family == "netdev" or (base.family in _SEEN_BY[family] and ingress):
            hook, priority = ("PREROUTING", _FIRST) if ingress else ("POSTROUTING", _LAST)
            yield Unread(base.place, hook, priority, base.device)


def _listed() -> Iterator[_Base]:
    with NetlinkSocket() as netlink:
        answers = netlink.ask(_GETCHAIN, NLM_F_DUMP, netfilter_body(0), "list the base chains")
    for _, answer in answers:
        found = spans(answer, BODY, len(answer))
        family = _FAMILIES.get(answer[16], "")
        if _HOOK not in found or not family:
            continue
        hook = spans(answer, *found[_HOOK])
        number, priority = (
            struct.unpack(layout, answer[slice(*hook[kind])])[0]
            for layout, kind in ((">I", _HOOK_NUMBER), (">i", _HOOK_PRIORITY))
        )
        device = string(answer, *hook[_HOOK_DEVICE]) if _HOOK_DEVICE in hook else ""
        yield _Base(family, string(answer, *found[_TABLE]), string(answer, *found[_NAME]), number, priority, device)


def _table(family: str, name: str) -> list[dict[str, Any]]:
    result = run(["nft", "-j", "list", "table", family, name], timeout=_PATIENCE)
    if result.status:
        raise ProgramError(f"nft list table {family} {name}: {result.stderr.strip()}")
    found: list[dict[str, Any]] = json.loads(result.stdout or "{}").get("nftables", [])
    return found
