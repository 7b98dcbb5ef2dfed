"""What a spot that a traced packet has come to says: the rule's text, or the chain's policy.

Law: a text is only given for the very rule. nf_tables names rules by handles, which don't come again. A legacy table is
read before the packets and again whenever it has changed since; what it said between is not known, and then a text is
marked as uncertain.

Tables that aren't iptables' are read with nft(8), where it is installed.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from nodewalld.core.ruletext import Rule
from nodewalld.core.tracing.path import Kind, Spot
from nodewalld.core.tracing.story import Said
from nodewalld.core.words import Backend, Family, Table
from nodewalld.kernel.firewall import Fingerprint, FirewallError, NftFirewall, parse_chains, tool
from nodewalld.kernel.nftables import NftablesReader
from nodewalld.kernel.process import ProgramError, run
from nodewalld.kernel.xtables import LegacyReader

_FAMILIES = {"ip": Family.IPV4, "ip6": Family.IPV6}
_TABLES = frozenset(table.value for table in Table)
_POLICY = re.compile(r"^:(\S+) ([A-Z]+)", re.MULTILINE)
_HANDLE = re.compile(r"\s*(?P<text>.*\S)\s+# handle (?P<handle>\d+)")


@dataclass
class _LegacyTable:
    """A table as it was when its fingerprint was taken."""

    fingerprint: Fingerprint
    chains: dict[str, tuple[Rule, ...]]
    policies: dict[str, str] = field(default_factory=dict)


class RuleTexts:
    """Reads rules when a packet has come to them, and keeps what it has read."""

    def __init__(self) -> None:
        self._nft: dict[Family, NftFirewall] = {}
        self._native: dict[tuple[str, str, str], dict[int, tuple[int, str]]] = {}
        self._legacy: dict[tuple[Family, str], _LegacyTable] = {}
        self._readers: dict[Family, LegacyReader] = {}
        self._sure: dict[tuple[Family, str], bool] = {}  # of the packet that is looked at

    def close(self) -> None:
        """Close the sockets."""
        for firewall in self._nft.values():
            firewall.close()
        for reader in self._readers.values():
            reader.close()

    def prepare(self, families: Iterable[Family]) -> None:
        """Read the legacy tables of these families, before packets come. Raises OSError."""
        for family in families:
            for table in self._reader(family).tables():
                self._legacy_table(family, table)

    def look(self, spots: Iterable[Spot]) -> list[Said]:
        """What stands at the spots of one packet."""
        self._sure.clear()
        return [self._in_legacy(spot) if spot.backend is Backend.LEGACY else self._in_nft(spot) for spot in spots]

    # nf_tables

    def _in_nft(self, spot: Spot) -> Said:
        if spot.kind is not Kind.RULE:
            return Said(kind=spot.kind)
        number, text = self._by_handle(spot) or (None, "")
        return Said(text, number, sure=bool(text))

    def _by_handle(self, spot: Spot) -> tuple[int, str] | None:
        family = _FAMILIES.get(spot.tables)
        if family is not None and spot.table in _TABLES:
            try:
                return self._of_iptables(family, spot)
            except (FirewallError, OSError):
                pass  # the table bears iptables' name and isn't, or can't be read now
        key = (spot.tables, spot.table, spot.chain)
        if spot.number not in self._native.get(key, {}):
            self._native[key] = _listed(*key)
        return self._native[key].get(spot.number)

    def _of_iptables(self, family: Family, spot: Spot) -> tuple[int, str] | None:
        if family not in self._nft:
            self._nft[family] = NftFirewall(family, NftablesReader())
        observed = self._nft[family].observe(Table(spot.table), [spot.chain])
        handles = observed.handles.get(spot.chain, ())
        if spot.number not in handles:
            return None
        index = handles.index(spot.number)
        return index + 1, observed.chains[spot.chain][index].text

    # Legacy

    def _in_legacy(self, spot: Spot) -> Said:
        key = _FAMILIES[spot.tables], spot.table
        if key not in self._sure:
            before = self._legacy.get(key)
            try:
                self._sure[key] = before is self._legacy_table(*key)
            except (OSError, ProgramError):
                return Said(sure=False, kind=spot.kind)
        table, sure = self._legacy[key], self._sure[key]
        rules = table.chains.get(spot.chain, ())
        # x_tables calls every unconditional verdict of a chain its policy, or a return.
        if 0 < spot.number <= len(rules):
            return Said(rules[spot.number - 1].text, spot.number, sure=sure)
        policy = table.policies.get(spot.chain, "").lower() if spot.kind is Kind.POLICY else ""
        return Said(policy=policy, sure=sure and spot.kind is not Kind.RULE, kind=spot.kind)

    def _legacy_table(self, family: Family, name: str) -> _LegacyTable:
        """The table as it is now, read anew only if it has changed."""
        fingerprint = self._reader(family).fingerprint(name)
        held = self._legacy.get((family, name))
        if held is None or held.fingerprint != fingerprint:
            text = run([tool(family, Backend.LEGACY, "save"), "-t", name]).stdout
            held = _LegacyTable(fingerprint, parse_chains(text), dict(_POLICY.findall(text)))
            self._legacy[family, name] = held
        return held

    def _reader(self, family: Family) -> LegacyReader:
        if family not in self._readers:
            self._readers[family] = LegacyReader(family)
        return self._readers[family]


def _listed(tables: str, table: str, chain: str) -> dict[int, tuple[int, str]]:
    """The rules of a chain by handle, each with its number, in nft's words; none where nft isn't installed."""
    try:
        result = run(["nft", "-a", "list", "chain", tables, table, chain])
    except ProgramError:
        return {}
    lines = (_HANDLE.fullmatch(line) for line in result.stdout.splitlines())
    rules = [found for found in lines if found and not found["text"].endswith("{")]
    return {int(found["handle"]): (number, found["text"]) for number, found in enumerate(rules, 1)}
