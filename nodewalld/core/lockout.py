"""Would a configuration shut the very connection that somebody configures it through?

Law: what [[port]] entries and zones do to that connection is said for certain; a `[[rule]]` may do anything, and is not
judged.
"""

import ipaddress
from dataclasses import dataclass

from nodewalld.core.config import Config, Problem
from nodewalld.core.decide import decide
from nodewalld.core.environment import Environment
from nodewalld.core.flows import Dialled, refusing, zones_refusing
from nodewalld.core.words import Family


@dataclass(frozen=True, slots=True)
class Connection:
    """Somebody's way in: TCP, from where to which address and port of this node."""

    source: str
    destination: str
    port: int


def parse_connection(text: str) -> Connection | None:
    """As sshd leaves it in SSH_CONNECTION: client address and port, server address and port. None if it isn't that."""
    match text.split():
        case [source, _, destination, port] if port.isascii() and port.isdigit():
            addresses = tuple(_plain(address) for address in (source, destination))
            if all(addresses):
                return Connection(addresses[0], addresses[1], int(port))
    return None


def _plain(address: str) -> str:
    """Without a scope id; "" for what is no address."""
    try:
        return str(ipaddress.ip_address(address.partition("%")[0]))
    except ValueError:
        return ""


def lockouts(config: Config, node: Environment, connection: Connection) -> tuple[Problem, ...]:
    """A problem for each entry that would refuse the connection."""
    source = ipaddress.ip_address(connection.source)
    family = Family.IPV4 if source.version == 4 else Family.IPV6
    if family not in config.daemon.families:
        return ()
    decisions = decide(config, family, node)
    dialled = Dialled("tcp", source, ipaddress.ip_address(connection.destination), connection.port)
    wheres = {f"port/{entry.name}": entry.where for entry in config.ports}
    wheres |= {f"zone/{entry.name}": entry.where for entry in config.zones}
    found = [(j.entry, f"allow {source}") for j in refusing(decisions, dialled)]
    found += [(z.entry, f'ports = ["{connection.port}/tcp"]') for z in zones_refusing(decisions, dialled)]
    return tuple(
        Problem(
            wheres[entry],
            entry.replace("/", "."),
            f"would refuse your connection from {source} to port {connection.port}",
            f"{cure}, or keep the port in [failsafe]",
            "locks-you-out",
        )
        for entry, cure in found
    )
