"""Which ports of this node nat PREROUTING rewrites, and which Services kube-proxy serves: read from its live rules.

Law: what is rewritten is so for everybody who comes from outside. A rule with a condition that is not understood, or
with sources or destinations of its own, is taken to rewrite nothing. kube-proxy's chains are those of its
pkg/proxy/iptables/proxier.go (KUBE-NODEPORTS, KUBE-SERVICES, KUBE-EXT-, KUBE-FW-, KUBE-XLB-, KUBE-SVC-).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from nodewalld.core.config import PortRange
from nodewalld.core.desired import OWN_PREFIX
from nodewalld.core.lints.facts import Chains
from nodewalld.core.lints.texts import Text, overlap, take_apart
from nodewalld.core.ruletext import Rule

NODE_PORTS = PortRange(30000, 32767)
"""kube-apiserver's --service-node-port-range, unless it is told otherwise."""

_NODE_PORTS_CHAIN = "KUBE-NODEPORTS"
_IPVS_CHAINS = ("KUBE-NODE-PORT", "KUBE-LOAD-BALANCER")
_ENDS = frozenset({"ACCEPT", "RETURN"})
_REWRITES = frozenset({"DNAT", "REDIRECT"})
_DEPTH_MAX = 16  # chains within chains; nobody nests them deeper
_FOR_THE_NODE = (
    ("--dst-type", ("LOCAL",), False),
    ("-d", ("127.0.0.0/8",), True),  # loopback, which nobody dials from outside
    ("-d", ("::1/128",), True),
)
_EXTERNAL_CHAINS = ("KUBE-EXT-", "KUBE-FW-", "KUBE-XLB-")


@dataclass(frozen=True, slots=True)
class Rewritten:
    """Ports that a rule in `chain` rewrites, save for what comes in by the interfaces in `spared`."""

    protocol: str
    ports: tuple[PortRange, ...]
    chain: str
    spared: frozenset[str]


@dataclass(frozen=True, slots=True)
class NodePort:
    """A NodePort that kube-proxy serves; `service` is the hash that its chains share."""

    protocol: str
    port: int
    service: str
    name: str


@dataclass(frozen=True, slots=True)
class External:
    """A LoadBalancer or external address by which a Service is reached."""

    address: str
    protocol: str
    port: int
    service: str


def serves_by_ipvs(nat: Chains) -> bool:
    """Whether kube-proxy's chains are those of its ipvs mode, in which a NodePort arrives at INPUT."""
    return any(chain in nat for chain in _IPVS_CHAINS)


class Rewrites:
    """What a nat table rewrites before routing."""

    def __init__(self, nat: Chains) -> None:
        self._nat = nat
        self._leading: dict[str, bool] = {}
        self._spared: list[tuple[str, PortRange]] = []
        self._seen: set[str] = set()
        self.found = tuple(self._walk("PREROUTING", frozenset(), 0))

    @property
    def reaches_node_ports(self) -> bool:
        """Whether kube-proxy's NodePorts are asked for."""
        return _NODE_PORTS_CHAIN in self._seen

    def _walk(self, name: str, spared: frozenset[str], depth: int) -> Iterator[Rewritten]:
        self._seen.add(name)
        for rule in self._nat.get(name, ()):
            if _narrowed(rule) or OWN_PREFIX in rule.text:
                continue
            text = take_apart(rule.text)
            if " -g " in rule.text and text.conditions:
                return  # some never come back: what follows is not for everybody
            interfaces = frozenset(word for each in text.given("-i") for word in each.arguments if not each.negated)
            if text.target in _ENDS:
                if not text.conditions:
                    return
                if text.only("-i"):
                    spared |= interfaces
                elif text.only("-p", "--dport", "--dports"):
                    self._spared += [(text.protocol, span) for span in text.ports]
            elif not interfaces and _understood(text):
                yield from self._follow(text, name, spared, depth)

    def _follow(self, text: Text, name: str, spared: frozenset[str], depth: int) -> Iterator[Rewritten]:
        passed = spared | {word for each in text.given("-i") for word in each.arguments}
        if not text.given("--dport") and not text.given("--dports"):
            if text.target in self._nat and text.target not in self._seen and depth < _DEPTH_MAX:
                yield from self._walk(text.target, passed, depth + 1)
        elif text.ports and (text.target in _REWRITES or self._leads(text.target, 0)):
            exempt = [span for protocol, span in self._spared if protocol in ("", text.protocol)]
            if not overlap(text.ports, exempt):
                yield Rewritten(text.protocol, text.ports, name, passed)

    def _leads(self, name: str, depth: int) -> bool:
        """Whether a chain holds a DNAT, or leads to one: a Service without endpoints doesn't."""
        if name not in self._leading:
            self._leading[name] = False  # what leads back here leads nowhere
            targets = [rule.target for rule in self._nat.get(name, ())] if depth < _DEPTH_MAX else []
            self._leading[name] = any(each in _REWRITES or self._leads(each, depth + 1) for each in targets)
        return self._leading[name]


def _narrowed(rule: Rule) -> bool:
    """Whether a rule is for some sources or destinations only; most rules of a large node are, and are not read."""
    return rule.text.startswith(("-s ", "-d "))


def _understood(text: Text) -> bool:
    return all(
        (each.option in ("-p", "--dport", "--dports") and not each.negated)
        or (each.option == "-i" and each.negated)
        or (each.option, each.arguments, each.negated) in _FOR_THE_NODE
        for each in text.conditions
    )


def node_ports(nat: Chains) -> Iterator[NodePort]:
    """The NodePorts of kube-proxy's iptables mode."""
    for rule in nat.get(_NODE_PORTS_CHAIN, ()):
        text = take_apart(rule.text)
        if len(text.ports) == 1 and text.target.startswith((*_EXTERNAL_CHAINS, "KUBE-SVC-")):
            name = next(iter(rule.comments), "")
            yield NodePort(text.protocol, text.ports[0].first, text.target.rpartition("-")[2], name)


def externals(nat: Chains) -> Iterator[External]:
    """The LoadBalancer and external addresses of Services in kube-proxy's iptables mode."""
    for rule in nat.get("KUBE-SERVICES", ()):
        if not any(f"-j {prefix}" in rule.text for prefix in _EXTERNAL_CHAINS) and " external IP" not in rule.text:
            continue
        text = take_apart(rule.text)
        addresses = [str(network.network_address) for network, negated in text.addresses("-d") if not negated]
        if len(addresses) == len(text.ports) == 1 and text.target.startswith((*_EXTERNAL_CHAINS, "KUBE-SVC-")):
            service = text.target.rpartition("-")[2]
            yield External(addresses[0], text.protocol, text.ports[0].first, service)
