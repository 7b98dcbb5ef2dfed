"""From one tree to one `Config`: the tables of the top level, and names that must be unique.

Law: a tree in, a value and problems out; no file is touched but through the hand that `ReadSet` lends. The
value holds what could be read, and is to be thrown away when there are problems.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from nodewalld.configuration import entries
from nodewalld.configuration.errors import FileError
from nodewalld.configuration.peers import network, sources
from nodewalld.configuration.reading import (
    FieldError,
    Key,
    Read,
    Reading,
    ReadSet,
    Section,
    Shape,
    T,
    TooMany,
    listed,
    read_table,
    refuse_unknown,
    table,
    takes,
)
from nodewalld.configuration.setfiles import networks_of
from nodewalld.configuration.tree import Node, is_name, show
from nodewalld.configuration.values import (
    NAME,
    absolute_path,
    bad_name,
    choice,
    folder,
    glob,
    mark,
    pattern,
    protocol_ports,
    resync,
)
from nodewalld.configuration.zones import SERVICE, ZONE, zones
from nodewalld.core.config import (
    Config,
    DaemonConfig,
    Failsafe,
    JumpEntry,
    Problem,
    SetEntry,
    SetFile,
    ShieldMode,
    Where,
)
from nodewalld.core.words import Backend, Network

RESERVED_SETS = (
    "cali4",
    "cali6",
    "felix-",
    "KUBE-",
    "kube-router-",
    "docker-",
    "cilium_",
    "NW-",
    "NODEWALL",
)
"""Set names of the neighbours, who delete what they don't know, and our own for temporary sets."""

_MARKS_IN_USE = (
    (0x0000C000, "kube-proxy"),
    (0x00002000, "portmap"),
    (0x00030000, "kube-router"),
    (0xFFFF0000, "Calico"),
    (0x00FF0000, "Tailscale"),
)

_BACKENDS: dict[str, Backend | None] = {"auto": None, **{backend.value: backend for backend in Backend}}

_DAEMON = Section(
    Shape.ONCE,
    "The daemon itself",
    {
        "backend": Key(
            choice(_BACKENDS),
            '`"nft"`, `"legacy"`, or `"auto"`: the backend in which kubelet\'s or kube-proxy\'s hint chains stand, '
            "else Docker's chains; else the one used last; else what `iptables` itself uses. With `auto` the evidence "
            "is looked at again every `resync`, and the rules move when it has changed",
            default="auto",
        ),
        "families": Key(entries.FAMILIES, "one or both; not empty", default=["ipv4", "ipv6"]),
        "resync": Key(
            resync,
            'the full check of everything, even when no event came; from `"1s"` to `"1h"`, with `ms`, `s`, `m` or `h`',
            default="30s",
        ),
        "yield_to": Key(
            listed(glob, example='["cali-*"]'),
            "chains of programs that insist on the top: a leading run of jumps to these may stand above an `early` "
            "position",
            default=["cali-*", "KUBE-ROUTER-*", "AZURE-NPM*"],
        ),
        "mark": Key(
            mark,
            "the one bit of the packet mark that `reject` uses; a hexadecimal text or a number with exactly one bit "
            "set. Warned of: bits of kube-proxy (`0x4000`, `0x8000`), portmap (`0x2000`), kube-router (`0x10000`, "
            "`0x20000`), Tailscale (`0xff0000`) and Calico (`0xffff0000`)",
            default="0x1000",
        ),
        "metrics": Key(
            folder,
            "a folder in which `nodewalld.prom` is written for node_exporter's textfile collector, see "
            '[metrics.md](metrics.md); an absolute path, or `""` for none',
            default="",
        ),
        "shield": Key(
            choice({mode.value: mode for mode in ShieldMode}),
            "whether refusals stand in a table of our own as well, `inet nodewalld`, which no iptables tool touches, "
            'see [shield.md](shield.md): `"auto"`, where the kernel has nf_tables; `"off"`, never; `"require"`, and a '
            "configuration is refused where it can't be",
            default="auto",
        ),
    },
)

_FAILSAFE = Section(
    Shape.ONCE,
    "The way back in: what no `[[port]]` or zone can shut",
    {
        "ports": Key(
            listed(protocol_ports, example='["22/tcp"]'),
            '`"PORT/PROTOCOL"` or `"FIRST-LAST/PROTOCOL"`, with `tcp`, `udp` or `sctp`. `[]` switches the failsafe '
            "off, with a warning",
            default=["22/tcp"],
        ),
        "from": Key(
            sources,
            'a list of the addresses, CIDRs and sets (`"@NAME"`) that administrators come from',
            field="sources",
            default=["any"],
        ),
    },
)


def judge(root: Node, path: str, set_file: ReadSet, *, complete: bool = True) -> tuple[Config, tuple[Problem, ...]]:
    """The configuration of a tree, and all that is wrong with it; not `complete`: some file is missing."""
    top = table(root)
    reading = Reading(_set_names(top), set_file, complete)
    try:
        return _judge(top, path, root.where, reading), tuple(reading.problems)
    except TooMany:
        return Config(path), tuple(reading.problems)


def _judge(top: dict[str, Node], path: str, place: Where, reading: Reading) -> Config:
    refuse_unknown(top, SECTIONS, reading)
    daemon = _daemon(top, place, reading)
    reading.families = daemon.families
    return Config(
        path=path,
        daemon=daemon,
        failsafe=_failsafe(top, place, reading),
        sets=_sets(top, reading),
        ports=_entries(top, "port", entries.port, reading),
        forwards=_entries(top, "forward", entries.forward, reading),
        rules=_entries(top, "rule", entries.rule, reading),
        jumps=_jumps(top, reading),
        zones=zones(top, reading),
        warnings=tuple(reading.warnings),
    )


def _section(top: dict[str, Node], key: str, place: Where, reading: Reading) -> dict[str, Any]:
    """The fields of a table that stands once, and may be left out: then its place is that of all."""
    nodes = [top[key]] if key in top else []
    found = reading.collect(
        lambda node, inner: {**read_table(node, SECTIONS[key].keys, inner), "where": node.where}, nodes
    )
    return found[0] if found else {"where": place}


def _daemon(top: dict[str, Node], place: Where, reading: Reading) -> DaemonConfig:
    daemon = DaemonConfig(**_section(top, "daemon", place, reading))
    users = [user for bits, user in _MARKS_IN_USE if bits & daemon.mark]
    if users:
        message = f"{daemon.mark:#x} is in use by {', '.join(users)}"
        reading.warn(table(top["daemon"])["mark"], "mark-in-use", message, '"0x1000" is free of them')
    return daemon


def _failsafe(top: dict[str, Node], place: Where, reading: Reading) -> Failsafe:
    failsafe = Failsafe(**_section(top, "failsafe", place, reading))
    if not failsafe.ports and not reading.problems:
        message = "is empty: nothing keeps a way back in"
        reading.warn(table(top["failsafe"])["ports"], "no-failsafe", message, '["22/tcp"]')
    return failsafe


def _set_names(top: dict[str, Node]) -> frozenset[str]:
    """The names that "@NAME" may mean, known before anything is read."""
    value = top["set"].value if "set" in top else {}
    return frozenset(value) if isinstance(value, dict) else frozenset()


def _sets(top: dict[str, Node], reading: Reading) -> tuple[SetEntry, ...]:
    if "set" not in top:
        return ()
    nodes = top["set"].value
    if not isinstance(nodes, dict):
        reading.refuse(top["set"], f"must be a table, not {top['set'].kind}", "[set.NAME]")
        return ()
    for called, node in nodes.items():
        if not is_name(called):
            reading.refuse(node, *bad_name(called))
        elif called.startswith(RESERVED_SETS):
            reading.refuse(node, f"{show(called)} begins like the sets of another program", "another name")
    _refuse_twice(nodes.items(), reading)
    named = [(called, reading.collect(_set_fields, [node]), node) for called, node in nodes.items()]
    return tuple(SetEntry(name=called, where=node.where, **found[0]) for called, found, node in named if found)


def _set_fields(node: Node, reading: Reading) -> dict[str, Any]:
    return {"entries": (), "files": ()} | read_table(node, _SET.keys, reading)


@takes(network.schema)
def _set_entry(node: Node, reading: Reading) -> tuple[Network, Where]:
    return network(node, reading), node.where


@takes(absolute_path.schema)
def _set_file(node: Node, reading: Reading) -> SetFile:
    """A set file and what it holds."""
    path = absolute_path(node, reading)
    try:
        content = reading.set_file(path)
    except FileError as error:
        if not error.line:
            raise FieldError(node, f"{path} {error.message}", error.cure) from error
        raise FieldError(
            Node(path, Where(path, error.line, node.where.rank), node.key), error.message, error.cure
        ) from error
    return SetFile(path, networks_of(Node(content, Where(path, 1, node.where.rank), node.key), reading))


def _entries(top: dict[str, Node], kind: str, reader: Read[tuple[T, ...]], reading: Reading) -> tuple[T, ...]:
    if kind not in top:
        return ()
    nodes = top[kind].value
    if not isinstance(nodes, list):
        reading.refuse(top[kind], f"must be a list of tables, not {top[kind].kind}", f"[[{kind}]]")
        return ()
    keys = [node.value for node in nodes if isinstance(node.value, dict)]
    names = [inner["name"] for inner in keys if "name" in inner]
    _refuse_twice(((node.value, node) for node in names if isinstance(node.value, str)), reading)
    return tuple(entry for found in reading.collect(reader, nodes) for entry in found)


def _jumps(top: dict[str, Node], reading: Reading) -> tuple[JumpEntry, ...]:
    """A jump stands exactly once: two places for it would be taken back and forth for ever."""
    jumps = _entries(top, "jump", entries.jump, reading)
    first: dict[tuple[str, ...], str] = {}
    for jump in jumps:
        for family in jump.families:
            other = first.setdefault((family, jump.table, jump.from_chain, jump.to_chain), jump.name)
            if other != jump.name:
                message = f"is jumped to from {jump.from_chain} by {show(other)} already"
                reading.note(Problem(jump.where, f"jump.{jump.name}.to", message, "one [[jump]], with one position"))
                break
    return jumps


def _refuse_twice(named: Iterable[tuple[str, Node]], reading: Reading) -> None:
    """Names are unique ignoring case: who reads `Web` and `web` in a listing takes them for one thing."""
    first: dict[str, Node] = {}
    for called, node in named:
        other = first.setdefault(called.lower(), node)
        if other is not node:
            place = f"{other.where.file}:{other.where.line}"
            reading.refuse(node, f"{show(called)} is already the name of {place}", "another name")


_SET = Section(
    Shape.NAMED,
    "Addresses under a name: one kernel ipset for each family",
    {
        "entries": Key(
            listed(_set_entry, example='["10.0.0.0/8"]'),
            "addresses and CIDRs of both families; an IPv4 address is not written as IPv6 (`::ffff:...`). A family "
            "without any means nobody in that family. `0.0.0.0/0` and `::/0` are taken",
            default=[],
        ),
        "files": Key(
            listed(_set_file, example='["/etc/nodewalld/sets/extra.txt"]'),
            "absolute paths of files with one address or CIDR a line, `#` begins a comment. Followed while the daemon "
            "runs",
            default=[],
        ),
    },
    names={"allOf": [NAME, pattern(f"(?!{'|'.join(RESERVED_SETS)}).*")]},
)

SECTIONS: Mapping[str, Section] = {
    "daemon": _DAEMON,
    "failsafe": _FAILSAFE,
    "set": _SET,
    "port": entries.PORT,
    "forward": entries.FORWARD,
    "rule": entries.RULE,
    "jump": entries.JUMP,
    "zone": ZONE,
    "service": SERVICE,
}
"""Every table of a configuration, in the order of the documentation."""
