"""Readers of single values: texts, words, numbers, ports, durations, names of interfaces and protocols.

Law: every string of a configuration comes in through `text`, and so no control character does: a newline in a
comment would be a second command in a restore script.
"""

import re
import unicodedata
from collections.abc import Mapping

from nodewalld.configuration.reading import FieldError, Reader, Reading, Schema, T, any_of, takes
from nodewalld.configuration.tree import Node, is_name, show
from nodewalld.core.config import DEFAULT_ROUTE, PortRange, ProtocolPorts
from nodewalld.core.words import CHAIN_NAME_MAX

TRANSPORTS = {name: name for name in ("tcp", "udp", "sctp")}
"""The protocols that have ports."""

RESERVED = "NODEWALL"
"""The chains of nodewalld itself begin so."""

_PORT_MAX = 65535
_PORTS = re.compile(r"([0-9]{1,9})(?:[-:]([0-9]{1,9}))?")
_PORTS_CURE = 'a number from 1 to 65535, or "FIRST-LAST"'
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|h)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_MARK = re.compile(r"0[xX][0-9a-fA-F]{1,8}|[0-9]{1,10}")
_MARK_CURE = 'one bit, such as "0x1000"'
_INTERFACE_MAX = 15  # IFNAMSIZ - 1
_PROTOCOL_CURE = 'a name such as "tcp", a number from 1 to 255, or "any"'
_TEXT_MAX = 4096  # bytes; iptables-restore cuts a line after 10,239 and takes the rest for another command
_UNPRINTABLE = frozenset({"Cc", "Zl", "Zp"})  # the line and paragraph separators end lines for some programs
_TURNING = frozenset("LRE RLE LRO RLO PDF LRI RLI FSI PDI".split())  # show a reader another text than is obeyed

_PROTOCOLS = {
    "icmp": 1,
    "igmp": 2,
    "ipip": 4,
    "ipencap": 4,
    "tcp": 6,
    "udp": 17,
    "dccp": 33,
    "ipv6": 41,
    "rsvp": 46,
    "gre": 47,
    "esp": 50,
    "ah": 51,
    "icmpv6": 58,
    "ipv6-icmp": 58,
    "eigrp": 88,
    "ospf": 89,
    "etherip": 97,
    "pim": 103,
    "vrrp": 112,
    "carp": 112,
    "l2tp": 115,
    "sctp": 132,
    "udplite": 136,
}
_IPTABLES_OWN = {
    1: "icmp",
    6: "tcp",
    17: "udp",
    50: "esp",
    51: "ah",
    58: "icmpv6",
    132: "sctp",
    136: "udplite",
}
"""What iptables names itself (xtables_chain_protos); the rest needs /etc/protocols, where "ipip" is not 4."""


def text(node: Node, _: Reading, *, example: str = '"..."') -> str:
    """A string, on one line and without control characters; the example is the cure for another type."""
    if not isinstance(node.value, str):
        raise FieldError(node, f"must be a string, not {node.kind}", example)
    if len(node.value.encode()) > _TEXT_MAX:
        raise FieldError(node, f"is longer than {_TEXT_MAX} bytes", "a shorter text")
    bad = "" if node.value.isprintable() else next(filter(_is_control, node.value), "")
    if bad:
        name = "a line break" if bad == "\n" else f"the control character {bad!r}"
        raise FieldError(node, f"holds {name}", "one line without control characters")
    return node.value


def _is_control(char: str) -> bool:
    return unicodedata.category(char) in _UNPRINTABLE or unicodedata.bidirectional(char) in _TURNING


LINE: Schema = {"type": "string", "pattern": r"^[^\u0000-\u001f\u007f-\u009f\u2028\u2029]*$"}
"""What `text` takes."""

line = Reader(text, LINE)
"""A reader of any text."""


def pattern(regular: str) -> Schema:
    """A text that matches from its beginning to its end."""
    return {"type": "string", "pattern": f"^(?:{regular})$"}


@takes({"type": "boolean"})
def boolean(node: Node, _: Reading) -> bool:
    """True or false."""
    if not isinstance(node.value, bool):
        raise FieldError(node, f"must be a boolean, not {node.kind}", "true or false")
    return node.value


def choice(words: Mapping[str, T]) -> Reader[T]:
    """A reader of one word of several, each with its meaning."""

    def read(node: Node, reading: Reading) -> T:
        word = text(node, reading, example=_alternatives(words))
        if word not in words:
            raise FieldError(node, f"{show(word)} is not known here", _alternatives(words))
        return words[word]

    return Reader(read, {"enum": list(words)})


def _alternatives(words: Mapping[str, object]) -> str:
    *most, last = (show(word) for word in words)
    return f"{', '.join(most)} or {last}" if most else last


NAME: Schema = pattern(r"(?!.*-[vV]6$)[A-Za-z0-9_-]{1,19}")


@takes(NAME)
def name(node: Node, reading: Reading) -> str:
    """The name of an entry."""
    called = text(node, reading, example="1 to 19 of A-Z, a-z, 0-9, _ and -")
    if not is_name(called):
        raise FieldError(node, *bad_name(called))
    return called


def bad_name(called: str) -> tuple[str, str]:
    """Why a name can't be taken, and the cure."""
    if called.lower().endswith("-v6"):
        return f"{show(called)} can't end in -v6, which marks the IPv6 half of a set", "another ending"
    return f"{show(called)} can't be a name", "1 to 19 of A-Z, a-z, 0-9, _ and -"


@takes(any_of({"type": "integer", "minimum": 1, "maximum": _PORT_MAX}, pattern(_PORTS.pattern)))
def ports(node: Node, reading: Reading) -> PortRange:
    """One port, or a range: 443, "443", "32000-32010"; iptables' colon is as good as a hyphen."""
    number = _integer(node)
    if number is not None:
        return _range(node, node.shown, number, number)
    if not isinstance(node.value, str):
        raise FieldError(node, f"must be a port, not {node.kind}", _PORTS_CURE)
    return _ports_of(node, text(node, reading))


def _integer(node: Node) -> int | None:
    """A TOML integer; Python's booleans are none."""
    return node.value if isinstance(node.value, int) and not isinstance(node.value, bool) else None


def _ports_of(node: Node, written: str) -> PortRange:
    match = _PORTS.fullmatch(written)
    if not match:
        raise FieldError(node, f"{show(written)} is not a port", _PORTS_CURE)
    return _range(node, show(written), int(match[1]), int(match[2] or match[1]))


def _range(node: Node, shown: str, first: int, last: int) -> PortRange:
    if not (1 <= first <= _PORT_MAX and 1 <= last <= _PORT_MAX):
        raise FieldError(node, f"{shown} is out of range", _PORTS_CURE)
    if first > last:
        raise FieldError(node, f"{shown} ends before it begins", f'"{last}-{first}"')
    return PortRange(first, last)


@takes(pattern(f"(?:{_PORTS.pattern})/(?:{'|'.join(TRANSPORTS)})"))
def protocol_ports(node: Node, reading: Reading) -> ProtocolPorts:
    """Ports of one protocol: "22/tcp", "32000-32010/udp"."""
    written = text(node, reading, example='"22/tcp"')
    span, slash, protocol = written.partition("/")
    if not slash:
        raise FieldError(node, f"{show(written)} names no protocol", f'"{written}/tcp"')
    if protocol not in TRANSPORTS:
        raise FieldError(node, f"{show(protocol)} is not a protocol with ports", _alternatives(TRANSPORTS))
    return ProtocolPorts(protocol, _ports_of(node, span))


@takes(
    any_of(
        {"type": "integer", "minimum": 1, "maximum": 255},
        {"enum": ["any", "", *_PROTOCOLS]},
        pattern("[0-9]{1,3}"),
        {"type": "string", "pattern": "[A-Z]"},  # the same in capitals
    )
)
def protocol(node: Node, reading: Reading) -> str:
    """An IP protocol by name or number, as iptables takes it on every node; "" for any."""
    number = _integer(node)
    if number is not None:
        return _protocol_number(node, number)
    word = text(node, reading, example=_PROTOCOL_CURE).lower()
    if word.isascii() and word.isdigit() and len(word) <= 3:
        return _protocol_number(node, int(word))
    if word in ("any", ""):
        return ""
    if word not in _PROTOCOLS:
        raise FieldError(node, f"{show(word)} is no known protocol", _PROTOCOL_CURE)
    return _protocol_number(node, _PROTOCOLS[word])


def _protocol_number(node: Node, number: int) -> str:
    if not 1 <= number <= 255:
        raise FieldError(node, f"{node.shown} is not the number of a protocol", _PROTOCOL_CURE)
    return _IPTABLES_OWN.get(number, str(number))


@takes(pattern(_DURATION.pattern))
def resync(node: Node, reading: Reading) -> float:
    """A time between checks, in seconds."""
    example = 'such as "30s", "5m" or "1h"'
    match = _DURATION.fullmatch(text(node, reading, example=example))
    if not match:
        raise FieldError(node, f"{node.shown} is not a duration", example)
    seconds = float(match[1]) * _SECONDS[match[2]]
    if not 1.0 <= seconds <= 3600.0:
        raise FieldError(node, f"{node.shown} is out of range", 'from "1s" to "1h"')
    return seconds


@takes(any_of({"enum": [1 << bit for bit in range(32)]}, pattern("0[xX]0*[1248]0*|[0-9]{1,10}")))
def mark(node: Node, reading: Reading) -> int:
    """The one bit of the fwmark."""
    value = _integer(node)
    if value is None:
        written = text(node, reading, example=_MARK_CURE)
        if not _MARK.fullmatch(written):
            raise FieldError(node, f"{show(written)} is not a mark", _MARK_CURE)
        value = int(written, 16 if written[:2] in ("0x", "0X") else 10)
    if not 0 < value < 1 << 32 or value.bit_count() != 1:
        raise FieldError(node, f"{node.shown} is not exactly one of 32 bits", _MARK_CURE)
    return value


@takes(pattern("(?:/.*)?"))
def folder(node: Node, reading: Reading) -> str:
    """A folder's absolute path; "" for none."""
    return absolute_path(node, reading) if node.value != "" else ""


@takes(pattern("/.*"))
def absolute_path(node: Node, reading: Reading) -> str:
    """A path that means the same wherever the program stands."""
    path = text(node, reading)
    if not path.startswith("/"):
        raise FieldError(node, f"{show(path)} is not an absolute path", "a path that begins with /")
    return path


@takes(pattern("[^ ]+"))
def glob(node: Node, reading: Reading) -> str:
    """A glob over the names of chains and targets, which hold no blanks."""
    example = 'a name or glob, such as "cali-*"'
    pattern = text(node, reading, example=example)
    if not pattern or " " in pattern:
        raise FieldError(node, f"{node.shown} can't match a chain or target", example)
    return pattern


INTERFACE = r"@default-route|(?!(?:any|\*|\.|\.\.|.*\+.+)$)[^\s/:!\"\\@][^\s/:!\"\\]{0,14}"


@takes(pattern(INTERFACE))
def interface(node: Node, reading: Reading) -> str:
    """The name of an interface, a wildcard as in iptables, or "@default-route"."""
    called = text(node, reading, example='such as "eth0"')
    if called.startswith("@"):
        if called != DEFAULT_ROUTE:
            raise FieldError(node, f"{show(called)} is no known group of interfaces", f'"{DEFAULT_ROUTE}"')
        return called
    if called in ("any", "*"):
        raise FieldError(node, f"{show(called)} is not how any interface is written", '""')
    if not called or len(called.encode()) > _INTERFACE_MAX or called in (".", ".."):
        raise FieldError(node, f"{show(called)} is not an interface", f"1 to {_INTERFACE_MAX} characters")
    if bad := next((char for char in called if char.isspace() or char in '/:!"\\'), ""):
        raise FieldError(node, f"{show(called)} is not an interface", f"a name without {show(bad)}")
    if "+" in called[:-1]:
        raise FieldError(node, f'{show(called)} has a "+" that is not at its end', '"+" stands last, for any ending')
    return called


CHAIN = r"(?!NODEWALL)[^-! \"'\\][^ \"'\\]{0,27}"


@takes(pattern(CHAIN))
def chain(node: Node, reading: Reading) -> str:
    """The name of a chain that is not ours."""
    called = text(node, reading, example='such as "INPUT"')
    if not called or len(called.encode()) > CHAIN_NAME_MAX:
        raise FieldError(node, f"{show(called)} can't be a chain", f"1 to {CHAIN_NAME_MAX} characters")
    if called[0] in "-!" or not called.isascii() or set(called) & set(" \"'\\"):
        raise FieldError(node, f"{show(called)} can't be a chain", "no blanks, quotes or accents, no - or ! in front")
    if called.startswith(RESERVED):
        raise FieldError(node, f"{show(called)} is a name that nodewalld keeps for its own chains", "another chain")
    return called
