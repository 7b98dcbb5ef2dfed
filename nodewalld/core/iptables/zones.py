"""[zone.*]: one zone for each packet to this node, by its source, else by its interface.

Laws: the longest prefix first, sets (which count as hosts) before all, interfaces last, and of these the longest name;
the first that holds the packet is its zone, and no other sees it. What IP needs to work passes before a zone is asked
(RFC 4890; neighbour discovery, IGMP and MLD, DHCP answers). Replies and loopback never come here.

The chains: zones lets pass what must, members sorts by source and interface, z-NAME judges; zones-o, members-o and
zo-NAME do the same for packets that somebody's DNAT has rewritten, by what was dialled; zx-NAME refuses. zones-1 and
members-1 are for the first judgement where a zone is not enforced.
"""

from collections.abc import Sequence

from nodewalld.core.common import ICMP, ICMPV6, zone_members
from nodewalld.core.config import Action
from nodewalld.core.decide import ZoneDecision
from nodewalld.core.iptables.matches import origin_words, port_words, refusal_words, source_words
from nodewalld.core.iptables.writer import Writer, chain_name
from nodewalld.core.words import Family, Table

ZONES, ZONES_ORIGIN, _ZONES_FIRST = (chain_name("", name) for name in ("zones", "zones-o", "zones-1"))


def first_zones(zones: Sequence[ZoneDecision]) -> str:
    """The chain for the first judgement, without zones that are not enforced: each packet is counted once."""
    return ZONES if all(zone.verdict.enforce for zone in zones) else _ZONES_FIRST


def write_zones(writer: Writer, zones: Sequence[ZoneDecision]) -> None:
    """Write the sorting and the judging chains of all zones, in mangle."""
    for first, kind in dict.fromkeys(((ZONES, "z"), (ZONES_ORIGIN, "zo"), (first_zones(zones), "z"))):
        suffix = first.removeprefix(ZONES)
        icmp, members = (chain_name("", f"{name}{suffix}") for name in ("icmp", "members"))
        protocol, types, others = _essential(writer.family)
        writer.add(Table.MANGLE, first, "zones", ("-p", protocol), ("-g", icmp))
        for other in others:
            writer.add(Table.MANGLE, first, "zones", other, ("-j", "RETURN"))
        for each in types:
            writer.add(Table.MANGLE, icmp, "zones", ("-p", protocol), each, ("-j", "RETURN"))
        writer.add(Table.MANGLE, first, "zones", ("-g", members))
        writer.add(Table.MANGLE, icmp, "zones", ("-g", members))
        for zone, member in zone_members(zones):
            words = ("-i", member) if isinstance(member, str) else source_words(member)
            judged = zone.verdict.enforce or first != _ZONES_FIRST
            target = ("-g", chain_name(kind, zone.name)) if judged else ("-j", "RETURN")
            writer.add(Table.MANGLE, members, zone.entry, words, target)
    for zone in zones:
        _write_zone(writer, zone)


def _write_zone(writer: Writer, zone: ZoneDecision) -> None:
    refuse = chain_name("zx", zone.name)
    by_port = {
        "z": list(port_words(zone.ports)),
        "zo": [origin_words(service) for service in zone.ports],
    }
    for kind, matches in by_port.items():
        judge = chain_name(kind, zone.name)
        for words in (*matches, *(("-p", protocol) for protocol in zone.protocols)):
            writer.add(Table.MANGLE, judge, zone.entry, words, ("-j", "RETURN"))
        target = ("-j", "RETURN") if zone.verdict.action is Action.ACCEPT else ("-g", refuse)
        writer.add(Table.MANGLE, judge, zone.entry, target)
    if zone.verdict.action is not Action.ACCEPT:
        for words in refusal_words(writer.decisions, zone.verdict):
            writer.add(Table.MANGLE, refuse, zone.entry, words)


def _essential(family: Family) -> tuple[str, list[tuple[str, ...]], list[tuple[str, ...]]]:
    """What IP itself needs: the family's ICMP and its types that pass, and what else passes."""
    if family is Family.IPV4:
        dhcp = ("-p", "udp", "-m", "udp", "--dport", "68")
        return "icmp", [("-m", "icmp", "--icmp-type", str(number)) for number in ICMP], [("-p", "2"), dhcp]
    dhcpv6 = ("-s", "fe80::/10", "-p", "udp", "-m", "udp", "--dport", "546")
    return "ipv6-icmp", [("-m", "icmp6", "--icmpv6-type", str(number)) for number in ICMPV6], [dhcpv6]
