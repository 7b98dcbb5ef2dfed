"""Rules of ours put into foreign chains, and taken out, by one nf_tables transaction, without starting a program.

Laws: no rule is composed here. What is written are the bytes of a rule that iptables' own tool wrote before (its
`form`), as the kernel showed it; only its comment, which the tool writes as a match of x_tables, is written as the
rule's user data, where every version of the tool and nft itself read it, too. A transaction names the generation that
it was planned from; when the ruleset has moved on, the kernel refuses it whole. So a handle can't hit another rule than
the one observed, and a rule can't land elsewhere than between the two it was planned for.

Why not the match: whoever adds a match of x_tables waits until all rules that anybody deleted before are destroyed
(nft_compat_wait_for_destructors), which takes an RCU grace period, 10 to 20 ms. Without it: 0.1 ms.

Sources: net/netfilter/nfnetlink.c, nfnetlink_rcv_batch (NFNL_BATCH_GENID, since 4.13; all answers are queued before
send() returns); net/netfilter/nf_tables_api.c, nf_tables_newrule and nf_tables_valid_genid; nft_compat.c,
nft_match_init; libnftnl's udata.h and nft_rule_to_iptables_command_state of iptables for comments in user data.
"""

import errno
import struct
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from nodewalld.core.ruletext import words_of
from nodewalld.core.steps import Command, Delete, Insert, Step
from nodewalld.core.words import Family, Table
from nodewalld.kernel.netlink import (
    NFPROTO,
    NLA_F_NESTED,
    NLM_F_APPEND,
    NLM_F_CREATE,
    U32,
    U64,
    NetlinkSocket,
    attribute,
    attributes,
    netfilter_body,
    spans,
    string,
    text,
)

Request = tuple[int, int, bytes]
"""A message to the kernel: its type, its flags, its body."""

Form = bytes
"""The attributes that make a rule, as the kernel will show it, with its counters at zero."""

_NFT = 10 << 8  # NFNL_SUBSYS_NFTABLES
_NEWRULE, _DELRULE = _NFT | 6, _NFT | 8
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_BATCH_GENID = 1
_BATCH_BODY = struct.pack(">BBH", 0, 0, 10)

_RULE_TABLE, _RULE_CHAIN, _RULE_HANDLE, _RULE_EXPRESSIONS, _RULE_POSITION, _RULE_USERDATA = 1, 2, 3, 4, 6, 7
_EXPRESSION_NAME, _EXPRESSION_DATA = 1, 2
_MATCH_NAME, _MATCH_INFO = 1, 3
_UDATA_COMMENT = 0  # NFTNL_UDATA_RULE_COMMENT, followed by the length in a byte
_COMMENT_MAX = 128  # NFTNL_UDATA_COMMENT_MAXLEN, which nft allows for

_PLAIN = frozenset({"match", "counter", "immediate"})


class Stale(Exception):
    """Somebody has written since the ruleset was observed; nothing was changed."""


def form(shown: bytes) -> Form | None:
    """The form of a rule with these attributes; None when it isn't plainly a jump, perhaps with a comment.

    Only such rules are known to be shown just as they must be written: of other matches the kernel hides what is
    private to it, and wants to be told more than it shows.
    """
    found = spans(shown, 0, len(shown))
    if _RULE_EXPRESSIONS not in found:
        return None
    words = attribute(_RULE_USERDATA, shown[slice(*found[_RULE_USERDATA])]) if _RULE_USERDATA in found else b""
    kept = b""
    for _, start, end in attributes(shown, *found[_RULE_EXPRESSIONS]):
        parts = spans(shown, start, end)
        name = string(shown, *parts[_EXPRESSION_NAME])
        if name not in _PLAIN or _EXPRESSION_DATA not in parts:
            return None
        data = spans(shown, *parts[_EXPRESSION_DATA])
        if name == "match":
            comment = shown[slice(*data[_MATCH_INFO])].partition(b"\0")[0] + b"\0"
            if words or string(shown, *data[_MATCH_NAME]) != "comment" or len(comment) > _COMMENT_MAX:
                return None
            words = attribute(_RULE_USERDATA, bytes((_UDATA_COMMENT, len(comment))) + comment)
            continue
        expression = bytearray(shown[start - 4 : end])
        for first, last in data.values() if name == "counter" else ():
            expression[first - start + 4 : last - start + 4] = bytes(last - first)
        kept += bytes(expression)
    return attribute(_RULE_EXPRESSIONS | NLA_F_NESTED, kept) + words


def compose(
    family: Family,
    table: Table,
    steps: Iterable[Step],
    handles: Mapping[str, Sequence[int]],
    forms: Mapping[tuple[str, ...], Form],
) -> list[Request] | None:
    """The messages of a transaction, or None when it holds more than rules of known form in observed chains.

    `handles` are those of the observed chains, from the top; `forms` are found by a rule's words.
    """
    requests: list[Request] = []
    for step in steps:
        if isinstance(step, Command) or step.chain not in handles:
            return None
        request = _delete(step, handles[step.chain]) if isinstance(step, Delete) else None
        if isinstance(step, Insert):
            request = _insert(step, handles[step.chain], forms.get(words_of(step.text)))
        if request is None:
            return None
        kind, flags, body = request
        requests.append((kind, flags, rules_of(family, table.value, step.chain) + body))
    return requests


@lru_cache(maxsize=1024)
def rules_of(family: Family, table: str, chain: str) -> bytes:
    """The beginning of every message about rules of a chain."""
    return netfilter_body(NFPROTO[family], text(_RULE_TABLE, table), text(_RULE_CHAIN, chain))


def _delete(step: Delete, handles: Sequence[int]) -> Request:
    return _DELRULE, 0, attribute(_RULE_HANDLE, U64.pack(handles[step.index]))


def _insert(step: Insert, handles: Sequence[int], known: Form | None) -> Request | None:
    if known is None:
        return None
    if step.above is None:
        return _NEWRULE, NLM_F_CREATE | NLM_F_APPEND, known
    # Without NLM_F_APPEND a position is the rule to stand directly above.
    return _NEWRULE, NLM_F_CREATE, known + attribute(_RULE_POSITION, U64.pack(handles[step.above]))


class NftablesWriter:
    """Commits transactions through one socket, kept open; for one thread."""

    def __init__(self) -> None:
        self._netlink = NetlinkSocket()

    def commit(self, requests: Sequence[Request], generation: int) -> int:
        """Commit one transaction upon this generation; returns the port id by which its event is known.

        Raises Stale when others were quicker, NetlinkError when the kernel refuses; nothing is changed then.
        """
        begin = _BATCH_BODY + attribute(_BATCH_GENID, U32.pack(generation))
        batch = [(_BATCH_BEGIN, 0, begin), *requests, (_BATCH_END, 0, _BATCH_BODY)]
        try:
            self._netlink.transact(batch, "write nf_tables rules")
        except OSError as error:
            if error.errno == errno.ERESTART:
                raise Stale from error
            raise
        return self._netlink.port

    def close(self) -> None:
        """Close the socket."""
        self._netlink.close()
