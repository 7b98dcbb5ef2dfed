"""The conditions of the shield for what a configuration names. No chain is known here."""

import ipaddress
from collections.abc import Iterable

from nodewalld.core.config import PortRange
from nodewalld.core.shield.rules import Link, Match, Port, Ports, Protocol, Side, Within
from nodewalld.core.words import Family

LOOPBACK = {Family.IPV4: ipaddress.ip_network("127.0.0.0/8"), Family.IPV6: ipaddress.ip_network("::1/128")}
MULTICAST = ipaddress.ip_network("ff00::/8")

_NUMBERS = {"icmp": 1, "tcp": 6, "udp": 17, "esp": 50, "ah": 51, "icmpv6": 58, "sctp": 132, "udplite": 136}
_IGMP = 2
_LINK_LOCAL = ipaddress.ip_network("fe80::/10")


def named_protocol(name: str) -> Protocol:
    """An IP protocol, as a configuration has it for iptables: a number, or one of the names that iptables knows."""
    return Protocol(int(name) if name.isdigit() else _NUMBERS[name])


def icmp_protocol(family: Family) -> Protocol:
    """ICMP of a family."""
    return named_protocol("icmp" if family is Family.IPV4 else "icmpv6")


def passing(family: Family) -> tuple[tuple[Match, ...], ...]:
    """What no zone refuses beside ICMP: IGMP, and the answers of DHCP; in IPv6 what bears an authentication header.

    Legacy ip6tables looks behind that header (ipv6_find_hdr), nf_tables at it: so ip6tables alone judges such packets.
    """
    udp = named_protocol("udp")
    if family is Family.IPV4:
        return (Protocol(_IGMP),), (udp, Ports(Port.DIALLED, PortRange(68, 68)))
    answers = Within(Side.SOURCE, _LINK_LOCAL), udp, Ports(Port.DIALLED, PortRange(546, 546))
    return answers, (named_protocol("ah"),)


def links(names: Iterable[str], *, outgoing: bool) -> list[tuple[Match, ...]]:
    """A condition for each interface; a mere "+" is none."""
    return [(Link(name, outgoing),) if name != "+" else () for name in names]
