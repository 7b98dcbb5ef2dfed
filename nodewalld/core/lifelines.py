"""The jumps that neighbours live by: which are known, when one counts as lost, and what would bring it back.

Laws: a neighbour is known by the names of its chains, and only what has been seen is missed. What its owner took out
itself, or moved to the other backend, is not lost. Nothing is told before the owner had the time that it needs to move
a jump of its own. Their rules are never written here: what is told is how their owner writes them again.

Who writes what: kube-proxy, pkg/proxy/iptables/proxier.go and pkg/proxy/ipvs; kubelet, pkg/kubelet/
kubelet_network_linux.go; Docker, daemon/libnetwork/iptables; Calico, felix/rules/static.go; flannel,
pkg/trafficmngr/iptables; kube-router, pkg/controllers/netpol; CNI, plugins/meta/{portmap,firewall}; netavark,
src/firewall/iptables.
"""

import fnmatch
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NamedTuple

from nodewalld.core.blame import suspects
from nodewalld.core.events import Culprit, Neighbour, Process, duration, printable
from nodewalld.core.words import Backend, Family, Table

PATIENCE = 5.0
"""Seconds for which a jump may be away unsaid. Docker deletes and inserts its own within 12 ms; after a reload of
firewalld with Docker beside it they are back within 1.1 s; kube-proxy, kubelet, Felix and CNI prepend what is
missing, and take nothing away before."""

_POLLING = 10.0  # flanneld looks every 5 s whether its rules are there


@dataclass(frozen=True, slots=True)
class Owner:
    """A program; `programs` are the names by which its own writes are known, `cure` is what brings its jumps back."""

    name: str
    programs: tuple[str, ...]
    cure: str
    patience: float = PATIENCE


class Lifeline(NamedTuple):
    """A jump that does something for an owner. `targets`: of versions that name the chain otherwise, or globs."""

    owner: Owner
    table: Table
    chain: str
    targets: tuple[str, ...]
    carries: str

    @property
    def name(self) -> str:
        """What it is remembered by."""
        return f"{self.table.value} {self.chain} {self.targets[0]}"


class Jump(NamedTuple):
    """A jump as it stands in a built-in chain."""

    backend: Backend
    family: Family
    table: Table
    chain: str
    target: str


class Key(NamedTuple):
    """A lifeline where it was seen."""

    backend: Backend
    family: Family
    line: Lifeline


_DOCKER = Owner("Docker", ("dockerd",), "systemctl restart docker")
_KUBE_PROXY = Owner(
    "kube-proxy",
    ("kube-proxy", "k3s", "k3s-server", "k3s-agent", "rke2", "kubelite"),
    "restart kube-proxy on this node (its pod; of k3s the service)",
)
_KUBELET = Owner("kubelet", ("kubelet", *_KUBE_PROXY.programs), "kubelet puts them back within a minute, or restart it")
_CALICO = Owner(
    "Calico",
    ("calico-node", "calico-felix", "felix"),
    "Felix puts them back within 3 minutes, or restart this node's calico-node",
)
_KUBE_ROUTER = Owner(
    "kube-router",
    ("kube-router", *_KUBE_PROXY.programs),
    "kube-router puts them back within 5 minutes, or restart it (of k3s the service)",
)
_FLANNEL = Owner(
    "flannel", ("flanneld", *_KUBE_PROXY.programs), "flanneld puts them back within seconds, or restart it", _POLLING
)
_PORTMAP = Owner(
    "CNI portmap", ("portmap",), "delete the pods of this node that have a hostPort; the new ones bring it"
)
_CNI_FIREWALL = Owner("CNI firewall", ("firewall",), "delete the pods of this node; the new ones bring theirs")
_NETAVARK = Owner("podman", ("netavark", "podman"), "podman network reload --all")


def _calico() -> Iterator[Lifeline]:
    for table in (Table.RAW, Table.MANGLE, Table.NAT, Table.FILTER):
        carries = "address translations" if table is Table.NAT else "network policies"
        for chain in table.builtin_chains:
            yield Lifeline(_CALICO, table, chain, (f"cali-{chain}",), carries)


def _everywhere(
    owner: Owner, table: Table, chains: Iterable[str], targets: Iterable[str], carries: str
) -> Iterator[Lifeline]:
    for chain in chains:
        yield from (Lifeline(owner, table, chain, (target,), carries) for target in targets)


KNOWN: tuple[Lifeline, ...] = (
    *_everywhere(_DOCKER, Table.NAT, ("PREROUTING", "OUTPUT"), ("DOCKER",), "published ports"),
    Lifeline(_DOCKER, Table.FILTER, "FORWARD", ("DOCKER", "DOCKER-FORWARD"), "forwards to containers"),
    Lifeline(
        _DOCKER, Table.FILTER, "FORWARD", ("DOCKER-ISOLATION-STAGE-1", "DOCKER-FORWARD"), "walls between networks"
    ),
    Lifeline(_DOCKER, Table.FILTER, "FORWARD", ("DOCKER-USER",), "the rules in DOCKER-USER"),
    *_everywhere(_DOCKER, Table.NAT, ("PREROUTING", "OUTPUT"), ("DOCKER-INGRESS",), "published ports of the swarm"),
    Lifeline(_DOCKER, Table.FILTER, "FORWARD", ("DOCKER-INGRESS",), "published ports of the swarm"),
    *_everywhere(_KUBE_PROXY, Table.NAT, ("PREROUTING", "OUTPUT"), ("KUBE-SERVICES",), "Services and NodePorts"),
    Lifeline(_KUBE_PROXY, Table.NAT, "POSTROUTING", ("KUBE-POSTROUTING",), "masquerades of Services"),
    Lifeline(_KUBE_PROXY, Table.FILTER, "FORWARD", ("KUBE-FORWARD",), "forwards to pods"),
    *_everywhere(
        _KUBE_PROXY,
        Table.FILTER,
        Table.FILTER.builtin_chains,
        ("KUBE-SERVICES", "KUBE-EXTERNAL-SERVICES", "KUBE-PROXY-FIREWALL", "KUBE-IPVS-FILTER"),
        "refusals of Services",
    ),
    *_everywhere(_KUBE_PROXY, Table.FILTER, ("INPUT",), ("KUBE-NODEPORTS", "KUBE-NODE-PORT"), "health check ports"),
    *_everywhere(_KUBELET, Table.FILTER, ("INPUT", "OUTPUT"), ("KUBE-FIREWALL",), "drops of martian packets"),
    *_calico(),
    Lifeline(_KUBE_ROUTER, Table.FILTER, "INPUT", ("KUBE-ROUTER-INPUT",), "network policies"),
    Lifeline(_KUBE_ROUTER, Table.FILTER, "FORWARD", ("KUBE-ROUTER-FORWARD",), "network policies"),
    Lifeline(_KUBE_ROUTER, Table.FILTER, "OUTPUT", ("KUBE-ROUTER-OUTPUT",), "network policies"),
    Lifeline(_FLANNEL, Table.FILTER, "FORWARD", ("FLANNEL-FWD",), "forwards of pods"),
    Lifeline(_FLANNEL, Table.NAT, "POSTROUTING", ("FLANNEL-POSTRTG",), "masquerades of pods"),
    *_everywhere(_PORTMAP, Table.NAT, ("PREROUTING", "OUTPUT"), ("CNI-HOSTPORT-DNAT",), "hostPorts"),
    Lifeline(_PORTMAP, Table.NAT, "POSTROUTING", ("CNI-HOSTPORT-MASQ",), "masquerades of hostPorts"),
    Lifeline(_CNI_FIREWALL, Table.FILTER, "FORWARD", ("CNI-FORWARD",), "forwards to pods"),
    *_everywhere(_NETAVARK, Table.NAT, ("PREROUTING", "OUTPUT"), ("NETAVARK-HOSTPORT-DNAT",), "published ports"),
    Lifeline(_NETAVARK, Table.NAT, "POSTROUTING", ("NETAVARK-HOSTPORT-MASQ",), "masquerades of published ports"),
    Lifeline(_NETAVARK, Table.FILTER, "FORWARD", ("NETAVARK_FORWARD",), "forwards to containers"),
)
"""Every lifeline that is missed once it has been seen."""


def keys(jumps: Iterable[Jump]) -> frozenset[Key]:
    """The lifelines that stand."""
    places: dict[tuple[Table, str], list[Lifeline]] = {}
    for line in KNOWN:
        places.setdefault((line.table, line.chain), []).append(line)
    return frozenset(
        Key(jump.backend, jump.family, line)
        for jump in jumps
        for line in places.get((jump.table, jump.chain), ())
        if any(fnmatch.fnmatchcase(jump.target, target) for target in line.targets)
    )


class Missing(NamedTuple):
    """A lifeline that is away: since when by the wall clock and by the monotonic one, and who took it where known."""

    since: datetime
    noticed: float
    by: Culprit | None


@dataclass
class Ledger:
    """What was seen (by the number of the look that first showed it), what is away, and what of that has been told."""

    seen: dict[Key, int] = field(default_factory=dict)
    away: dict[Key, Missing] = field(default_factory=dict)
    lost: dict[Key, Missing] = field(default_factory=dict)

    def look(
        self, standing: Collection[Key], writers: Sequence[Culprit], now: float, wall: datetime, since: datetime
    ) -> tuple[tuple[Neighbour, ...], tuple[str, ...]]:
        """What to tell now that these stand: neighbours that have lost something, and sentences of those healed.

        `writers`: who may have taken what is newly missing, in nft (legacy names nobody), and `since` when; `now` is
        monotonic, `wall` is the same moment by the wall clock.
        """
        before = _owners(self.lost)
        back = {owner: min(self.lost[key].since for key in self.lost if key.line.owner is owner) for owner in before}
        known, number = tuple(self.seen), max(self.seen.values(), default=0) + 1
        for key in standing:
            self.seen.setdefault(key, number)
            self.away.pop(key, None)
            self.lost.pop(key, None)
        for key in [key for key in known if key not in standing and key not in self.away and key not in self.lost]:
            named = suspects(writers, key.family) if key.backend is Backend.NFT else ()
            by = named[-1] if named else None
            if self._moved(key, standing) or (by and by.name in key.line.owner.programs):
                del self.seen[key]
            else:
                self.away[key] = Missing(since, now, by)
        for key in [key for key, missing in self.away.items() if now - missing.noticed >= key.line.owner.patience]:
            self.lost[key] = self.away.pop(key)
        after = _owners(self.lost)
        healed = tuple(_healed(owner, since, wall) for owner, since in back.items() if owner not in after)
        return tuple(self._tell(owner) for owner in after if owner not in before), healed

    def _moved(self, key: Key, standing: Collection[Key]) -> bool:
        """Whether the other backend has it, and not from before: then what vanishes here had been left behind."""
        other = Key(Backend.LEGACY if key.backend is Backend.NFT else Backend.NFT, key.family, key.line)
        return other in standing and self.seen[other] >= self.seen[key]

    @property
    def due(self) -> float:
        """When (monotonic) what is away is to be told; infinity when nothing is."""
        times = (missing.noticed + key.line.owner.patience for key, missing in self.away.items())
        return min(times, default=float("inf"))

    def forget(self) -> None:
        """What is away is not missed any more."""
        for key in (*self.away, *self.lost):
            self.seen.pop(key, None)
        self.away.clear()
        self.lost.clear()

    def neighbours(self) -> tuple[Neighbour, ...]:
        """Everybody who has lost something, each with all of it."""
        return tuple(self._tell(owner) for owner in _owners(self.lost))

    def _tell(self, owner: Owner) -> Neighbour:
        lost = {key: missing for key, missing in self.lost.items() if key.line.owner is owner}
        since = min(missing.since for missing in lost.values())
        by = next((missing.by for missing in lost.values() if missing.by), None)
        carried = dict.fromkeys(key.line.carries for key in sorted(lost, key=lambda key: KNOWN.index(key.line)))
        what = f"{_listed(carried)} of {owner.name}{self._where(owner, lost)} are dead since {_clock(since)}"
        what += f", flushed by {_program(by)}" if by else ""
        jumps = tuple(
            f"{key.line.table} {key.line.chain} -> {key.line.targets[0]} ({key.family}, {key.backend})"
            for key in sorted(lost, key=lambda key: (KNOWN.index(key.line), key.family, key.backend))
        )
        return Neighbour(
            name=owner.name, what=f"{what}: {owner.cure}", since=since, by=by, cure=owner.cure, jumps=jumps
        )

    def _where(self, owner: Owner, lost: Mapping[Key, Missing]) -> str:
        """The family, when the other one is well."""
        families = {key.family for key in lost}
        owned = {key.family for key in self.seen if key.line.owner is owner}
        return f" ({'IPv4' if Family.IPV4 in families else 'IPv6'})" if len(families) < len(owned) else ""


def _owners(lost: Iterable[Key]) -> tuple[Owner, ...]:
    return tuple(dict.fromkeys(key.line.owner for key in sorted(lost, key=lambda key: KNOWN.index(key.line))))


def _healed(owner: Owner, since: datetime, wall: datetime) -> str:
    away = max(0.0, (wall - since).total_seconds())
    return f"the jumps of {owner.name} stand again, after {duration(away * 1000)}"


def _clock(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%H:%M:%S} UTC"


def _program(by: Culprit) -> Process:
    """The program to look at, with its pid."""
    itself = Process(by.pid, by.comm)
    return next((each for each in (itself, *by.parents) if printable(each.comm) == by.name), itself)


def _listed(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
