"""The doors of a node: where somebody listens, and what its nat rules lead elsewhere, each with what it is.

Law: a door is only where somebody could knock; whether it opens is for `judge`. So a rule that seems to lead somewhere
is a door, and rather one too many than one too few. Left out are the addresses of Services within the cluster.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from nodewalld.core.words import Family, Table
from nodewalld.walk.hooks import PREROUTING
from nodewalld.walk.nft import NftRule
from nodewalld.walk.packet import PROTOCOLS, TCP, UDP, WITH_PORTS, Ports
from nodewalld.walk.reading import address, network, port_range, protocol_number
from nodewalld.walk.rules import Chain, Rule
from nodewalld.walk.world import BaseChain, World

ALL_PORTS: Ports = (1, 65535)
_LEADS = frozenset({"DNAT", "REDIRECT", "NETMAP", "TPROXY"})
_KINDS = (
    ("KUBE-NODEPORTS", "NodePort"),
    ("CNI-", "hostPort"),
    ("DOCKER", "Docker"),
    ("NETAVARK-", "Podman"),
)
"""Whose chain it is, by how its name begins: kube-proxy, the plugin portmap, dockerd, netavark."""
_OUTSIDE = {"loadbalancer IP": "LoadBalancer", "external IP": "external IP"}
"""What kube-proxy writes behind a Service's name, where it isn't "cluster IP" (pkg/proxy/iptables/proxier.go)."""
_ID = re.compile(r'\bid: "?(?P<id>[^" ]{1,12})')
_NFT_PORT = re.compile(r"\b(?P<protocol>tcp|udp|sctp) dport (?P<ports>\d+(?:-\d+)?)")
_NFT_KEY = re.compile(r"\bth dport (?:(?P<address>[\da-f.:]+) \. )?(?P<protocol>tcp|udp|sctp) \. (?P<ports>\d+)")
_NFT_SERVICE = re.compile(
    r"(?P<kind>service|external|firewall)-[A-Z2-7]+(?:-(?P<space>[^/]+)/(?P<name>[^/]+)/\w+/(?P<port>.*))?"
)


@dataclass(frozen=True, slots=True)
class Door:
    """One place to knock at. `address` None is any of this node's own; with a `device` only by that interface.

    `kind` is a word for people ("listener", "NodePort", "Docker"), `name` the program or the Service, or "".
    """

    protocol: int
    ports: Ports
    address: int | None
    kind: str
    name: str = ""
    device: str = ""


@dataclass(frozen=True, slots=True)
class Listener:
    """A socket that takes what comes to a port: `address` None on all of the family's."""

    family: Family
    protocol: int
    address: int | None
    port: int
    device: str = ""
    name: str = ""
    kind: str = "listener"

    def takes(self, protocol: int, to: int, ports: Ports) -> bool:
        """Whether a packet that is delivered to this address may be for it."""
        return self.protocol == protocol and self.address in {None, to} and ports[0] <= self.port <= ports[1]

    @property
    def door(self) -> Door:
        """The door that it is."""
        return Door(self.protocol, (self.port, self.port), self.address, self.kind, self.name, self.device)


def doors(world: World) -> tuple[Door, ...]:
    """Every door that nat rules make: NodePorts, hostPorts, published ports, external addresses, and others' DNAT."""
    found: dict[object, Door] = {}
    for chains, base in _tables(world):
        for door in _Search(chains, world.family, set()).within(base, Door(0, (0, 0), None, "")):
            found.setdefault((door.protocol, door.ports, door.address), door)
    return tuple(found.values())


def _tables(world: World) -> Iterator[tuple[Mapping[str, Chain], str]]:
    for ruleset in world.rules.values():
        chains = ruleset.tables.get(Table.NAT, {})
        if PREROUTING in chains:
            yield chains, PREROUTING
    for other in world.others:
        if isinstance(other, BaseChain) and other.nat and other.hook == PREROUTING:
            yield other.chains, other.base


@dataclass(frozen=True)
class _Search:
    chains: Mapping[str, Chain]
    family: Family
    seen: set[object]

    def within(self, name: str, known: Door) -> Iterator[Door]:
        """The doors behind a chain; `known` is what the rules on the way to it have said."""
        if (name, known) in self.seen:
            return
        self.seen.add((name, known))
        for rule in self.chains[name].rules:
            if rule.tag or (rule.target not in self.chains and rule.target not in _LEADS):
                continue
            for told in self._told(rule, known):
                if told.ports != (0, 0):
                    yield from _named(rule, told)
                elif rule.target in self.chains:
                    yield from self.within(rule.target, told)
                elif told.address is not None:
                    # An address that is mapped to another as a whole.
                    for protocol in (told.protocol,) if told.protocol else (TCP, UDP):
                        yield from _named(rule, replace(told, protocol=protocol, ports=ALL_PORTS))

    def _told(self, rule: Rule, known: Door) -> Iterator[Door]:
        """What is known behind a rule, once for each port that it names."""
        return _nft(rule, known, self.family) if isinstance(rule, NftRule) else _iptables(rule, known, self.family)


def _iptables(rule: Rule, known: Door, family: Family) -> Iterator[Door]:
    ports: list[str] = []
    for option in (option for _, options in rule.parsed.conditions for option in options if not option.negated):
        if option.name == "-p":
            try:
                known = replace(known, protocol=protocol_number(option.words[0]))
            except KeyError:
                return  # none that has ports
        elif option.name == "-d":
            known = replace(known, address=network(option.words[0], family)[0])
        elif option.name in {"--dport", "--dports", "--ports"}:
            ports = option.words[0].split(",")
    if known.protocol and known.protocol not in WITH_PORTS:
        return
    for text in ports:
        yield replace(known, ports=port_range(text))
    if not ports:
        yield known


def _nft(rule: NftRule, known: Door, family: Family) -> Iterator[Door]:
    text = " ".join(condition.spelled for condition in rule.conditions)
    found = _NFT_KEY.search(text) or _NFT_PORT.search(text)
    if not found:
        yield known
        return
    first, _, last = found["ports"].partition("-")
    to = found.groupdict().get("address")
    own = address(to, family) if to else known.address
    yield replace(known, protocol=PROTOCOLS[found["protocol"]], ports=(int(first), int(last or first)), address=own)


def _named(rule: Rule, door: Door) -> Iterator[Door]:
    """The door with what it is; nothing for a Service's address within the cluster."""
    if isinstance(rule, NftRule) and (service := _NFT_SERVICE.fullmatch(rule.target)):
        if service["kind"] != "service":
            kind = "NodePort" if door.address is None else "LoadBalancer"
            name = f"{service['space']}/{service['name']}:{service['port']}" if service["name"] else ""
            yield replace(door, kind=kind, name=name.removesuffix(":"))
        return
    comment = _comment(rule)
    if rule.chain == "KUBE-SERVICES":
        for ending, kind in _OUTSIDE.items():
            if comment.endswith(ending):
                yield replace(door, kind=kind, name=comment.removesuffix(ending).rstrip())
        return
    kind = next((kind for start, kind in _KINDS if rule.chain.startswith(start)), "")
    if kind == "NodePort":
        yield replace(door, kind=kind, name=comment)
    elif kind:
        found = _ID.search(comment)
        yield replace(door, kind=kind, name=found["id"] if found else "")
    else:
        yield replace(door, kind="DNAT", name=f"{rule.chain} {rule.number}")


def _comment(rule: Rule) -> str:
    for module, options in rule.parsed.conditions:
        for option in options if module == "comment" else ():
            return option.words[0] if option.words else ""
    return ""
