"""Filters in the kernel for nf_tables' notifications: classic BPF, attached to a socket before it subscribes.

Laws: a filter never throws away what it can't read to the end: no load reaches beyond the datagram (the kernel would
drop it without a word), and whatever is unknown is passed. BPF loads in network order while netlink writes in the
host's, so lengths and types are put together from bytes.

Sources: net/core/filter.c, Documentation/networking/filter.rst; include/uapi/linux/netlink.h for the header, and
nfnetlink.h for the family behind it; nf_tables_fill_rule_info: a rule begins with its table and its chain.
"""

import errno
import socket
import struct
import sys
from collections.abc import Iterable, Sequence
from ctypes import addressof, create_string_buffer

NEWRULE, DELRULE, NEWGEN = 6, 8, 15
"""The messages of nf_tables by their type's lower byte (nf_tables.h)."""

_SO_ATTACH_FILTER = 26
INSTRUCTIONS_MAX = 4096
"""How long a filter may be (BPF_MAXINSNS)."""

_SMALLEST = 300  # instructions; where not even these are granted, a filter isn't worth while

_LITTLE = sys.byteorder == "little"
_LENGTH_LOW, _LENGTH_HIGH = (0, 1) if _LITTLE else (3, 2)  # of nlmsg_len; datagrams are shorter than 64 KiB
_TYPE_LOW = 4 if _LITTLE else 5
_FAMILY = 16
_FIRST = 20  # an attribute's length, its type, what it holds
_ATTRIBUTE_LENGTH, _ATTRIBUTE_TYPE, _ATTRIBUTE_TEXT = (0, 2, 4) if _LITTLE else (1, 3, 4)
_LONGEST_TABLE = 4 + 9  # an attribute with "security" and its end
_READ = _FIRST + 16 + 8  # so far a rule is read, at most
_RULE_CHAIN = 2  # NFTA_RULE_CHAIN

_LDB, _LD, _LD_LEN, _LD_MEM, _LD_K = 0x50, 0x40, 0x80, 0x60, 0x00  # into A; the first two at X + k
_LDX_MEM, _TAX, _ST = 0x61, 0x07, 0x02
_ADD, _ADD_X, _AND, _LSH, _OR_X = 0x04, 0x0C, 0x54, 0x64, 0x4C
_JA, _JEQ, _JGT, _JGT_X, _JGE, _RET = 0x05, 0x15, 0x25, 0x2D, 0x35, 0x06
_HERE, _NEXT, _TYPE = 0, 1, 2  # the machine's memory: where a message begins and ends; its type
_WHOLE = 0xFFFFFFFF

_Line = tuple[int, int, str, str] | str
"""An instruction (code, constant, where to go when a comparison holds and when not; "" is the next one), or a label."""


def pass_nothing(target: socket.socket) -> None:
    """Let nothing through."""
    _attach(target, _program([(_RET, 0, "", "")]))


def pass_transaction_ends(target: socket.socket) -> None:
    """Let through NEWGEN alone, the end of a transaction; it comes in a datagram of its own."""
    _attach(target, _program([*_BEGIN, (_LDB, _TYPE_LOW, "", ""), (_JEQ, NEWGEN, "pass", "drop"), *_END]))


def pass_touching(target: socket.socket, families: Iterable[int], tables: Iterable[str], chains: Iterable[str]) -> None:
    """Let through what may touch these tables: rules of these chains, and all that isn't a rule.

    Names are told apart by their first four characters. Raises OSError where the kernel has no room for a filter that
    is worth while (net.core.optmem_max limits it).
    """
    block = _message(sorted(set(families)), _starts(tables), _starts(chains))
    length = sum(not isinstance(line, str) for line in block)
    room = INSTRUCTIONS_MAX
    while room >= _SMALLEST:
        # A datagram with more messages than are looked at is passed as it is.
        blocks = block * ((room - 2 * len(_BEGIN)) // length)
        try:
            _attach(target, _program([*_BEGIN, *blocks, (_RET, _WHOLE, "", "")]))
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            room //= 2
        else:
            return
    raise OSError(errno.ENOMEM, "no room for a filter of nf_tables notifications")


_BEGIN: list[_Line] = [(_LD_K, 0, "", ""), (_ST, _HERE, "", ""), (_TAX, 0, "", "")]
_END: list[_Line] = ["drop", (_RET, 0, "", ""), "pass", (_RET, _WHOLE, "", "")]


def _message(families: Iterable[int], tables: Iterable[int], chains: Iterable[int]) -> list[_Line]:
    """Judge the message at HERE: pass, or go on behind this code with the next one, or drop when it was the last."""
    return [
        (_LDX_MEM, _HERE, "", ""),
        (_LDB, _LENGTH_HIGH, "", ""),
        (_LSH, 8, "", ""),
        (_ST, _NEXT, "", ""),
        (_LDB, _LENGTH_LOW, "", ""),
        (_LDX_MEM, _NEXT, "", ""),
        (_OR_X, 0, "", ""),
        (_JGE, _READ, "", "pass"),
        (_ADD, 3, "", ""),
        (_AND, 0xFFFFFFFC, "", ""),
        (_LDX_MEM, _HERE, "", ""),
        (_ADD_X, 0, "", ""),
        (_ST, _NEXT, "", ""),
        (_LDB, _TYPE_LOW, "", ""),
        (_ST, _TYPE, "", ""),
        (_JEQ, NEWGEN, "next", ""),
        (_LDB, _FAMILY, "", ""),
        *((_JEQ, family, "table", "") for family in families),
        (_JA, 0, "next", ""),
        "table",
        (_LD, _FIRST + _ATTRIBUTE_TEXT, "", ""),
        *((_JEQ, table, "kind", "") for table in tables),
        (_JA, 0, "next", ""),
        "kind",
        (_LD_MEM, _TYPE, "", ""),
        (_JEQ, NEWRULE, "rule", ""),
        (_JEQ, DELRULE, "", "pass"),
        "rule",
        (_LDB, _FIRST + _ATTRIBUTE_LENGTH, "", ""),
        (_JGT, _LONGEST_TABLE, "pass", ""),
        (_ADD, 3, "", ""),
        (_AND, 0xFC, "", ""),
        (_ADD_X, 0, "", ""),
        (_TAX, 0, "", ""),
        (_LDB, _FIRST + _ATTRIBUTE_TYPE, "", ""),
        (_JEQ, _RULE_CHAIN, "", "pass"),
        (_LD, _FIRST + _ATTRIBUTE_TEXT, "", ""),
        *((_JEQ, chain, "pass", "") for chain in chains),
        "next",
        (_LD_MEM, _NEXT, "", ""),
        (_ST, _HERE, "", ""),
        (_TAX, 0, "", ""),
        (_LD_LEN, 0, "", ""),
        (_JGT_X, 0, "behind", "drop"),
        *_END,
        "behind",
    ]


def _starts(names: Iterable[str]) -> list[int]:
    """The first four characters of names, as a load sees them."""
    return sorted({int.from_bytes(name.encode(errors="surrogateescape").ljust(4, b"\0")[:4], "big") for name in names})


def _program(lines: Sequence[_Line]) -> bytes:
    """Machine code; a label is looked for downwards from where it is used."""
    places: dict[str, int] = {}
    code: list[bytes] = []
    left = sum(not isinstance(line, str) for line in lines)
    for line in reversed(lines):
        if isinstance(line, str):
            places[line] = left
            continue
        left -= 1
        operation, constant, holds, fails = line
        ahead = [places[label] - left - 1 if label else 0 for label in (holds, fails)]
        if operation == _JA:
            constant, ahead = ahead[0], [0, 0]
        code.append(struct.pack("=HBBI", operation, *ahead, constant))
    return b"".join(reversed(code))


def _attach(target: socket.socket, program: bytes) -> None:
    held = create_string_buffer(program, len(program))
    target.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", len(program) // 8, addressof(held)))
