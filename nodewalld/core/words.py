"""Netfilter's own words, typed. Everything here is a constant of iptables(8) or of the kernel."""

from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network

Network = IPv4Network | IPv6Network


class Family(StrEnum):
    """An address family; iptables and ip6tables are two worlds that succeed and fail apart."""

    IPV4 = "ipv4"
    IPV6 = "ipv6"

    @property
    def version(self) -> int:
        """4 or 6, as `ipaddress` counts."""
        return 4 if self is Family.IPV4 else 6

    @property
    def tool(self) -> str:
        """The name that iptables(8) gives its tools in this family."""
        return "iptables" if self is Family.IPV4 else "ip6tables"


class Backend(StrEnum):
    """Which half of the kernel holds the iptables rules."""

    NFT = "nft"
    LEGACY = "legacy"


class Table(StrEnum):
    """A table, in the order in which a packet meets them at one hook."""

    RAW = "raw"
    MANGLE = "mangle"
    NAT = "nat"
    FILTER = "filter"
    SECURITY = "security"

    @property
    def builtin_chains(self) -> tuple[str, ...]:
        """The chains that the kernel always has in this table (iptables(8), TABLES)."""
        return _BUILTIN_CHAINS[self]


_BUILTIN_CHAINS = {
    Table.RAW: ("PREROUTING", "OUTPUT"),
    Table.MANGLE: ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"),
    Table.NAT: ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
    Table.FILTER: ("INPUT", "FORWARD", "OUTPUT"),
    Table.SECURITY: ("INPUT", "FORWARD", "OUTPUT"),
}

CHAIN_NAME_MAX = 28
"""XT_EXTENSION_MAXNAMELEN - 1: the longest chain name that both backends take."""
