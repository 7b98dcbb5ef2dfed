"""What of this node faces the world: sockets that listen, Services of IPVS, and interfaces that lead outside.

Laws: read by `ss` and `ip`, which know the kernel's own words; nothing is changed. A line that isn't understood is an
error, never a socket less.
"""

import ipaddress
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nodewalld.core.words import Family
from nodewalld.kernel.process import ProgramError, run
from nodewalld.walk import TCP, UDP, Kind, World
from nodewalld.walk.doors import Listener

_PATIENCE = 30.0  # seconds
_PROTOCOLS = {"tcp": TCP, "udp": UDP}
_LOCAL = re.compile(
    r"(?:\[(?P<six>[\da-f:.]+)(?:%(?P<inner>[^\]]+))?\]|(?P<four>[\d.]+)|\*)(?:%(?P<device>.+))?:(?P<port>\d+)"
)
_PROGRAM = re.compile(r'\("((?:[^"\\]|\\.)*)",pid=\d+')
_WITHIN = frozenset(
    {"bridge", "veth", "dummy", "vxlan", "geneve", "ipip", "sit", "ip6tnl", "gre", "gretap", "ifb", "nlmon", "vcan"}
)
"""Kinds of links (`ip -d link`) that lead to pods, containers and other nodes of the cluster."""


def listeners(family: Family) -> tuple[Listener, ...]:
    """Who listens, in one family. Raises ProgramError."""
    # A socket bound to all addresses of both families has "*" for its address, one of IPv6 alone "[::]".
    result = run(["ss", "-H", "-n", "-l", "-t", "-u", "-p"], timeout=_PATIENCE)
    if result.status:
        raise ProgramError(f"ss: {result.stderr.strip() or 'failed without a word'}")
    found = [each for line in result.stdout.splitlines() if line.strip() for each in read_socket(line)]
    services = Path("/proc/net/ip_vs")
    if services.exists():
        found += read_ipvs(services.read_text())
    return tuple(dict.fromkeys(each for each in found if each.family is family))


def read_socket(line: str) -> Iterator[Listener]:
    """One line of ss: the listener, or two for a socket of both families. Raises ProgramError."""
    words = line.split(None, 6)
    local = _LOCAL.fullmatch(words[4]) if len(words) > 4 else None
    if local is None or words[0] not in _PROTOCOLS:
        raise ProgramError(f"ss prints what is not understood: {line.strip()}")
    name = ", ".join(dict.fromkeys(_PROGRAM.findall(words[6] if len(words) > 6 else "")))
    text = local["four"] or local["six"]
    address = ipaddress.ip_address(text) if text else None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    for family in Family:
        if address is None or address.version == family.version:
            to = int(address) if address and int(address) else None
            device = local["device"] or local["inner"] or ""
            yield Listener(family, _PROTOCOLS[words[0]], to, int(local["port"]), device, name)


def read_ipvs(text: str) -> Iterator[Listener]:
    """The virtual services of /proc/net/ip_vs (ip_vs_info_seq_show in net/netfilter/ipvs/ip_vs_ctl.c)."""
    for line in text.splitlines():
        words = line.split()
        if words[:1] not in (["TCP"], ["UDP"]):
            continue
        host, _, port = words[1].rpartition(":")
        six = host.startswith("[")
        to = int(ipaddress.IPv6Address(host.strip("[]"))) if six else int(host, 16)
        family = Family.IPV6 if six else Family.IPV4
        yield Listener(family, _PROTOCOLS[words[0].lower()], to, int(port, 16), kind="IPVS")


def outward(world: World) -> tuple[str, ...]:
    """The interfaces that lead outside in the world's family: first those with a default route. Raises ProgramError."""
    result = run(["ip", "-d", "-j", "link", "show", "up"], timeout=_PATIENCE)
    if result.status:
        raise ProgramError(f"ip link: {result.stderr.strip()}")
    return leading_outside(json.loads(result.stdout or "[]"), world)


def leading_outside(links: Iterable[Mapping[str, Any]], world: World) -> tuple[str, ...]:
    """Which of these links, as `ip -d -j link` prints them, have a default route, or an address and no pods behind."""
    up = {str(link["ifname"]): link for link in links if link}  # ip prints {} for each that is down
    routes = world.routes.routes
    defaults = [route.device for route in routes if not route.length and route.kind is Kind.UNICAST]
    others = [
        name
        for name, link in up.items()
        if not link.get("master")
        and link.get("linkinfo", {}).get("info_kind") not in _WITHIN
        and world.addresses.get(name)
    ]
    return tuple(name for name in dict.fromkeys((*defaults, *others)) if name in up and name != "lo")
