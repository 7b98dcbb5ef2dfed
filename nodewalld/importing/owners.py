"""Whose rule is it: the neighbours' chains by name, and the rules that they write straight into built-in chains.

Law: what is not known to be a neighbour's is taken for hand-made. A rule in a built-in chain is a neighbour's when it
jumps to a chain of theirs, bears their comment, or has exactly the shape that they write *and* something else in the
dump shows that they are at work with that bridge or network. What stands in a neighbour's chain is theirs, but for
the chains that they keep free for their users.

Sources: the programs' own code and the rulesets that they left on real nodes (docs/import.md names them).
"""

import fnmatch
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from nodewalld.core.ruletext import TAG_PREFIX, Rule, join
from nodewalld.core.words import Table
from nodewalld.importing.dump import Dump, Line

USERS_CHAINS = ("DOCKER-USER", "CNI-ADMIN")
"""Chains that a neighbour makes and leaves to the node's owner."""

_CHAINS = (  # the first that matches counts
    ("nodewalld", ("NODEWALL-*",)),
    ("kube-router", ("KUBE-ROUTER-*", "KUBE-POD-FW-*", "KUBE-NWPLCY-*")),
    ("Kubernetes", ("KUBE-*",)),
    ("Calico", ("cali-*", "felix-*")),
    ("Docker", ("DOCKER", "DOCKER-*")),
    ("CNI plugins", ("CNI-*",)),
    ("flannel", ("FLANNEL-*",)),
    ("Tailscale", ("ts-*",)),
    ("libvirt", ("LIBVIRT_*",)),
    ("podman", ("NETAVARK*",)),
    ("fail2ban", ("f2b-*", "fail2ban-*")),
    ("ufw", ("ufw-*", "ufw6-*")),
    ("Cilium", ("CILIUM_*", "OLD_CILIUM_*")),
    ("Weave", ("WEAVE", "WEAVE-*")),
    ("Istio", ("ISTIO_*",)),
    ("Antrea", ("ANTREA-*",)),
    ("AWS VPC CNI", ("AWS-*",)),
    ("Azure NPM", ("AZURE-NPM*",)),
    ("Rancher", ("CATTLE_*",)),
    ("NetBird", ("NETBIRD-*",)),
    ("OpenVPN Access Server", ("AS0_*",)),
    ("NetworkManager", ("nm-sh-*",)),
    ("CrowdSec", ("CROWDSEC_*",)),
)
_COMMENTS = (
    ("nodewalld", (f"{TAG_PREFIX}*",)),
    ("Calico", ("cali:*",)),
    ("Kubernetes", ("kubernetes *",)),
    ("kube-router", ("kube-router *", "KUBE-ROUTER *")),
    ("flannel", ("flanneld *",)),
    ("LXD", ("generated for LXD network *", "generated for Incus network *")),
    ("podman", ("netavark *",)),
    ("CNI plugins", ('name: "*" id: "*"', "CNI *")),
)
_FIREWALLD_CHAIN = re.compile(
    r"(?:INPUT|FORWARD|FORWARD_IN|FORWARD_OUT|OUTPUT|PREROUTING|POSTROUTING)_"
    r"(?:ZONES(?:_SOURCE|_IFACES)?|POLICIES(?:_pre|_post)?|direct)"
    r"|(?:IN|OUT|PRE|POST|FWD|FWDI|FWDO)_.+|RFC3964_IPv4"
)
_FIREWALLD_RULES = frozenset(
    {
        "-m conntrack --ctstate RELATED,ESTABLISHED,DNAT -j ACCEPT",
        "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "-m conntrack --ctstate INVALID -j DROP",
        "-i lo -j ACCEPT",
        "-o lo -j ACCEPT",
        "-p icmp -j ACCEPT",
        "-p ipv6-icmp -j ACCEPT",
        "-p ipv6-icmp -m icmp6 --icmpv6-type 134 -j ACCEPT",
        "-p ipv6-icmp -m icmp6 --icmpv6-type 135 -j ACCEPT",
        "-m rpfilter --validmark --invert -j DROP",
        "-m rpfilter --invert --validmark -j DROP",
        "-j REJECT --reject-with icmp-host-prohibited",
        "-j REJECT --reject-with icmp6-adm-prohibited",
    }
)
_DOCKER_BRIDGE = re.compile(r"docker0|docker_gwbridge|br-[0-9a-f]{12}")
_MASQUERADE = r"(?:MASQUERADE|SNAT --to-source \S+)(?: --random-fully| --random)?"
_L4 = r"-p (?:tcp|udp|sctp) -m (?:tcp|udp|sctp) --dport \d+"
_BRIDGE = r"(?P<bridge>\S+)"


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a neighbour writes into one built-in chain; a `bridge` or `net` in it must be known to be theirs."""

    owner: str
    table: Table
    chains: tuple[str, ...]
    pattern: re.Pattern[str]


def _shapes(owner: str, table: Table, chains: str, *patterns: str) -> Iterator[_Shape]:
    for pattern in patterns:
        yield _Shape(owner, table, tuple(chains.split()), re.compile(pattern))


_VIRBR = r"(?P<bridge>virbr\d+)"
_SHAPES = (
    *_shapes(
        "Docker",
        Table.FILTER,
        "FORWARD",
        rf"-i {_BRIDGE} ! -o (?P=bridge) -j ACCEPT",
        rf"-i {_BRIDGE} -o (?P=bridge) -j (?:ACCEPT|DROP)",
        rf"-o {_BRIDGE} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    ),
    *_shapes(
        "Docker",
        Table.NAT,
        "POSTROUTING",
        rf"-s \S+ ! -o {_BRIDGE} -j {_MASQUERADE}",
        rf"-o {_BRIDGE} -m addrtype --src-type LOCAL -j MASQUERADE",
        rf"-s (?P<container>\S+) -d (?P=container) {_L4} -j {_MASQUERADE}",
    ),
    *_shapes(
        "Docker",
        Table.RAW,
        "PREROUTING",
        rf"-d \S+ ! -i {_BRIDGE} (?:{_L4} )?-j DROP",
        rf"-d (?P<container>127\.0\.0\.1/32) ! -i lo {_L4} -j DROP",
    ),
    *_shapes(
        "libvirt",
        Table.FILTER,
        "INPUT OUTPUT",
        rf"-[io] {_VIRBR} -p (?:udp|tcp) -m (?:udp|tcp) --dport (?:53|67|68|546|547) -j ACCEPT",
    ),
    *_shapes(
        "libvirt",
        Table.FILTER,
        "FORWARD",
        rf"-d \S+ -o {_VIRBR} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        rf"-s \S+ -i {_VIRBR} -j ACCEPT",
        rf"-i {_VIRBR} -o (?P=bridge) -j ACCEPT",
        rf"-[io] {_VIRBR} -j REJECT --reject-with \S+",
    ),
    *_shapes(
        "libvirt",
        Table.MANGLE,
        "POSTROUTING",
        rf"-o {_VIRBR} -p udp -m udp --dport 68 -j CHECKSUM --checksum-fill",
    ),
    *_shapes(
        "libvirt",
        Table.NAT,
        "POSTROUTING",
        r"-s (?P<libvirt>\S+) -d (?:224\.0\.0\.0/24|255\.255\.255\.255/32) -j RETURN",
        r"-s (?P<libvirt>\S+) ! -d (?P=libvirt) (?:-p (?:tcp|udp) )?-j MASQUERADE(?: --to-ports 1024-65535)?",
    ),
    *_shapes(
        "flannel",
        Table.NAT,
        "POSTROUTING",
        r"-s (?P<flannel>\S+) -d (?P=flannel) -j RETURN",
        r"-s (?P<flannel>\S+) ! -d 224\.0\.0\.0/4 -j MASQUERADE(?: --random-fully)?",
        r"! -s (?P<flannel>\S+) -d \S+ -j RETURN",
        r"! -s (?P<flannel>\S+) -d (?P=flannel) -j MASQUERADE(?: --random-fully)?",
    ),
    *_shapes("flannel", Table.FILTER, "FORWARD", r"-s (?P<flannel>\S+) -j ACCEPT", r"-d (?P<flannel>\S+) -j ACCEPT"),
    *_shapes(
        "Tailscale",
        Table.MANGLE,
        "FORWARD",
        r"-[io] tailscale0 -p tcp -m tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu",
    ),
)


@dataclass(frozen=True)
class Owners:
    """Who owns what in one dump."""

    dump: Dump

    def of_chain(self, name: str) -> str:
        """The neighbour whose chain this is; "" for built-in and hand-made chains."""
        for owner, globs in _CHAINS:
            if _matches(name, globs):
                return owner
        return "firewalld" if self._firewalld and _FIREWALLD_CHAIN.fullmatch(name) else ""

    def of_rule(self, line: Line) -> str:
        """The neighbour that wrote this rule; "" for a hand-made one. Raises ValueError on quotes that don't close."""
        owner = self.of_chain(line.chain)
        if line.rule is None or (owner and line.chain not in USERS_CHAINS):
            return owner
        if line.chain in USERS_CHAINS and line.rule.bare == ("-j", "RETURN"):
            return owner  # Docker's own end of DOCKER-USER
        return self.of_chain(line.rule.target) or _of_comments(line.rule) or self._of_shape(line, line.rule)

    def _of_shape(self, line: Line, rule: Rule) -> str:
        text = join(rule.bare)
        for shape in _SHAPES:
            here = line.table is shape.table and line.chain in shape.chains
            found = shape.pattern.fullmatch(text) if here else None
            if found and all(self._is_known(kind, value) for kind, value in found.groupdict().items()):
                return shape.owner
        firewalls = line.chain in line.table.builtin_chains and self._firewalld and text in _FIREWALLD_RULES
        return "firewalld" if firewalls else ""

    def _is_known(self, kind: str, value: str) -> bool:
        match kind:
            case "bridge":
                return value.startswith("virbr") or value in self._bridges or bool(_DOCKER_BRIDGE.fullmatch(value))
            case "container":
                return self._docker
            case "libvirt":
                return value in self._libvirt_networks
            case _:
                return value in self._flannel_networks

    def _names(self) -> Iterator[str]:
        for chains in self.dump.chains.values():
            yield from chains

    @cached_property
    def _docker(self) -> bool:
        return "DOCKER" in set(self._names())

    @cached_property
    def _firewalld(self) -> bool:
        return any(name.endswith(("_direct", "_ZONES")) for name in self._names())

    @cached_property
    def _bridges(self) -> frozenset[str]:
        """The bridges that Docker's own chains, or the jumps to them, name."""
        found = set()
        for line in self.dump.lines():
            if line.rule and (line.chain.startswith("DOCKER") or " -j DOCKER" in line.text):
                found |= set(re.findall(r"-[io] (\S+)", line.text))
        return frozenset(found - {"lo"})

    @cached_property
    def _libvirt_networks(self) -> frozenset[str]:
        return self._networks(_LIBVIRT_SIGNS)

    @cached_property
    def _flannel_networks(self) -> frozenset[str]:
        return self._networks(_FLANNEL_SIGNS)

    def _networks(self, signs: tuple[re.Pattern[str], ...]) -> frozenset[str]:
        """The networks in those rules that nobody else writes."""
        return frozenset(n for line in self._in_builtin() for sign in signs for n in sign.findall(line.text))

    def _in_builtin(self) -> Iterable[Line]:
        for table, chains in self.dump.chains.items():
            for name in table.builtin_chains:
                yield from chains.get(name, ())


_LIBVIRT_SIGNS = (
    re.compile(r"-A FORWARD -s (\S+) -i virbr\d+ -j ACCEPT"),
    re.compile(r"-A POSTROUTING -s (\S+) ! -d \1 -p tcp -j MASQUERADE --to-ports 1024-65535"),
)
_FLANNEL_SIGNS = (re.compile(r"-A POSTROUTING -s (\S+) ! -d 224\.0\.0\.0/4 .*-j MASQUERADE"),)


def _of_comments(rule: Rule) -> str:
    for owner, globs in _COMMENTS:
        if any(_matches(comment, globs) for comment in rule.comments):
            return owner
    return ""


def _matches(text: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(text, glob) for glob in globs)
