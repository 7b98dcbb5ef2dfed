"""The words of iptables for one condition or one consequence. No chain is known here."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from nodewalld.core.config import Action, PortRange, ProtocolPorts
from nodewalld.core.decide import Decisions, Refusal, Source
from nodewalld.core.words import Family

REPLY = ("-m", "conntrack", "--ctdir", "REPLY")
DNAT = ("-m", "conntrack", "--ctstate", "DNAT")
_MULTIPORT_SLOTS = 15  # XT_MULTI_PORTS; a range takes two
_LOG_LIMIT = ("-m", "limit", "--limit", "5/sec", "--limit-burst", "10")


def source_words(source: Source, *, direction: str = "src", negated: bool = False) -> tuple[str, ...]:
    """The match for one address list element; `direction` is src or dst."""
    bang = ("!",) if negated else ()
    if source.set_name:
        return ("-m", "set", *bang, "--match-set", source.set_name, direction)
    return (*bang, "-s" if direction == "src" else "-d", str(source.network))


def port_words(services: Iterable[ProtocolPorts]) -> Iterator[tuple[str, ...]]:
    """Matches by destination port, as few as multiport allows."""
    by_protocol: dict[str, list[PortRange]] = defaultdict(list)
    for service in services:
        by_protocol[service.protocol].append(service.ports)
    for protocol, ranges in by_protocol.items():
        yield from (("-p", protocol, *words) for words in port_matches(protocol, ranges))


def port_matches(protocol: str, ranges: Sequence[PortRange], option: str = "dport") -> Iterator[tuple[str, ...]]:
    """Matches by port without the `-p`, as few as multiport allows; `option` is dport or sport."""
    if len(ranges) == 1:
        yield ("-m", protocol, f"--{option}", _range(ranges[0]))
        return
    chunk: list[str] = []
    room = _MULTIPORT_SLOTS
    for ports in ranges:
        need = 1 if ports.first == ports.last else 2
        if need > room:
            yield ("-m", "multiport", f"--{option}s", ",".join(chunk))
            chunk, room = [], _MULTIPORT_SLOTS
        chunk.append(_range(ports))
        room -= need
    yield ("-m", "multiport", f"--{option}s", ",".join(chunk))


def _range(ports: PortRange) -> str:
    return str(ports.first) if ports.first == ports.last else f"{ports.first}:{ports.last}"


def origin_words(service: ProtocolPorts, address: Sequence[str] = ()) -> tuple[str, ...]:
    """The match by what conntrack says was dialled."""
    return ("-p", service.protocol, "-m", "conntrack", *address, "--ctorigdstport", _range(service.ports))


def related_words(family: Family) -> tuple[str, ...]:
    """The match for ICMP errors about flows that conntrack knows: no path MTU is found without them."""
    return ("-p", "icmp" if family is Family.IPV4 else "ipv6-icmp", "-m", "conntrack", "--ctstate", "RELATED")


def local_words(family: Family) -> tuple[tuple[str, ...], ...]:
    """Matches for what this node answers.

    IPv6 takes two: xt_addrtype wants a multicast type to hold beside the others, not instead of them
    (net/netfilter/xt_addrtype.c, match_type6).
    """
    if family is Family.IPV4:
        return (("-m", "addrtype", "--dst-type", "LOCAL,BROADCAST,ANYCAST,MULTICAST"),)
    return (("-m", "addrtype", "--dst-type", "LOCAL,ANYCAST"), ("-m", "addrtype", "--dst-type", "MULTICAST"))


def log_words(refusal: Refusal) -> Iterator[tuple[str, ...]]:
    """The rate-limited LOG rule of a refusal, if it has one."""
    if refusal.log_prefix:
        yield (*_LOG_LIMIT, "-j", "LOG", "--log-prefix", refusal.log_prefix)


def marked_words(decisions: Decisions) -> tuple[str, ...]:
    """The match for what is to be rejected."""
    return ("-m", "mark", "--mark", f"{decisions.mark:#x}/{decisions.mark:#x}")


def refusal_words(decisions: Decisions, refusal: Refusal) -> Iterator[tuple[str, ...]]:
    """The rules of a chain in mangle that refuses all that comes: each packet is counted and logged once."""
    if refusal.action is Action.REJECT and refusal.enforce:
        yield (*marked_words(decisions), "-j", "RETURN")  # by the first judgement
    yield from log_words(refusal)
    yield refuse_words(decisions, refusal) if refusal.enforce else ()


def refuse_words(decisions: Decisions, refusal: Refusal) -> tuple[str, ...]:
    """The target of a refusal in mangle: reject can only be marked there."""
    if refusal.action is Action.REJECT:
        return ("-j", "MARK", "--set-xmark", f"{decisions.mark:#x}/{decisions.mark:#x}")
    return ("-j", "DROP")


def reject_words(family: Family) -> tuple[tuple[str, ...], ...]:
    """A TCP reset, and for everything else the ICMP error "port unreachable"."""
    unreachable = "icmp-port-unreachable" if family is Family.IPV4 else "icmp6-port-unreachable"
    return (
        ("-p", "tcp", "-j", "REJECT", "--reject-with", "tcp-reset"),
        ("-j", "REJECT", "--reject-with", unreachable),
    )
