"""[[port]] and zones: the gates that judge what a client dialled.

Laws: a refusal is judged twice: in mangle PREROUTING as it was dialled, and again in mangle INPUT and FORWARD, where no
neighbour writes, by what conntrack says was dialled (by what it dials, if nothing rewrote it). Nothing depends on NEW:
gates begin by returning loopback and replies, the rest is stateless. Allowed is RETURN, never ACCEPT.

The chains: gate-<CHAIN> judges; dialled, own and origin sort by destination and port; p-NAME asks for the source;
x-NAME refuses.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import product

from nodewalld.core.common import own_networks
from nodewalld.core.config import Action, Destination
from nodewalld.core.decide import IPVS_SET, Judgement, Source, kernel_set_name
from nodewalld.core.iptables.matches import (
    DNAT,
    REPLY,
    local_words,
    log_words,
    origin_words,
    port_words,
    refusal_words,
    source_words,
)
from nodewalld.core.iptables.writer import EARLY, OURS, Writer, chain_name
from nodewalld.core.iptables.zones import ZONES, ZONES_ORIGIN, first_zones, write_zones
from nodewalld.core.words import Table


class Gates:
    """The chains that judge every [[port]], in mangle (drop, reject, and redirect's backstop) or nat (redirect)."""

    def __init__(self, writer: Writer, table: Table) -> None:
        self.writer, self.table = writer, table
        judgements = writer.decisions.judgements
        redirects = [j for j in judgements if j.refusal.action is Action.REDIRECT]
        others = [j for j in judgements if j.refusal.action is not Action.REDIRECT]
        judged = redirects if table is Table.NAT else others
        # What is only counted is counted by the second judgement, and once.
        self.first = [j for j in judged if j.refusal.enforce]
        self.own = [j for j in judged if j.from_node]
        self.second = [] if table is Table.NAT else list(judgements)
        self.zones = () if table is Table.NAT else writer.decisions.zones

    def _add(self, chain: str, *parts: Sequence[str], entry: str = "ports") -> None:
        self.writer.add(self.table, chain, entry, *parts)

    def write(self) -> None:
        """Write every gate that has something to judge."""
        if self.first or self.zones:
            zones = first_zones(self.zones)
            self._by_dialled("PREROUTING", self.first, "dialled", (("-i", "lo", "-j", "RETURN"),), zones=zones)
        if self.own:
            self._by_dialled("OUTPUT", self.own, "own", ())
        if self.second or self.zones:
            self._input()
            self._forward()
            self._origin()
        for judgement in {j.entry: j for j in (*self.first, *self.own, *self.second)}.values():
            self._judge(judgement)
        if self.zones:
            write_zones(self.writer, self.zones)

    def _gate(self, chain: str) -> str:
        gate = chain_name("gate", chain)
        position = self.writer.chain_at(self.table, chain, EARLY, OURS, "ports")
        self._add(position, ("-j", gate))
        return gate

    def _failsafe(self, chain: str, matches: Iterable[Sequence[str]]) -> None:
        sources = self.writer.decisions.failsafe_sources
        for match in matches:
            for source in sources.items if not sources.any else (None,):
                words = source_words(source) if source else ()
                self._add(chain, *_ordered(words, match), ("-j", "RETURN"), entry="failsafe")

    def _dispatch(self, chain: str, judgements: Sequence[Judgement], target: str = "", *, zones: str = "") -> None:
        """By the port that the packet dials now; `target` other than "" is where local destinations are sorted.

        `zones` is the chain that sorts the zones.
        """
        for j in judgements:
            if j.dialled is Destination.LOCAL:
                continue
            for match, address in product(port_words(j.services), self._addresses(j)):
                self._add(chain, address, match, ("-j", chain_name("p", j.name)), entry=j.entry)
        local = [j for j in judgements if j.dialled is Destination.LOCAL]
        zoned = bool(zones and self.zones)
        if not local and not zoned:
            return
        if target:
            for match in local_words(self.writer.family):
                self._add(chain, match, ("-j", target))
        if self.writer.decisions.has_service_addresses:
            name = kernel_set_name(IPVS_SET, self.writer.family)
            self._add(target or chain, source_words(Source(set_name=name), direction="dst"), ("-j", "RETURN"))
        for j in local:
            for match in port_words(j.services):
                self._add(target or chain, match, ("-j", chain_name("p", j.name)), entry=j.entry)
        if zoned:
            self._add(target or chain, ("-j", zones))

    @staticmethod
    def _addresses(j: Judgement) -> Sequence[Sequence[str]]:
        if isinstance(j.dialled, Destination):
            return ((),)
        return [("-d", str(network)) for network in j.dialled]

    def _by_dialled(
        self,
        hook: str,
        judgements: Sequence[Judgement],
        sorter: str,
        head: Sequence[Sequence[str]],
        *,
        zones: str = "",
    ) -> None:
        gate = self._gate(hook)
        for words in head:
            self._add(gate, words)
        self._add(gate, REPLY, ("-j", "RETURN"))
        self._failsafe(gate, port_words(self.writer.decisions.failsafe))
        self._dispatch(gate, judgements, chain_name("", sorter), zones=zones)

    def _input(self) -> None:
        gate = self._gate("INPUT")
        self._add(gate, ("-i", "lo", "-j", "RETURN"))
        self._add(gate, REPLY, ("-j", "RETURN"))
        self._add(gate, DNAT, ("-g", chain_name("", "origin")))
        self._failsafe(gate, port_words(self.writer.decisions.failsafe))
        self._dispatch(gate, self.second, zones=ZONES)

    def _forward(self) -> None:
        gate = self._gate("FORWARD")
        self._add(gate, REPLY, ("-j", "RETURN"))
        self._add(gate, DNAT, ("-g", chain_name("", "origin")))
        elsewhere = [j for j in self.second if j.dialled is not Destination.LOCAL]
        if elsewhere:
            self._failsafe(gate, port_words(self.writer.decisions.failsafe))
            self._dispatch(gate, elsewhere)

    def _origin(self) -> None:
        """Packets that somebody's DNAT has rewritten: by the address and port that the client dialled."""
        chain, local_chain = chain_name("", "origin"), chain_name("", "origin-local")
        # Made even if it stays empty, as before the network has come up: the gates name it.
        self.writer.chains[self.table].setdefault(chain, [])
        self._failsafe(chain, (origin_words(s) for s in self.writer.decisions.failsafe))
        for j in self.second:
            judge = ("-j", chain_name("p", j.name))
            for service in j.services:
                if j.dialled is Destination.LOCAL:
                    self._add(local_chain, origin_words(service), judge, entry=j.entry)
                elif j.dialled is Destination.ANY:
                    self._add(chain, origin_words(service), judge, entry=j.entry)
                else:
                    for network in j.dialled:
                        match = origin_words(service, ("--ctorigdst", str(network)))
                        self._add(chain, match, judge, entry=j.entry)
        if any(j.dialled is Destination.LOCAL for j in self.second):
            for network in own_networks(self.writer.decisions):
                self._add(chain, ("-m", "conntrack", "--ctorigdst", str(network)), ("-j", local_chain))
        if self.zones:
            # Whatever was dialled: addresses of load balancers are held by no interface, and still lead to this node.
            self._add(chain, ("-j", ZONES_ORIGIN))

    def _judge(self, j: Judgement) -> None:
        judge, refuse = chain_name("p", j.name), chain_name("x", j.name)
        for source in j.deny:
            self._add(judge, source_words(source), ("-g", refuse), entry=j.entry)
        for source in j.allow:
            self._add(judge, source_words(source), ("-j", "RETURN"), entry=j.entry)
        self._add(judge, ("-g", refuse), entry=j.entry)
        for words in self._refuse(j):
            self._add(refuse, words, entry=j.entry)

    def _refuse(self, j: Judgement) -> Iterator[Sequence[str]]:
        refusal = j.refusal
        protocols = tuple(dict.fromkeys(service.protocol for service in j.services))
        port = str(refusal.redirect_to)
        if self.table is Table.NAT:
            yield from log_words(refusal)
            yield from (
                (("-p", p, "-j", "REDIRECT", "--to-ports", port) for p in protocols) if refusal.enforce else ((),)
            )
            return
        if refusal.action is Action.REDIRECT:
            # What nat has sent to the closed port must get there, to be answered by it.
            arrived = ("-m", "addrtype", "--dst-type", "LOCAL", "-j", "RETURN")
            yield from (("-p", p, "-m", p, "--dport", port, *arrived) for p in protocols)
        yield from refusal_words(self.writer.decisions, refusal)


def _ordered(first: Sequence[str], second: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Two matches so that what iptables prints before all `-m` (addresses, protocol) stands first."""
    return (second, first) if first[:1] == ("-m",) else (first, second)
