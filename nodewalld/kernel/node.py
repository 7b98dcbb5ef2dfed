"""The live node as a `World`: rules of both backends, sets, routes, switches, and who else stands on the way.

Laws: nothing is changed, and no table made by looking. What can't be read is never taken for empty: rules that can't be
are an error, a set is unknown, another's chain is an `Unread`. Sets are read when a rule that is walked asks for one.
"""

import ipaddress
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nodewalld.core.words import Backend, Family, Table
from nodewalld.kernel.basechains import base_chains
from nodewalld.kernel.firewall import FirewallError, tool
from nodewalld.kernel.process import ProgramError, installed, run
from nodewalld.walk import (
    BaseChain,
    IpSet,
    Kind,
    PolicyRule,
    Route,
    Routes,
    Ruleset,
    Unread,
    World,
    read,
    read_sets,
)

_PATIENCE = 30.0  # seconds for one program; 60,000 rules take iptables-nft-save six
_INCOMPATIBLE = "is incompatible, use 'nft' tool"
_HOOKS = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")
_BEFORE_ALL = -(1 << 31)
_TABLE_NAMES = {"254": "main", "255": "local", "253": "default"}
_SELECTORS = frozenset(
    {
        "priority",
        "src",
        "srclen",
        "dst",
        "dstlen",
        "fwmark",
        "fwmask",
        "iif",
        "oif",
        "table",
        "action",
        "protocol",
        "not",
    }
)


def gather(family: Family) -> World:
    """The node as it is now, in one family. Raises FirewallError or ProgramError with a sentence."""
    with ThreadPoolExecutor(4) as pool:
        texts = {backend: pool.submit(_saved, family, backend) for backend in Backend}
        routes = pool.submit(_routes, family)
        groups = pool.submit(_groups, family)
        others = pool.submit(_others, family)
        saved = {backend: text.result() for backend, text in texts.items()}
    rules = {backend: read(text) for backend, text in saved.items() if text}
    hidden = [unread for backend, text in saved.items() for unread in _incompatible(text, backend)]
    forwarding, reverse_path, localnet = _switches(family)
    return World(
        family=family,
        rules=_of_use(rules),
        routes=routes.result(),
        sets=_Sets(),
        forwarding=forwarding,
        reverse_path=reverse_path,
        localnet=localnet,
        groups=groups.result(),
        others=(*hidden, *others.result()),
    )


def _of_use(rules: Mapping[Backend, Ruleset]) -> dict[Backend, Ruleset]:
    return {backend: ruleset for backend, ruleset in rules.items() if ruleset.tables}


# --- rules and sets


def _saved(family: Family, backend: Backend) -> str:
    if backend is Backend.LEGACY:
        # iptables-legacy-save would make the tables that it reads; without -t it reads those that are listed here.
        names = Path(f"/proc/net/{'ip' if family is Family.IPV4 else 'ip6'}_tables_names")
        if not names.exists() or not names.read_text().strip():
            return ""
    elif not installed(tool(family, backend, "save")):
        return ""
    result = run([tool(family, backend, "save")], timeout=_PATIENCE)
    if result.status:
        raise FirewallError(f"{tool(family, backend, 'save')}: {result.stderr.strip() or 'failed without a word'}")
    return result.stdout + result.stderr


def _incompatible(text: str, backend: Backend) -> Iterator[Unread]:
    """A table that holds what iptables can't say: nft alone can read it."""
    for line in text.splitlines():
        if _INCOMPATIBLE in line:
            name = line.split("`")[-1].split("'")[0]
            for hook in Table(name).builtin_chains if name in set(Table) else _HOOKS:
                yield Unread(f"{backend} table {name}, which iptables can't read", hook, 0)


class _Sets(Mapping[str, IpSet]):
    """The kernel's ipsets by name, each read once, when it is first asked for."""

    def __init__(self) -> None:
        self._read: dict[str, IpSet | None] = {}

    def __getitem__(self, name: str) -> IpSet:
        if name not in self._read:
            try:
                result = run(["ipset", "save", name], timeout=_PATIENCE)
                self._read[name] = read_sets(result.stdout).get(name)
            except ProgramError:
                self._read[name] = None
        found = self._read[name]
        if found is None:
            raise KeyError(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(name for name, found in self._read.items() if found)

    def __len__(self) -> int:
        return sum(1 for _ in self)


# --- addresses, routes and switches


def _ip(*arguments: str) -> list[dict[str, Any]]:
    result = run(["ip", "-j", *arguments], timeout=_PATIENCE)
    if result.status:
        raise ProgramError(f"ip {' '.join(arguments)}: {result.stderr.strip()}")
    found: list[dict[str, Any]] = json.loads(result.stdout or "[]")
    return found


def _routes(family: Family) -> Routes:
    option = f"-{family.version}"
    bits = 32 if family is Family.IPV4 else 128
    routes = [route for entry in _ip("-d", option, "route", "show", "table", "all") for route in _route(entry, bits)]
    # An interface's first address is the one that the kernel would choose; the table is sorted otherwise.
    own = [_number(one["local"]) for link in _ip(option, "address") for one in link["addr_info"] if "local" in one]
    order = {address: number for number, address in enumerate(own)}
    routes.sort(key=lambda route: order.get(route.network, len(order)))
    return Routes(bits, tuple(routes), tuple(_policy(entry, bits) for entry in _ip("-d", option, "rule")))


def _route(entry: Mapping[str, Any], bits: int) -> Iterator[Route]:
    """One route, or one for each of its next hops; routes of kinds that aren't known here lead nowhere."""
    kind = entry.get("type", "unicast")
    if kind not in set(Kind):
        return
    network, length = _prefix(entry["dst"], bits)
    table = str(entry.get("table", "main"))
    for hop in entry.get("nexthops") or [entry]:
        yield Route(
            network,
            length,
            hop.get("dev") or entry.get("dev") or "",
            Kind(kind),
            via=_number(hop.get("gateway", "")),
            source=_number(entry.get("prefsrc", "")),
            metric=int(entry.get("metric", 0)),
            table=_TABLE_NAMES.get(table, table),
        )


def _policy(entry: Mapping[str, Any], bits: int) -> PolicyRule:
    more = sorted(entry.keys() - _SELECTORS)
    action = str(entry.get("action", "to_tbl"))
    refuses = Kind(action) if action in {"blackhole", "unreachable", "prohibit"} else None
    if action not in {"to_tbl", "lookup", "nop"} and refuses is None:
        more.append(action)
    table = str(entry.get("table", ""))
    mark = None
    if "fwmark" in entry:
        mark = int(str(entry["fwmark"]), 0), int(str(entry.get("fwmask", "0xffffffff")), 0)
    return PolicyRule(
        _TABLE_NAMES.get(table, table),
        int(entry.get("priority", 0)),
        source=_selector(entry, "src", bits),
        destination=_selector(entry, "dst", bits),
        mark=mark,
        inside=str(entry.get("iif", "")),
        outside=str(entry.get("oif", "")),
        negated="not" in entry,
        refuses=refuses,
        unclear=", ".join(f"`ip rule` {word}" for word in more),
    )


def _selector(entry: Mapping[str, Any], key: str, bits: int) -> tuple[int, int] | None:
    text = str(entry.get(key, "all"))
    if text == "all":
        return None
    address, length = _prefix(text, bits)
    return address, int(entry.get(f"{key}len", length))


def _prefix(text: str, bits: int) -> tuple[int, int]:
    if text == "default":
        return 0, 0
    host, slash, length = text.partition("/")
    return _number(host), int(length) if slash else bits


def _number(text: str) -> int:
    return int(ipaddress.ip_address(text)) if text else 0


def _groups(family: Family) -> dict[str, frozenset[int]]:
    word = "inet" if family is Family.IPV4 else "inet6"
    return {
        str(entry["ifname"]): frozenset(_number(one["address"]) for one in entry["maddr"] if one.get("family") == word)
        for entry in _ip("maddr")
    }


def _switches(family: Family) -> tuple[dict[str, bool], dict[str, int], frozenset[str]]:
    """Forwarding by interface, rp_filter by interface, and the interfaces with route_localnet (ip-sysctl)."""
    folder = Path(f"/proc/sys/net/{family}/conf")
    if family is Family.IPV6:
        return {"": _switch(folder / "all/forwarding") > 0}, {}, frozenset()
    names = [entry.name for entry in folder.iterdir()]
    everywhere = {key: _switch(folder / "all" / key) for key in ("forwarding", "rp_filter", "route_localnet")}
    forwarding = {name: _switch(folder / name / "forwarding") > 0 for name in names}
    reverse_path = {name: max(everywhere["rp_filter"], _switch(folder / name / "rp_filter")) for name in names}
    local = (name for name in names if everywhere["route_localnet"] or _switch(folder / name / "route_localnet"))
    return forwarding | {"": everywhere["forwarding"] > 0}, reverse_path, frozenset(local)


def _switch(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0  # the interface has gone, or the kernel has no such switch


# --- who else is on the way


def _others(family: Family) -> tuple[Unread | BaseChain, ...]:
    """Base chains that are not iptables', and programs on interfaces."""
    return (*base_chains(family), *_interface_programs())


def _interface_programs() -> Iterator[Unread]:
    for link in _ip("-d", "link", "show"):
        if link.get("xdp"):
            yield Unread(f"an XDP program on {link['ifname']}", "PREROUTING", _BEFORE_ALL, str(link["ifname"]))
