"""What leads packets past iptables' rules, or judges them once more elsewhere: as values, and as sentences for status.

Laws: told is what is there, and only as much of its effect as is certain. A drop of ours is final wherever it is met,
an accept of ours opens nothing elsewhere; so what matters is which packets never meet our rules, and who refuses too.

Who is known by what: Cilium's programs begin with `cil_` (before 1.12 their sections were called from-netdev and the
like), and it makes cilium_host (cilium: bpf/bpf_host.c, pkg/defaults/node.go); Calico's begin with `cali_`, and in eBPF
mode there is bpfin.cali (calico: felix/bpf-gpl/tc_preamble.c, felix/dataplane/linux/bpf_ep_mgr.go); kube-proxy's
nftables mode has a table of its name (KEP-3866), Docker's nftables backend has docker-bridges (moby:
daemon/libnetwork/drivers/bridge/internal/nftabler).
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from nodewalld.core.events import Bypass
from nodewalld.core.words import Backend, Family, Table

CILIUM, CALICO = "Cilium", "Calico"

_BEGINNINGS = {CILIUM: ("cil_",), CALICO: ("cali_", "calico_", "xdp_cali_")}
_CILIUM_SECTIONS = ("from-netdev", "to-netdev", "from-container", "to-container", "from-host", "to-host", "bpf_netdev")
_SHOWN = 4  # names in one sentence
_PLACES = {"xdp": "XDP", "ingress": "tc ingress", "egress": "tc egress"}


class Program(NamedTuple):
    """A BPF program on an interface; `place`: "xdp", "ingress" or "egress"; the name as far as it can be had."""

    interface: str
    place: str
    name: str

    @property
    def owner(self) -> str:
        """Whose it is, as far as its name tells."""
        if any(section in self.name for section in _CILIUM_SECTIONS):
            return CILIUM
        return next((owner for owner, words in _BEGINNINGS.items() if self.name.startswith(words)), "")


class BaseChain(NamedTuple):
    """A base chain of nftables that isn't iptables'; `family` as nft says it, `hook` likewise.

    `refuses`: by its policy or its last rule, everything that it does not accept itself.
    """

    family: str
    table: str
    name: str
    hook: str
    priority: int
    refuses: bool

    @property
    def families(self) -> tuple[Family, ...]:
        """Those whose packets it sees."""
        return _FAMILIES.get(self.family, ())

    def __str__(self) -> str:
        return f"chain {self.name} of table {self.family} {self.table} (hook {self.hook}, priority {self.priority})"


_FAMILIES = {"inet": (Family.IPV4, Family.IPV6), "ip": (Family.IPV4,), "ip6": (Family.IPV6,)}


class Flowtable(NamedTuple):
    """A table of flows that pass no rule any more."""

    family: str
    table: str
    name: str
    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Paths:
    """Everything that isn't an iptables rule of the backend in use; empty where nothing is known.

    `tables`: nftables' own, as (family, name). `rules`: backends with foreign rules in built-in chains, and where.
    `tool`: the backend of the node's plain `iptables`. `ipvs`: Services are served by IPVS.
    """

    interfaces: tuple[str, ...] = ()
    programs: tuple[Program, ...] = ()
    tables: frozenset[tuple[str, str]] = frozenset()
    base_chains: tuple[BaseChain, ...] = ()
    flowtables: tuple[Flowtable, ...] = ()
    rules: Mapping[Backend, Collection[tuple[Family, Table]]] = field(default_factory=dict)
    tool: Backend | None = None
    ipvs: bool = False

    @property
    def ebpf(self) -> str:
        """Whose BPF programs may serve NodePorts; "" when nobody's are seen."""
        owners = {program.owner for program in self.programs if program.place != "xdp"}
        if CILIUM in owners or "cilium_host" in self.interfaces:
            return CILIUM
        return CALICO if CALICO in owners or "bpfin.cali" in self.interfaces else ""

    def kube_proxy_tables(self) -> tuple[Family, ...]:
        """The families in which kube-proxy serves Services by nftables."""
        names = {"ip": Family.IPV4, "ip6": Family.IPV6}
        return tuple(family for word, family in names.items() if (word, "kube-proxy") in self.tables)


def bypasses(paths: Paths, backend: Backend | None) -> tuple[Bypass, ...]:
    """What there is to tell beside rules that stand in one backend."""
    return tuple(
        Bypass(kind, what) for kind, found in _TELLERS for what in found(paths, backend) if backend is not None
    )


def _programs(paths: Paths, _backend: Backend | None) -> Iterator[str]:
    found: dict[str, list[Program]] = {}
    for program in paths.programs:
        found.setdefault(program.owner, []).append(program)
    if (owner := paths.ebpf) and owner not in found:
        yield f"{owner} is here: packets that its BPF programs redirect, those of NodePorts among them, meet no rule"
    for owner, programs in found.items():
        where = _some(dict.fromkeys(f"{each.interface} ({_PLACES[each.place]})" for each in programs))
        names = _some(dict.fromkeys(each.name for each in programs if each.name))
        named = f" {names}" if names else ""
        whose = f"{owner}'s programs{named}" if owner else f"BPF programs{named}"
        yield f"{whose} on {where}: what they redirect or answer meets no rule; what they rewrite is judged rewritten"


def _ipvs(paths: Paths, _backend: Backend | None) -> Iterator[str]:
    if paths.ipvs:
        yield "IPVS serves Services: their packets pass INPUT, and neither FORWARD nor DOCKER-USER"


def _kube_proxy(paths: Paths, _backend: Backend | None) -> Iterator[str]:
    if paths.kube_proxy_tables():
        yield (
            "kube-proxy serves Services in nftables (table kube-proxy): there are no KUBE- chains to stand before or "
            'after, and action = "redirect" shares its place in nat'
        )


def _docker(paths: Paths, _backend: Backend | None) -> Iterator[str]:
    if any(name == "docker-bridges" for _, name in paths.tables):
        yield "Docker writes to nftables (table docker-bridges): DOCKER-USER is not asked there"


def _flowtables(paths: Paths, _backend: Backend | None) -> Iterator[str]:
    for each in paths.flowtables:
        devices = f" on {_some(each.devices)}" if each.devices else ""
        name = f"flowtable {each.name} of table {each.family} {each.table}"
        yield f"{name}{devices}: a flow that it has taken over meets no rule any more, not even a new one"


def _judges(paths: Paths, _backend: Backend | None) -> Iterator[str]:
    for chain in paths.base_chains:
        if chain.refuses and chain.families:
            yield f"{chain} refuses what it does not accept itself: an accept of ours opens nothing there"


def _mixed(paths: Paths, backend: Backend | None) -> Iterator[str]:
    for other, places in paths.rules.items():
        if other is not backend and places:
            tables = _some(dict.fromkeys(f"{table} ({family})" for family, table in sorted(places)), len(places))
            yield (
                f"{other} holds rules of others as well, in {tables}: an accept in {backend} overrules no drop there, "
                "and no anchor is looked for there"
            )


def _tool(paths: Paths, backend: Backend | None) -> Iterator[str]:
    if paths.tool and paths.tool is not backend:
        yield f"`iptables` writes to {paths.tool} on this node, and our rules stand in {backend}"


_TELLERS = (
    ("bpf", _programs),
    ("ipvs", _ipvs),
    ("kube-proxy-nftables", _kube_proxy),
    ("docker-nftables", _docker),
    ("flowtable", _flowtables),
    ("base-chain", _judges),
    ("other-backend", _mixed),
    ("tool", _tool),
)


def _some(names: Iterable[str], most: int = _SHOWN) -> str:
    found = list(names)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more
