"""A foreign writer that keeps its netlink socket open: one rule in, one rule out, each a transaction of its own.

Law: what it writes `iptables-nft` could have written: an unconditional ACCEPT.

Sources: include/uapi/linux/netfilter/nf_tables.h (NFT_MSG_NEWRULE, NFT_MSG_DELRULE and their attributes).
"""

import socket
import struct

from nodewalld.core.words import Family
from nodewalld.kernel.netlink import (
    NETLINK_NETFILTER,
    NFPROTO,
    NLM_F_CREATE,
    NLM_F_REQUEST,
    U32,
    U64,
    attribute,
    message,
    nested,
    netfilter_body,
    text,
)

_NFT = 10 << 8
_NEWRULE, _DELRULE = _NFT | 6, _NFT | 8
_RULE_TABLE, _RULE_CHAIN, _RULE_HANDLE, _RULE_EXPRESSIONS = 1, 2, 3, 4
_BATCH = [message(kind, NLM_F_REQUEST, 0, struct.pack(">BBH", 0, 0, 10)) for kind in (0x10, 0x11)]
_ACCEPT = nested(
    _RULE_EXPRESSIONS,
    nested(
        1,  # NFTA_LIST_ELEM
        text(1, "immediate"),  # NFTA_EXPR_NAME, and behind it NFTA_EXPR_DATA
        nested(2, attribute(1, U32.pack(0)), nested(2, nested(2, attribute(1, U32.pack(1))))),  # verdict NF_ACCEPT
    ),
)


class Writer:
    """Writes to IPv4 chains; events name it by `port`. A refusal is not heard of: who waits for the effect notices."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
        self._socket.bind((0, 0))
        self.port: int = self._socket.getsockname()[0]

    def insert(self, table: str, chain: str) -> None:
        """An ACCEPT at the top of a chain."""
        self._write(_NEWRULE, NLM_F_CREATE, table, chain, _ACCEPT)

    def delete(self, table: str, chain: str, handle: int) -> None:
        """Delete one rule."""
        self._write(_DELRULE, 0, table, chain, attribute(_RULE_HANDLE, U64.pack(handle)))

    def flush(self, table: str, chain: str) -> None:
        """Delete all rules of a chain."""
        self._write(_DELRULE, 0, table, chain, b"")

    def _write(self, kind: int, flags: int, table: str, chain: str, more: bytes) -> None:
        body = netfilter_body(NFPROTO[Family.IPV4], text(_RULE_TABLE, table), text(_RULE_CHAIN, chain), more)
        begin, end = _BATCH
        self._socket.send(begin + message(kind, NLM_F_REQUEST | flags, 1, body) + end)
