"""`nodewallctl trace` as it is typed. What it does is in `tracing`, which only this command loads."""

import argparse
from ipaddress import ip_network

from nodewalld.commands.common import Tools
from nodewalld.commands.steer import duration
from nodewalld.core.tracing import PROTOCOLS
from nodewalld.core.words import Network

_INTERFACE_MAX = 15

EXAMPLES = (
    "nodewallctl trace tcp --dport 31002",
    "nodewallctl trace tcp --dport 31002 --from 203.0.113.9 --in ens18 --for 30s",
    "nodewallctl trace tcp --dport 31002 --from-node --count 1",
    "nodewallctl trace udp --dport 30000-32767 --to 2001:db8::7 --count 3 --json",
    "nodewallctl trace icmp --for 1m",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What may be given after `trace`."""
    add = parser.add_argument
    add("protocol", metavar="PROTOCOL", choices=PROTOCOLS, help=f"{', '.join(PROTOCOLS)} (icmp: of both families)")
    add("--dport", metavar="PORT", type=_ports, help="the port that is dialled, or a range 30000-32767")
    add("--from", metavar="ADDRESS", dest="source", type=_network, help="an address or CIDR of either family")
    add("--to", metavar="ADDRESS", dest="destination", type=_network, help="the address that is dialled, or a CIDR")
    add("--in", metavar="IFACE", dest="interface", type=_interface, help='with "+" at the end a wildcard')
    add("--from-node", action="store_true", help="what this node itself sends, instead of what comes in")
    add("--for", metavar="TIME", dest="seconds", type=duration, help="such as 30s; default 10s, with --count 10m")
    add("--count", metavar="N", type=_count, help="end after N packets")


def run(args: argparse.Namespace, tools: Tools) -> int:
    """Follow packets."""
    from nodewalld.commands import tracing  # noqa: PLC0415 - heavy

    return tracing.run(args, tools)


def _ports(text: str) -> tuple[int, int]:
    first, _, last = text.replace(":", "-").partition("-")
    numbers = first, last or first
    if not all(number.isascii() and number.isdigit() and int(number) < 1 << 16 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is no port and no range such as 30000-32767")
    low, high = map(int, numbers)
    if low > high:
        raise argparse.ArgumentTypeError(f"{text!r} is an empty range")
    return low, high


def _network(text: str) -> Network:
    try:
        return ip_network(text, strict=False)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no address and no CIDR") from error


def _interface(text: str) -> str:
    if not 0 < len(text.encode()) <= _INTERFACE_MAX or text.startswith("-") or set(text) & set("/ \t\n") or text == "+":
        raise argparse.ArgumentTypeError(f"{text!r} is no name of an interface")
    return text


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 up")
    return int(text)
