"""Readers of addresses, and of the lists that may be turned round with "!".

Law: what `ipaddress` does not take is no address; names are never looked up, for a firewall must not wait
for DNS.
"""

import re
from contextlib import suppress
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_network
from socket import AF_INET, inet_pton

from nodewalld.configuration.reading import (
    FieldError,
    Read,
    Reading,
    T,
    list_nodes,
    nearest,
    one_or_list,
    takes,
)
from nodewalld.configuration.tree import Node, show
from nodewalld.configuration.values import INTERFACE, interface, pattern, text
from nodewalld.core.config import Destination, Interfaces, Peer, Selector, SetRef
from nodewalld.core.words import Network

ANYWHERE: tuple[Network, ...] = (IPv4Network("0.0.0.0/0"), IPv6Network("::/0"))
"""What "any" means in a list of those who may come."""

_LENGTHS = frozenset(map(str, range(33)))
_MAPPED = 96  # the length of ::ffff:0:0/96, in which RFC 4291 writes IPv4 addresses
_ADDRESS_CURE = 'such as "10.0.0.1", "10.0.0.0/8" or "fd00::/64"'


_NETWORK = r"[0-9A-Fa-f:.]+(?:/[0-9]{1,3})?"
_PEER = rf"@.+|{_NETWORK}"


@lru_cache(maxsize=1 << 17)
def plain_network(written: str) -> Network | None:
    """An address or CIDR in its usual spelling; None for all else, of which `network` says what is wrong.

    Most of a long list is this, and is read again at each reload: what was read once costs next to nothing.
    """
    address, slash, length = written.partition("/")
    if not slash or length in _LENGTHS:
        with suppress(OSError, ValueError):  # five times as fast as ip_network
            return IPv4Network((inet_pton(AF_INET, address), int(length or 32)))
    if re.fullmatch(_NETWORK, written):
        with suppress(ValueError):
            found = ip_network(written)
            return None if isinstance(found, IPv6Network) and found.network_address.ipv4_mapped else found
    return None


@takes(pattern(_NETWORK))
def network(node: Node, reading: Reading) -> Network:
    """An address, as a network of one, or a CIDR."""
    written = text(node, reading, example=_ADDRESS_CURE)
    plain = plain_network(written)
    if plain is not None:
        return plain
    address, slash, length = written.partition("/")
    if written.startswith("@"):
        raise FieldError(node, f"{show(written)} is a set, and sets have no place here", _ADDRESS_CURE)
    if written == "any":
        raise FieldError(node, "any has no place here", '"0.0.0.0/0" and "::/0"')
    try:
        loose = ip_network(written, strict=False)
    except ValueError:
        raise FieldError(node, f"{show(written)} is not an address or CIDR", _ADDRESS_CURE) from None
    mapped = loose.network_address.ipv4_mapped if isinstance(loose, IPv6Network) else None
    if mapped and loose.prefixlen >= _MAPPED:
        usual = f"{mapped}/{loose.prefixlen - _MAPPED}" if slash else str(mapped)
        raise FieldError(node, f"{show(written)} is an IPv4 address, and no IPv6 packet bears it", show(usual))
    if "%" in written:
        raise FieldError(node, f"{show(written)} names an interface", show(written.partition("%")[0]))
    if slash and not length.isdigit():
        raise FieldError(node, f"{show(written)} has a mask for its length", show(str(loose)))
    try:
        return ip_network(written)
    except ValueError:
        one = f"{address}/{loose.max_prefixlen}"
        raise FieldError(node, f"{show(written)} has host bits set", f'"{loose}" or "{one}"') from None


@takes(pattern(_PEER))
def peer(node: Node, reading: Reading) -> Peer:
    """An address, a CIDR, or a set as @NAME."""
    written = text(node, reading, example=_ADDRESS_CURE)
    if not written.startswith("@"):
        return network(node, reading)
    called = written[1:]
    if called not in reading.set_names and reading.complete:
        near = nearest(called, reading.set_names)
        cure = f'did you mean "@{near}"?' if near else "define it as [set.NAME]"
        raise FieldError(node, f"{show(written)} is not a set of this configuration", cure)
    return SetRef(called)


@takes(one_or_list(pattern(f"any|{_PEER}")))
def allowed(node: Node, reading: Reading) -> tuple[Peer, ...]:
    """A list of those who may (or may not), in which "any" is everybody; nothing in it can be negated."""
    nodes = list_nodes(node, example='["10.0.0.0/8", "@SET"]', single=True)
    return tuple(found for group in reading.collect(_allowed, nodes) for found in group)


def _allowed(node: Node, reading: Reading) -> tuple[Peer, ...]:
    written = text(node, reading, example=_ADDRESS_CURE)
    if written.startswith("!"):
        raise FieldError(node, f"{show(written)} is negated in a list that can't be", "use deny")
    return ANYWHERE if written == "any" else (peer(node, reading),)


@takes({"type": "array", "items": pattern(f"(?:any)?|{_PEER}"), "minItems": 1})
def sources(node: Node, reading: Reading) -> Selector:
    """The sources of the failsafe: a real list, for the way back in is not written in passing."""
    nodes = list_nodes(node, example='["any"]')
    for inner in nodes:
        if _is_negated(inner):
            reading.refuse(inner, f"{inner.shown} is negated in a list that can't be", "those who may come in")
    return selector(Node([_without_negation(inner) for inner in nodes], node.where, node.key), reading)


@takes(one_or_list(pattern(f"(?:any)?|(?:! *)?(?:{_PEER})"), minItems=1))
def selector(node: Node, reading: Reading) -> Selector:
    """Addresses that a packet must come from (go to), or, with "!" before each, must not."""
    return Selector(*_negatable(node, reading, peer, ("any", "")))


@takes(one_or_list(pattern(f"|(?:! *)?(?:{INTERFACE})"), minItems=1))
def interfaces(node: Node, reading: Reading) -> Interfaces:
    """Interfaces that a packet must pass, or, with "!" before each, must not."""
    return Interfaces(*_negatable(node, reading, interface, ("",)))


@takes(one_or_list(pattern(f"local|any|{_NETWORK}"), minItems=1))
def destination(node: Node, reading: Reading) -> Destination | tuple[Network, ...]:
    """What the client dialled: an address of this node, anything, or these addresses."""
    example = '"local", "any" or a list of addresses'
    nodes = list_nodes(node, example=example, single=True, empty="and would match nothing")
    for word in Destination:
        if [inner.value for inner in nodes] == [word.value]:
            return word
    return reading.collect(network, nodes)


def _negatable(node: Node, reading: Reading, reader: Read[T], any_words: tuple[str, ...]) -> tuple[tuple[T, ...], bool]:
    example = show(any_words[0])
    nodes = list_nodes(node, example=example, single=True, empty="which could mean anything or nothing")
    if len(nodes) == 1 and nodes[0].value in any_words:
        return (), False
    negated = [_is_negated(inner) for inner in nodes]
    if any(negated) and not all(negated):
        message = 'mixes elements with and without "!"'
        reading.refuse(node, message, 'put "!" before each of them, or before none')
    plain = [_without_negation(inner) for inner in nodes]
    for inner, bare in zip(nodes, plain, strict=True):
        if bare.value in any_words:
            says = "matches nothing" if bare is not inner else "can only stand alone"
            reading.refuse(inner, f"{inner.shown} {says}", f"leave it out, or write {example} alone")
    return reading.collect(reader, [bare for bare in plain if bare.value not in any_words]), any(negated)


def _is_negated(node: Node) -> bool:
    return isinstance(node.value, str) and node.value.startswith("!")


def _without_negation(node: Node) -> Node:
    value = node.value
    return Node(value[1:].lstrip(" "), node.where, node.key) if isinstance(value, str) and value[:1] == "!" else node
