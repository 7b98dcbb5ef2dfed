"""A packet as it is described on the command line: tcp 203.0.113.9 "->" :31002 --in ens18.

Law: words become a description, or a sentence with a cure; the node is not asked here, and nothing heavy is imported.
"""

import argparse
import ipaddress
import re
from dataclasses import dataclass

from nodewalld.commands.common import USAGE, Failure

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_WITH_PORTS = ("tcp", "udp", "sctp")
_PROTOCOLS = (*_WITH_PORTS, "icmp")
_STATES = ("new", "established", "related", "invalid", "untracked")
_ENDPOINT = re.compile(r"(?:\[(?P<six>[^\]]*)\]|(?P<four>[\d.]*)|(?P<plain>[0-9A-Fa-f:.]+))(?P<port>:\d+)?")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address, or None for the node's own, and a port, or 0."""

    address: Address | None
    port: int = 0


@dataclass(frozen=True, slots=True)
class Described:
    """What was said of a packet; "" and None where nothing was."""

    protocol: str
    source: Endpoint
    destination: Endpoint
    inside: str
    outside: str
    from_node: bool
    mark: int
    state: str
    icmp: tuple[int, int] | None


def add_stranger(parser: argparse.ArgumentParser) -> None:
    """Who knocks at the node's doors, and by which interface."""
    text = "who knocks: this address, in its family only (default: an address that nobody has, in both families)"
    parser.add_argument("--from", dest="source", metavar="ADDRESS", type=_address, help=text)
    text = "by which interface (default: all that lead outside)"
    parser.add_argument("--in", dest="inside", metavar="IFACE", default="", help=text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words that describe one packet."""
    parser.add_argument("protocol", metavar="PROTOCOL", choices=_PROTOCOLS, help="the protocol: tcp, udp, sctp or icmp")
    text = "whence: ADDRESS, or ADDRESS:PORT ([ADDRESS]:PORT for IPv6); not needed with --from-node"
    parser.add_argument("source", metavar="SOURCE", nargs="*", type=endpoint, help=text)
    text = 'whither: ADDRESS:PORT, or :PORT for this node (quote the arrow: "->")'
    parser.add_argument("->", dest="to", metavar="DESTINATION", type=endpoint, help=text)
    parser.add_argument("--in", dest="inside", metavar="IFACE", default="", help="by which interface it comes")
    parser.add_argument("--from-node", action="store_true", help="a program of this node sends it")
    parser.add_argument("--out", dest="outside", metavar="IFACE", default="", help="with --from-node: bound to it")
    parser.add_argument("--mark", metavar="N", type=_mark, default=0, help="the fwmark that it begins with")
    text = "what conntrack thinks of it: new (default), established, related, invalid, untracked"
    parser.add_argument("--state", metavar="STATE", choices=_STATES, default="new", help=text)
    text = "the ICMP type and code (default: an echo request)"
    parser.add_argument("--type", metavar="N[/CODE]", type=_icmp_type, help=text)


def described(args: argparse.Namespace) -> Described:
    """What the words say together. Raises Failure where they contradict each other."""
    if args.to is None or len(args.source) > 1:
        raise _usage('write SOURCE "->" DESTINATION, with the arrow in quotes, or the shell takes it')
    source, to = args.source[0] if args.source else Endpoint(None), args.to
    if args.from_node and args.inside:
        raise _usage("--from-node and --in: a packet of this node comes by no interface (leave one out)")
    if args.outside and not args.from_node:
        raise _usage("--out is for packets of this node (with --from-node); where others go is what is explained")
    if not args.from_node and source.address is None:
        raise _usage("SOURCE is missing: an address, or --from-node")
    if args.protocol in _WITH_PORTS and not to.port:
        raise _usage(f"{args.protocol} needs a port in DESTINATION, as in 192.0.2.1:443 or :443")
    if args.protocol == "icmp" and (to.port or source.port):
        raise _usage("icmp has no ports (--type says what it is)")
    if args.type and args.protocol != "icmp":
        raise _usage("--type is for icmp")
    if source.address and to.address and source.address.version != to.address.version:
        raise _usage(f"{source.address} and {to.address} are of different families")
    return Described(
        args.protocol,
        source,
        to,
        args.inside,
        args.outside,
        args.from_node,
        args.mark,
        args.state,
        args.type,
    )


def _usage(text: str) -> Failure:
    return Failure(text, status=USAGE)


def endpoint(text: str) -> Endpoint:
    """ADDRESS, ADDRESS:PORT, [ADDRESS]:PORT or :PORT. Raises ArgumentTypeError."""
    if text == "-":
        raise argparse.ArgumentTypeError('the shell has taken the arrow: write "->", in quotes')
    try:
        # Colons without brackets are an IPv6 address as a whole, or nothing before a port.
        if text.count(":") > 1 and not text.startswith("["):
            return Endpoint(ipaddress.ip_address(text))
        match = _ENDPOINT.fullmatch(text)
        host = (match["six"] or match["four"] or "") if match else text
        port = int(match["port"][1:]) if match and match["port"] else 0
        if port > 65535 or (not host and not port):
            raise ValueError
        return Endpoint(ipaddress.ip_address(host) if host else None, port)
    except ValueError:
        cure = "such as 192.0.2.1:443, [2001:db8::1]:443 or :443"
        raise argparse.ArgumentTypeError(f"{text!r} is no address and port ({cure})") from None


def _address(text: str) -> Address:
    try:
        return ipaddress.ip_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no address") from error


def _mark(text: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if not 0 <= value <= 0xFFFFFFFF:
        raise argparse.ArgumentTypeError(f"{text!r} is no mark (a number such as 0x4000)")
    return value


def _icmp_type(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,3})(?:/(\d{1,3}))?", text, re.ASCII)
    found = (int(match[1]), int(match[2] or 0)) if match else (256, 0)
    if max(found) > 255:
        raise argparse.ArgumentTypeError(f"{text!r} is no ICMP type (a number such as 8, or 3/4 with its code)")
    return found
