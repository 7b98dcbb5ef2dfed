"""What neighbours' live rules make of entries of ours: Services with more addresses, places that others insist on,
bits and set names in use.

Law: neighbours are known by the names of their chains; who is not seen in the live rules is not warned of.
"""

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import ip_address

from nodewalld.core.config import Action, Config, Destination, Place, PortEntry, Position, Problem, Where
from nodewalld.core.decide import kernel_set_name
from nodewalld.core.lints.dnat import (
    NODE_PORTS,
    External,
    NodePort,
    externals,
    node_ports,
    serves_by_ipvs,
)
from nodewalld.core.lints.facts import NodeFacts, every_foreign
from nodewalld.core.lints.texts import overlap
from nodewalld.core.ruletext import Rule
from nodewalld.core.words import Family, Table

_SET_TYPE = "hash:net"
_ALL_BITS = 0xFFFFFFFF
_BITS = re.compile(r"(?<!connmark )(?<!connmark ! )--(?:set-xmark|mark) (0x[0-9a-f]+|\d+)(?:/(0x[0-9a-f]+|\d+))?")
_OF_CONNECTIONS = " -j CONNMARK"  # that is another mark


def other_addresses(config: Config, facts: NodeFacts) -> Iterator[Problem]:
    """other-addresses: a guarded NodePort whose Service is reached by addresses that nothing guards."""
    served, open_ones = _served(config, facts), _unguarded(config, facts)
    for entry in config.ports:
        if not entry.enforce or entry.destination is not Destination.LOCAL:
            continue
        for family, ports in served.items():
            services = {port.service: port for port in ports if _guards(entry, port.protocol, port.port)}
            found = next((each for each in open_ones[family] if each.service in services), None)
            if found:
                yield _other_address(entry, services[found.service], found)
                break


def _served(config: Config, facts: NodeFacts) -> dict[Family, tuple[NodePort, ...]]:
    return {family: tuple(node_ports(facts.chains(family, Table.NAT))) for family in config.daemon.families}


def _unguarded(config: Config, facts: NodeFacts) -> dict[Family, tuple[External, ...]]:
    """The addresses of Services that no entry judges."""
    found = {}
    for family in config.daemon.families if config.ports else ():
        own = facts.environment.addresses.get(family, ())
        reached = externals(facts.chains(family, Table.NAT))
        found[family] = tuple(each for each in reached if not any(_covers(port, each, own) for port in config.ports))
    return found


def _guards(entry: PortEntry, protocol: str, port: int) -> bool:
    return protocol in entry.protocols and any(span.first <= port <= span.last for span in entry.ports)


def _covers(entry: PortEntry, external: External, own: Iterable[str]) -> bool:
    """Whether an entry judges what dials a Service's address."""
    if not entry.enforce or not _guards(entry, external.protocol, external.port):
        return False
    if entry.destination is Destination.LOCAL:
        return external.address in own
    if entry.destination is Destination.ANY:
        return True
    return any(ip_address(external.address) in network for network in entry.destination)


def _other_address(entry: PortEntry, port: NodePort, external: External) -> Problem:
    service = f" of {port.name}" if port.name else ""
    message = (
        f"{port.port}/{port.protocol} is a NodePort{service}; {external.address} port {external.port} leads there too, "
        "and no [[port]] judges that"
    )
    cure = f'a [[port]] with ports = [{external.port}] and destination = ["{external.address}"]'
    return Problem(entry.where, f"port.{entry.name}.destination", message, cure, "other-addresses")


def open_elsewhere(config: Config, facts: NodeFacts) -> Iterator[Problem]:
    """open-on-other-nodes: a note, once, that a NodePort is guarded on this node alone."""
    served = _served(config, facts)
    for entry in config.ports:
        if entry.enforce and entry.destination is Destination.LOCAL and _is_node_port(entry, served, facts):
            message = "guards a NodePort on this node; every other node of the cluster answers it as well"
            cure = "the same configuration on all nodes"
            yield Problem(entry.where, f"port.{entry.name}", message, cure, "open-on-other-nodes")
            return


def _is_node_port(entry: PortEntry, served: Mapping[Family, Iterable[NodePort]], facts: NodeFacts) -> bool:
    for family, ports in served.items():
        if serves_by_ipvs(facts.chains(family, Table.NAT)) and overlap(entry.ports, (NODE_PORTS,)):
            return True  # which ones it serves, its sets know
        if any(_guards(entry, port.protocol, port.port) for port in ports):
            return True
    return False


def contested_positions(config: Config, facts: NodeFacts) -> Iterator[Problem]:
    """contested-position: above a program that insists on the top, "last" where Felix appends."""
    for where, key, table, chain, families, position in _positions(config):
        for family in families:
            foreign = facts.foreign(family, table, chain)
            if position.place is Place.FIRST:
                owner = _insists(foreign[:1], config.daemon.yield_to)
                cure = 'position = "early" stands right below it'
            elif position.place is Place.BETWEEN:
                named = (rule for rule in foreign[:1] if any(rule.matches(anchor) for anchor in position.before))
                owner = _insists(named, config.daemon.yield_to)
                cure = f'{{ after = ["{owner}"] }} stands right below it'
            elif position.place is Place.LAST:
                owner = _appends(foreign[-1:])
                cure = "{ before = [...] } with what must stand below, or a [[forward]] without a position"
            else:
                continue
            if owner:
                end = "end" if position.place is Place.LAST else "top"
                place = f"the {end} of {table} {chain} ({family})"
                message = f"{owner} insists on {place}: each would move the other for ever"
                yield Problem(where, key, message, cure, "contested-position")
                break


def _positions(config: Config) -> Iterator[tuple[Where, str, Table, str, tuple[Family, ...], Position]]:
    for rule in config.rules:
        yield rule.where, f"rule.{rule.name}.position", rule.table, rule.chain, rule.families, rule.position
    for jump in config.jumps:
        yield jump.where, f"jump.{jump.name}.position", jump.table, jump.from_chain, jump.families, jump.position
    for forward in config.forwards:
        if forward.position:
            key = f"forward.{forward.name}.position"
            yield forward.where, key, Table.FILTER, "FORWARD", config.daemon.families, forward.position


def _insists(foreign: Iterable[Rule], globs: Iterable[str]) -> str:
    return next((r.target for r in foreign if any(fnmatch.fnmatchcase(r.target, glob) for glob in globs)), "")


def _appends(foreign: Iterable[Rule]) -> str:
    """Felix marks all its rules; those at the end of a chain it wants to be the last."""
    return "Calico" if any(comment.startswith("cali:") for rule in foreign for comment in rule.comments) else ""


def marks_in_use(config: Config, facts: NodeFacts) -> Iterator[Problem]:
    """mark-in-use: the bit that `reject` needs, set or asked for by a live rule that is not ours."""
    actions = [port.action for port in config.ports] + [zone.target for zone in config.zones]
    actions += [forward.action for forward in config.forwards if forward.position is None]
    if Action.REJECT not in actions:
        return  # nothing of ours uses the bit
    for family in config.daemon.families:
        for table in Table:
            for chain, rule in every_foreign(facts.chains(family, table)):
                if "mark " in rule.text and _uses(rule.text, config.daemon.mark):
                    message = f"{config.daemon.mark:#x} is in use in {table} {chain} ({family}): {rule.text}"
                    cure = "a bit that no rule of the node uses"
                    yield Problem(config.daemon.where, "daemon.mark", message, cure, "mark-in-use")
                    return


def _uses(text: str, bit: int) -> bool:
    """Whether a rule sets the bit, or asks for it; one that compares or writes all 32 means its own value."""
    for value, mask in _BITS.findall(text.partition(_OF_CONNECTIONS)[0]):
        bits = _number(mask) if mask else _ALL_BITS
        if _number(value) & bit or (bits & bit and bits != _ALL_BITS):
            return True
    return False


def _number(text: str) -> int:
    return int(text, 16 if text.startswith("0x") else 10)


def set_types(config: Config, facts: NodeFacts) -> Iterator[Problem]:
    """set-type, an error: an existing set of that name that can't be swapped with ours."""
    for entry in config.sets:
        for family in config.daemon.families:
            name = kernel_set_name(entry.name, family)
            kind, found = facts.sets.get(name, (_SET_TYPE, family))
            if (kind, found) != (_SET_TYPE, family):
                shown = f"{kind} ({found})" if found else kind
                message = f"the kernel's set {name} exists already as {shown}, not as {_SET_TYPE} ({family})"
                cure = f"`ipset destroy {name}`, or another name"
                yield Problem(entry.where, f"set.{entry.name}", message, cure, "set-type")
