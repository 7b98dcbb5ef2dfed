"""[zone.*]: one zone for each packet to this node, by its source, else by its interface.

Laws: the longest prefix first, sets (which count as hosts) before all, interfaces last; the first that holds the packet
is its zone, and no other sees it. What IP needs to work passes before a zone is asked (RFC 4890; neighbour discovery,
IGMP and MLD, DHCP answers). Replies and loopback never come here.

The chains: zones lets pass what must, members sorts by source and interface, z-NAME judges; zones-o, members-o and
zo-NAME do the same for packets that somebody's DNAT has rewritten, by what was dialled; zx-NAME refuses.
"""

from collections.abc import Iterator, Sequence

from nodewalld.core.config import Action
from nodewalld.core.decide import ZoneDecision, prefix_length
from nodewalld.core.iptables.matches import log_words, origin_words, port_words, refuse_words, source_words
from nodewalld.core.iptables.writer import Writer, chain_name
from nodewalld.core.words import Family, Table

ZONES, ZONES_ORIGIN = chain_name("", "zones"), chain_name("", "zones-o")

# Destination unreachable, time exceeded, parameter problem, echo request (RFC 792).
_ICMP = ("3", "11", "12", "8")
# Errors, multicast listener discovery, neighbour and router discovery, their inverse and secure forms (RFC 4890).
_ICMPV6 = (*map(str, range(1, 5)), *map(str, range(128, 138)), "141", "142", "143", "148", "149")


def write_zones(writer: Writer, zones: Sequence[ZoneDecision]) -> None:
    """Write the sorting and the judging chains of all zones, in mangle."""
    for suffix, kind in (("", "z"), ("-o", "zo")):
        chain, icmp, members = (chain_name("", f"{name}{suffix}") for name in ("zones", "icmp", "members"))
        protocol, types, others = _essential(writer.family)
        writer.add(Table.MANGLE, chain, "zones", ("-p", protocol), ("-g", icmp))
        for other in others:
            writer.add(Table.MANGLE, chain, "zones", other, ("-j", "RETURN"))
        for each in types:
            writer.add(Table.MANGLE, icmp, "zones", ("-p", protocol), each, ("-j", "RETURN"))
        writer.add(Table.MANGLE, chain, "zones", ("-g", members))
        writer.add(Table.MANGLE, icmp, "zones", ("-g", members))
        for zone, words in _members(zones):
            writer.add(Table.MANGLE, members, zone.entry, words, ("-g", chain_name(kind, zone.name)))
    for zone in zones:
        _write_zone(writer, zone)


def _members(zones: Sequence[ZoneDecision]) -> Iterator[tuple[ZoneDecision, Sequence[str]]]:
    sources = [(source, zone) for zone in zones for source in zone.sources]
    for source, zone in sorted(sources, key=lambda pair: -prefix_length(pair[0])):
        yield zone, source_words(source)
    for zone in zones:
        yield from ((zone, ("-i", name)) for name in zone.interfaces)


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
        for words in log_words(zone.verdict):
            writer.add(Table.MANGLE, refuse, zone.entry, words)
        final = refuse_words(writer.decisions, zone.verdict) if zone.verdict.enforce else ()
        writer.add(Table.MANGLE, refuse, zone.entry, final)


def _essential(family: Family) -> tuple[str, list[tuple[str, ...]], list[tuple[str, ...]]]:
    """What IP itself needs: the family's ICMP and its types that pass, and what else passes."""
    if family is Family.IPV4:
        dhcp = ("-p", "udp", "-m", "udp", "--sport", "67", "--dport", "68")
        return "icmp", [("-m", "icmp", "--icmp-type", number) for number in _ICMP], [("-p", "2"), dhcp]
    dhcpv6 = ("-s", "fe80::/10", "-p", "udp", "-m", "udp", "--dport", "546")
    return "ipv6-icmp", [("-m", "icmp6", "--icmpv6-type", number) for number in _ICMPV6], [dhcpv6]
