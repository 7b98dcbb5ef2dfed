"""Where packets go beside iptables' rules: BPF programs, nftables' own chains and flowtables, IPVS, the other backend.

Laws: looking changes nothing and starts no process. Each part that this kernel doesn't have, or does not show to
whoever asks, is left out. Of nftables the chains of a family are listed only where a table there isn't iptables'.

Sources: include/uapi/linux/rtnetlink.h, if_link.h (IFLA_XDP), pkt_sched.h and pkt_cls.h (TCA_BPF_NAME); nf_tables.h;
net/netfilter/ipvs/ip_vs_ctl.c for /proc/net/ip_vs; iptables' multi-call binaries for what `iptables` is.
"""

import contextlib
import os
import shutil
import socket
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from nodewalld.core.bypasses import BaseChain, Flowtable, Paths, Program
from nodewalld.core.desired import OWN_PREFIX
from nodewalld.core.lifelines import Jump
from nodewalld.core.shield.rules import TABLE
from nodewalld.core.words import Backend, Family, Table
from nodewalld.kernel import bpf
from nodewalld.kernel.netlink import (
    BODY,
    HEADER,
    NLM_F_DUMP,
    U32,
    NetlinkSocket,
    attribute,
    attributes,
    netfilter_body,
    spans,
    string,
    text,
)

_GETLINK, _GETQDISC, _GETTFILTER = 18, 38, 46
_LINK = struct.Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change
_TC = struct.Struct("=BxxxiIII")  # tcmsg: family, index, handle, parent, info
_NUMBER = struct.Struct("=I")  # rtnetlink's numbers are in the host's order
_IFNAME, _IFLA_EXT_MASK, _IFLA_XDP = 3, 29, 43
_SKIP_STATS = 1 << 3
_XDP_ATTACHED, _XDP_PROGRAM = 2, 4
_TCA_KIND, _TCA_OPTIONS, _BPF_NAME, _BPF_ID = 1, 2, 7, 11
_CLASSIFIERS = frozenset({"clsact", "ingress"})
_PARENTS = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}

_NFT = 10 << 8
_GETTABLE, _GETCHAIN, _GETRULE, _GETFLOWTABLE = _NFT | 1, _NFT | 4, _NFT | 7, _NFT | 23
_NAMES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
_HOOKS = ("prerouting", "input", "forward", "output", "postrouting")
_TABLE_NAME = 1
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_HOOK, _CHAIN_POLICY = 1, 3, 4, 5
_HOOK_NUMBER, _HOOK_PRIORITY, _HOOK_DEVICES = 1, 2, 3
_RULE_TABLE, _RULE_CHAIN, _RULE_EXPRESSIONS = 1, 2, 4
_EXPRESSION_NAME, _EXPRESSION_DATA = 1, 2
_IMMEDIATE_DATA, _DATA_VERDICT, _VERDICT_CODE, _DROP = 2, 2, 1, 0
_FLOWTABLE_TABLE, _FLOWTABLE_NAME, _FLOWTABLE_HOOK = 1, 2, 3
_SILENT = frozenset({"counter", "log"})  # expressions that every packet passes
_IPTABLES = frozenset(table.value for table in Table)
_MULTI = {"xtables-nft-multi": Backend.NFT, "xtables-legacy-multi": Backend.LEGACY}


def observe_paths(standing: Iterable[Jump], proc: Path = Path("/proc/thread-self")) -> Paths:
    """Everything that is to be seen now, beside what `standing` shows of the built-in chains."""
    interfaces: dict[int, str] = {}
    programs: list[Program] = []
    with contextlib.suppress(OSError), NetlinkSocket(socket.NETLINK_ROUTE) as route:
        interfaces, xdp = _links(route)
        programs = [*xdp, *_filters(route, interfaces), *_tcx(interfaces)]
    tables: frozenset[tuple[str, str]] = frozenset()
    chains: tuple[BaseChain, ...] = ()
    flowtables: tuple[Flowtable, ...] = ()
    with contextlib.suppress(OSError), NetlinkSocket() as netfilter:
        tables = frozenset(_tables(netfilter))
        chains = tuple(_base_chains(netfilter, tables))
        flowtables = tuple(_flowtables(netfilter)) if tables else ()
    rules: dict[Backend, set[tuple[Family, Table]]] = {}
    for jump in standing:
        if not jump.target.startswith(OWN_PREFIX):
            rules.setdefault(jump.backend, set()).add((jump.family, jump.table))
    return Paths(
        interfaces=tuple(interfaces.values()),
        programs=tuple(programs),
        tables=tables,
        base_chains=chains,
        flowtables=flowtables,
        rules=rules,
        tool=_tool(),
        ipvs=_ipvs(proc),
    )


def _links(route: NetlinkSocket) -> tuple[dict[int, str], list[Program]]:
    body = _LINK.pack(0, 0, 0, 0, 0) + attribute(_IFLA_EXT_MASK, _NUMBER.pack(_SKIP_STATS))
    names, programs = {}, []
    for _, answer in route.ask(_GETLINK, NLM_F_DUMP, body, "list the interfaces"):
        found = spans(answer, HEADER.size + _LINK.size, len(answer))
        name = string(answer, *found[_IFNAME])
        names[_LINK.unpack_from(answer, HEADER.size)[2]] = name
        inner = spans(answer, *found[_IFLA_XDP]) if _IFLA_XDP in found else {}
        if _XDP_ATTACHED in inner and answer[inner[_XDP_ATTACHED][0]]:
            ident = _NUMBER.unpack_from(answer, inner[_XDP_PROGRAM][0])[0] if _XDP_PROGRAM in inner else 0
            programs.append(Program(name, "xdp", bpf.name_of(ident) if ident else ""))
    return names, programs


def _filters(route: NetlinkSocket, interfaces: dict[int, str]) -> Iterator[Program]:
    """The programs of classifiers; only of interfaces that have somewhere to put them."""
    places = set()
    for _, answer in route.ask(_GETQDISC, NLM_F_DUMP, _TC.pack(0, 0, 0, 0, 0), "list the queueing disciplines"):
        found = spans(answer, HEADER.size + _TC.size, len(answer))
        if _TCA_KIND in found and string(answer, *found[_TCA_KIND]) in _CLASSIFIERS:
            places.add(_TC.unpack_from(answer, HEADER.size)[1])
    for index in sorted(places & set(interfaces)):
        for place, parent in _PARENTS.items():
            with contextlib.suppress(OSError):  # the interface may be gone by now
                body = _TC.pack(0, index, 0, parent, 0)
                answers = route.ask(_GETTFILTER, NLM_F_DUMP, body, f"list the classifiers of {interfaces[index]}")
                names = dict.fromkeys(name for _, answer in answers if (name := _classifier(answer)) is not None)
                yield from (Program(interfaces[index], place, name) for name in names)


def _classifier(answer: bytes) -> str | None:
    """The name of a BPF classifier's program; None for everything else."""
    found = spans(answer, HEADER.size + _TC.size, len(answer))
    if _TCA_KIND not in found or string(answer, *found[_TCA_KIND]) != "bpf" or _TCA_OPTIONS not in found:
        return None
    inner = spans(answer, *found[_TCA_OPTIONS])
    ident = _NUMBER.unpack_from(answer, inner[_BPF_ID][0])[0] if _BPF_ID in inner else 0
    given = string(answer, *inner[_BPF_NAME]) if _BPF_NAME in inner else ""
    return (bpf.name_of(ident) if ident else "") or given


def _tcx(interfaces: dict[int, str]) -> Iterator[Program]:
    for index, name in interfaces.items():
        for place in _PARENTS:
            yield from (Program(name, place, bpf.name_of(ident)) for ident in bpf.attached(index, place))


def _tables(netfilter: NetlinkSocket) -> Iterator[tuple[str, str]]:
    """Tables that are neither iptables' nor ours."""
    for _, answer in netfilter.ask(_GETTABLE, NLM_F_DUMP, netfilter_body(0), "list the nftables tables"):
        family = _NAMES.get(answer[HEADER.size], "")
        name = string(answer, *spans(answer, BODY, len(answer))[_TABLE_NAME])
        if not name.startswith(TABLE) and not (family in ("ip", "ip6") and name in _IPTABLES):
            yield family, name


def _base_chains(netfilter: NetlinkSocket, tables: frozenset[tuple[str, str]]) -> Iterator[BaseChain]:
    for number, family in _NAMES.items():
        if not any(word == family for word, _ in tables) or family not in ("inet", "ip", "ip6"):
            continue
        for _, answer in netfilter.ask(_GETCHAIN, NLM_F_DUMP, netfilter_body(number), f"list the chains ({family})"):
            found = spans(answer, BODY, len(answer))
            table = string(answer, *found[_CHAIN_TABLE])
            if (family, table) not in tables or _CHAIN_HOOK not in found:
                continue
            hook = spans(answer, *found[_CHAIN_HOOK])
            where = int(U32.unpack_from(answer, hook[_HOOK_NUMBER][0])[0])
            priority = int.from_bytes(answer[slice(*hook[_HOOK_PRIORITY])], "big", signed=True)
            name = string(answer, *found[_CHAIN_NAME])
            drops = _CHAIN_POLICY in found and U32.unpack_from(answer, found[_CHAIN_POLICY][0])[0] == _DROP
            if where < len(_HOOKS):
                refuses = drops or _ends_in_refusal(netfilter, number, table, name)
                yield BaseChain(family, table, name, _HOOKS[where], priority, refuses)


def _ends_in_refusal(netfilter: NetlinkSocket, number: int, table: str, chain: str) -> bool:
    """Whether the last rule refuses whatever comes to it."""
    body = netfilter_body(number, text(_RULE_TABLE, table), text(_RULE_CHAIN, chain))
    rules = netfilter.ask(_GETRULE, NLM_F_DUMP, body, f"read chain {chain} of {table}")
    if not rules:
        return False
    answer = rules[-1][1]
    found = spans(answer, BODY, len(answer))
    expressions = [
        spans(answer, first, last) for _, first, last in attributes(answer, *found.get(_RULE_EXPRESSIONS, (0, 0)))
    ]
    words = [string(answer, *each[_EXPRESSION_NAME]) for each in expressions]
    said = [(word, each) for word, each in zip(words, expressions, strict=True) if word not in _SILENT]
    return len(said) == 1 and (said[0][0] == "reject" or (said[0][0] == "immediate" and _is_drop(answer, said[0][1])))


def _is_drop(answer: bytes, expression: dict[int, tuple[int, int]]) -> bool:
    data = spans(answer, *expression[_EXPRESSION_DATA])
    verdict = spans(answer, *data[_IMMEDIATE_DATA]) if _IMMEDIATE_DATA in data else {}
    code = spans(answer, *verdict[_DATA_VERDICT]) if _DATA_VERDICT in verdict else {}
    return _VERDICT_CODE in code and U32.unpack_from(answer, code[_VERDICT_CODE][0])[0] == _DROP


def _flowtables(netfilter: NetlinkSocket) -> Iterator[Flowtable]:
    for _, answer in netfilter.ask(_GETFLOWTABLE, NLM_F_DUMP, netfilter_body(0), "list the flowtables"):
        found = spans(answer, BODY, len(answer))
        hook = spans(answer, *found[_FLOWTABLE_HOOK]) if _FLOWTABLE_HOOK in found else {}
        devices = attributes(answer, *hook[_HOOK_DEVICES]) if _HOOK_DEVICES in hook else ()
        names = tuple(string(answer, first, last) for _, first, last in devices)
        table, name = (string(answer, *found[kind]) for kind in (_FLOWTABLE_TABLE, _FLOWTABLE_NAME))
        yield Flowtable(_NAMES.get(answer[HEADER.size], ""), table, name, names)


def _ipvs(proc: Path) -> bool:
    """Whether IPVS has a service; behind its three lines of headings."""
    try:
        lines = (proc / "net/ip_vs").read_text(errors="replace").splitlines()
    except OSError:
        return False
    return any(line.startswith(("TCP", "UDP", "SCTP", "FWM")) for line in lines)


def _tool() -> Backend | None:
    """What plain `iptables` is, by the binary that it leads to."""
    program = shutil.which("iptables")
    return _MULTI.get(Path(os.path.realpath(program)).name) if program else None
