"""`[zone.*]` and `[service.*]`: who belongs to a zone, and what it allows with all that it includes.

Law: every packet belongs to one zone, so what would put it into two is an error here and no question of order later.
"""

from collections.abc import Mapping
from typing import Any

from nodewalld.configuration.entries import ENFORCE
from nodewalld.configuration.peers import peer
from nodewalld.configuration.reading import (
    FieldError,
    Key,
    Reading,
    Section,
    Shape,
    listed,
    nearest,
    read_table,
    table,
    takes,
)
from nodewalld.configuration.services import BUILT_IN
from nodewalld.configuration.tree import Node, child_key, is_name, show
from nodewalld.configuration.values import (
    NAME,
    bad_name,
    boolean,
    choice,
    interface,
    line,
    name,
    protocol,
    protocol_ports,
)
from nodewalld.core.config import DEFAULT_ROUTE, Action, Peer, ProtocolPorts, Service, SetRef, ZoneEntry

_TARGETS = {action.value: action for action in (Action.ACCEPT, Action.DROP, Action.REJECT)}


@takes(protocol.schema)
def _one_protocol(node: Node, reading: Reading) -> str:
    found = protocol(node, reading)
    if not found:
        raise FieldError(node, "any would allow everything", 'target = "accept"')
    return found


@takes(interface.schema)
def _one_interface(node: Node, reading: Reading) -> str:
    found = interface(node, reading)
    if found == DEFAULT_ROUTE:
        raise FieldError(node, f"{DEFAULT_ROUTE} has no place in a zone", "the name of the interface")
    return found


_PORTS = Key(
    listed(protocol_ports, example='["30443/tcp"]'), '`"PORT/PROTOCOL"` or `"FIRST-LAST/PROTOCOL"`', default=[]
)
_PROTOCOLS = Key(
    listed(_one_protocol, example='["ipip"]'),
    'IP protocols by name or number, such as `"ipip"`, `"esp"`, `"gre"`, `"vrrp"`',
    default=[],
)

SERVICE = Section(Shape.NAMED, "A name for ports and protocols", {"ports": _PORTS, "protocols": _PROTOCOLS}, names=NAME)

ZONE = Section(
    Shape.NAMED,
    "Packets to this node by where they come from, and what they may reach",
    {
        "target": Key(
            choice(_TARGETS), 'what is not named below: `"accept"`, `"drop"` or `"reject"`', example='target = "drop"'
        ),
        "sources": Key(
            listed(peer, example='["10.0.0.0/8", "@SET"]'),
            'addresses, CIDRs and sets (`"@NAME"`) that belong to the zone',
            default=[],
        ),
        "interfaces": Key(
            listed(_one_interface, example='["ens18"]', unique=True),
            "interfaces that belong to it; `+` at the end is a wildcard. A full name wins over a wildcard, the longer "
            "wildcard over the shorter",
            default=[],
        ),
        "include": Key(
            listed(name, example='["public"]'),
            "zones whose services, ports and protocols are allowed here as well",
            default=[],
        ),
        "services": Key(
            listed(line, example='["ssh"]'),
            "names of services: the built-in ones below, or `[service.NAME]`",
            default=[],
        ),
        "ports": _PORTS,
        "protocols": _PROTOCOLS,
        "log": Key(boolean, "log what is refused, rate-limited, with the prefix `nodewall:NAME `", default=False),
        "enforce": ENFORCE,
    },
    names=NAME,
)


_AS_READ = ("sources", "interfaces", "target", "log", "enforce")


def zones(top: Mapping[str, Node], reading: Reading) -> tuple[ZoneEntry, ...]:
    """The zones of a configuration, each with what it allows written out."""
    services = {**BUILT_IN, **_services(top, reading)}
    nodes = _named(top, "zone", reading)
    fields = {called: read_table(node, ZONE.keys, reading) for called, node in nodes.items()}
    _refuse_shared(nodes, fields, reading)
    own = {called: _own(nodes[called], fields[called], services, reading) for called in nodes}
    found = []
    for called, node in nodes.items():
        allowed = [own[each] for each in _included(called, nodes, fields, reading)]
        read = {key: fields[called][key] for key in _AS_READ if key in fields[called]}
        if len(read) < len(_AS_READ):
            continue
        if not read["sources"] and not read["interfaces"]:
            message = "has neither sources nor interfaces: no packet belongs to it"
            reading.warn(node, "empty-zone", message, "sources = [...]")
        ports = tuple(dict.fromkeys(ports for service in allowed for ports in service.ports))
        protocols = tuple(dict.fromkeys(protocol for service in allowed for protocol in service.protocols))
        found.append(ZoneEntry(name=called, ports=ports, protocols=protocols, where=node.where, **read))
    return tuple(found)


def _named(top: Mapping[str, Node], kind: str, reading: Reading) -> dict[str, Node]:
    """The tables of one kind by their names."""
    if kind not in top:
        return {}
    nodes = top[kind].value
    if not isinstance(nodes, dict):
        reading.refuse(top[kind], f"must be a table, not {top[kind].kind}", f"[{kind}.NAME]")
        return {}
    first: dict[str, Node] = {}
    for called, node in nodes.items():
        if not is_name(called):
            reading.refuse(node, *bad_name(called))
        other = first.setdefault(called.lower(), node)
        if other is not node:
            place = f"{other.where.file}:{other.where.line}"
            reading.refuse(node, f"{show(called)} is already the name of {place}", "another name")
    return {called: node for called, node in nodes.items() if reading.collect(lambda n, _: table(n), [node])}


def _services(top: Mapping[str, Node], reading: Reading) -> dict[str, Service]:
    found: dict[str, Service] = {}
    for called, node in _named(top, "service", reading).items():
        fields = read_table(node, SERVICE.keys, reading)
        if not fields.get("ports") and not fields.get("protocols") and not reading.problems:
            reading.refuse(node, "is empty, and would allow nothing", 'ports = ["8200/tcp"]')
        found[called] = Service(fields.get("ports", ()), fields.get("protocols", ()))
    return found


def _included(
    called: str, nodes: Mapping[str, Node], fields: Mapping[str, Mapping[str, Any]], reading: Reading
) -> list[str]:
    """The zone itself and all that it includes, directly or not."""
    order = [called]
    seen = {called}
    for each in order:
        for wanted in fields[each].get("include", ()):
            if wanted == called:
                reading.refuse(_at(nodes[each], "include"), f"{show(called)} includes itself", "leave one of them out")
            elif wanted not in nodes:
                if each == called and reading.complete:
                    near = nearest(wanted, nodes)
                    cure = f'did you mean "{near}"?' if near else f"define it as [zone.{wanted}]"
                    reading.refuse(_at(nodes[each], "include"), f"{show(wanted)} is not a zone", cure)
            elif wanted not in seen:
                seen.add(wanted)
                order.append(wanted)
    return order


def _own(node: Node, fields: Mapping[str, Any], services: Mapping[str, Service], reading: Reading) -> Service:
    """What a zone allows by itself."""
    ports: list[ProtocolPorts] = list(fields.get("ports", ()))
    protocols: list[str] = list(fields.get("protocols", ()))
    for wanted in fields.get("services", ()):
        if wanted in services:
            ports += services[wanted].ports
            protocols += services[wanted].protocols
        elif reading.complete:
            near = nearest(wanted, services)
            cure = f'did you mean "{near}"?' if near else f"define it as [service.{wanted}]"
            reading.refuse(_at(node, "services"), f"{show(wanted)} is no known service", cure)
    return Service(tuple(ports), tuple(protocols))


def _refuse_shared(nodes: Mapping[str, Node], fields: Mapping[str, Mapping[str, Any]], reading: Reading) -> None:
    """The same source or interface in two zones: the packet would belong to both."""
    owners: dict[Peer | str, str] = {}
    for called, own in fields.items():
        for key in ("sources", "interfaces"):
            for each in own.get(key, ()):
                owner = owners.setdefault(each, called)
                if owner != called:
                    message = f"{each if isinstance(each, str) else _shown(each)} belongs to zone {owner} already"
                    reading.refuse(_at(nodes[called], key), message, "one zone each; `include` shares what is allowed")


def _shown(member: Peer | str) -> str:
    return f"@{member.name}" if isinstance(member, SetRef) else str(member)


def _at(node: Node, key: str) -> Node:
    inner = node.value.get(key) if isinstance(node.value, dict) else None
    return inner or Node(node.value, node.where, child_key(node.key, key))
