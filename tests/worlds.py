"""Nodes as values, to walk packets through: what a captured ruleset names, as addresses and routes."""

import ipaddress
from collections.abc import Iterable, Mapping

from nodewalld.core.words import Backend, Family
from nodewalld.walk import TCP, Kind, Packet, Route, Routes, World, read

Network = ipaddress.IPv4Interface | ipaddress.IPv6Interface


def number(address: str) -> int:
    return int(ipaddress.ip_address(address))


def routes(addresses: Mapping[str, Iterable[str]], *, default: str = "", more: Iterable[Route] = ()) -> Routes:
    """Interfaces with their addresses (with prefix lengths) as the kernel would route by them."""
    interfaces = [(name, ipaddress.ip_interface(text)) for name, texts in addresses.items() for text in texts]
    bits = interfaces[0][1].max_prefixlen
    found = list(more)
    for name, interface in interfaces:
        own, network = int(interface.ip), interface.network
        found.append(Route(own, bits, name, Kind.LOCAL, source=own, table="local"))
        if bits == 32 and network.prefixlen < 31:
            found.append(Route(int(network.broadcast_address), 32, name, Kind.BROADCAST, table="local"))
        if network.prefixlen < bits:
            found.append(Route(int(network.network_address), network.prefixlen, name, source=own))
    loopback = (127 << 24, 8) if bits == 32 else (1, 128)
    found.append(Route(*loopback, "lo", Kind.LOCAL, table="local"))
    if default:
        found.append(Route(0, 0, default))
    return Routes(bits, tuple(found))


NODE = {"ens18": ("10.90.0.1/24",), "cni0": ("10.42.0.1/24",), "eth1": ("198.51.100.1/24",)}
NODE6 = {"ens18": ("fd90::1/64",), "cni0": ("fd42::1/64",), "eth1": ("2001:db8:b::1/64",)}


def world(text: str, backend: Backend = Backend.NFT, family: Family = Family.IPV4, **more: object) -> World:
    """The lab's node with these rules."""
    known = routes(NODE if family is Family.IPV4 else NODE6, default="ens18")
    return World(**({"family": family, "rules": {backend: read(text)}, "routes": known} | more))  # type: ignore[arg-type]


def packet(source: str, destination: str, port: int = 0, protocol: int = TCP, **more: object) -> Packet:
    """A packet that comes by ens18, unless it is said otherwise."""
    family = Family.IPV6 if ":" in destination else Family.IPV4
    given = {"inside": "" if more.get("from_node") else "ens18", "destination_ports": (port, port)} | more
    return Packet(family, protocol, number(source) if source else 0, number(destination), **given)  # type: ignore[arg-type]
