"""Decisions -> shield: the refusals of [[port]], zones and [[forward]], of both families, in one table.

Laws: who is let through is the same as in iptables. What drops stands before DNAT (routed traffic behind it, as in
iptables). What answers (reject, redirect) is for iptables to do; behind filter the shield drops what should have been
answered and was not. What can't be said exactly isn't said: `iptables_only` tells of it.

The chains, for each family: <HOOK> judges what comes to a base chain, <HOOK>-ports by its port; origin judges by what
was dialled before somebody's DNAT; port-NAME, zone-NAME and forward-NAME judge for an entry, refuse-... drops. "-last"
is behind filter.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product

from nodewalld.core.common import ICMP, ICMPV6, own_networks, zone_members
from nodewalld.core.config import Action, Destination, PortRange
from nodewalld.core.decide import (
    IPVS_SET,
    Decisions,
    Judgement,
    RawRule,
    Refusal,
    Routed,
    Source,
    ZoneDecision,
    kernel_set_name,
)
from nodewalld.core.shield.draft import Draft
from nodewalld.core.shield.matches import LOOPBACK, MULTICAST, icmp_protocol, links, named_protocol, passing
from nodewalld.core.shield.ports import by_protocol, segments
from nodewalld.core.shield.rules import (
    AddressSet,
    Among,
    Answered,
    Dispatch,
    Flow,
    Hook,
    IcmpType,
    Log,
    Loopback,
    Match,
    OfFamily,
    Port,
    PortMap,
    Ports,
    Rule,
    Shield,
    Side,
    Stage,
    Verdict,
    Within,
    Word,
)
from nodewalld.core.words import Family, Table

_DROP, _RETURN = Verdict(Word.DROP), Verdict(Word.RETURN)

Then = Verdict | Dispatch | Log


def render(decisions: Mapping[Family, Decisions]) -> Shield:
    """The shield of these families."""
    table = Draft()
    for each in decisions.values():
        _Half(table, each).write()
    return table.shield()


def _jump(chain: str) -> Verdict:
    return Verdict(Word.JUMP, chain)


def _goto(chain: str) -> Verdict:
    return Verdict(Word.GOTO, chain)


class _Half:
    """Writes one family's half of the table."""

    def __init__(self, table: Draft, decisions: Decisions) -> None:
        self.table, self.decisions, self.family = table, decisions, decisions.family
        self.contents = dict(decisions.sets)
        self._sift()

    # What is carried at all

    def _sift(self) -> None:
        """Sort out what iptables alone can say, with the reason."""
        d, only = self.decisions, self.table.iptables_only
        only.update((raw.entry, "the text of a rule is iptables'") for raw in d.rules if raw.rule.enforce)
        accepting = {raw.rule.chain for raw in d.rules if _accepts(raw)}
        exempt = "a [[rule]] that accepts in mangle goes before it"
        everywhere = Table.MANGLE.builtin_chains[0] in accepting and bool(accepting & {"INPUT", "FORWARD"})
        self.judgements = [j for j in d.judgements if self._carried(j.entry, j.refusal, exempt if everywhere else "")]
        self.own = [j for j in self.judgements if j.from_node]
        if "OUTPUT" in accepting:
            only.update((j.entry, f"judging this node itself: {exempt}") for j in self.own)
            self.own = []
        zones = [zone for zone in d.zones if zone.verdict.action is not Action.ACCEPT]
        carried = [z for z in zones if self._carried(z.entry, z.verdict, exempt if everywhere else "")]
        self.refusing_zones = {zone.name: zone.verdict.action for zone in carried}
        self.routed = []
        for routed in d.routed:
            why = exempt if "FORWARD" in accepting else ""
            if routed.verdict.action is Action.ACCEPT:
                why = "an accept is for the others' rules behind it"
            elif routed.position is not None:
                why = "its place among others' rules is its meaning"
            if self._carried(routed.entry, routed.verdict, why):
                self.routed.append(routed)

    def _carried(self, entry: str, verdict: Refusal, why_not: str) -> bool:
        if not verdict.enforce:
            why_not = "it only counts"
        if why_not:
            self.table.iptables_only[entry] = why_not
        return not why_not

    # Writing

    def _name(self, which: str) -> str:
        return f"{self.family}-{which}"

    def _of(self, kind: str, name: str) -> str:
        """The name of an entry's chain; no name of an entry holds a slash."""
        return f"{self._name(kind)}/{name}"

    def _add(self, chain: str, entry: str, matches: Iterable[Match], then: Then) -> None:
        self.table.chains.setdefault(chain, []).append(Rule(entry, tuple(matches), then))

    def _begin(self, hook: Hook, stage: Stage, mark: int = 0) -> str:
        """The chain to which a base chain leads this family's packets."""
        base, chain = self.table.base(hook, stage, mark), self._name(f"{hook}{stage}")
        self.table.chains[chain] = []
        self._add(base, "", (OfFamily(self.family),), _goto(chain))
        return chain

    def write(self) -> None:
        """Write all that is carried."""
        drops = [j for j in self.judgements if j.refusal.action is Action.DROP]
        answers = [j for j in self.judgements if j.refusal.action is not Action.DROP]
        self._write_first(drops)
        self._write_last(answers)
        targets = self._targets()
        for judgement in self.judgements:
            if self._of("port", judgement.name) in targets:
                self._judge(judgement)

    def _targets(self) -> frozenset[str]:
        """The chains that something leads to."""
        thens = [rule.then for rules in self.table.chains.values() for rule in rules]
        thens += [verdict for each in self.table.maps.values() for _, verdict in each.verdicts]
        return frozenset(then.chain for then in thens if isinstance(then, Verdict))

    def _write_first(self, drops: Sequence[Judgement]) -> None:
        zones = self._zones(Stage.FIRST)
        if drops or zones:
            gate = self._begin(Hook.PREROUTING, Stage.FIRST)
            self._by_port(gate, drops, Port.DIALLED, None)
            if zones:
                here = self._name("here")
                self._spare(gate)
                for match in self._local:
                    self._add(gate, "", (match,), _goto(here))
                self._services(here)
                self._add(here, "", (), _jump(self._name("zones")))
        own = [j for j in self.own if j.refusal.action is Action.DROP]
        if own:
            self._by_port(self._begin(Hook.OUTPUT, Stage.FIRST), own, Port.DIALLED, None)
        if zones:
            # Addresses that no interface holds, and that somebody's DNAT leads to this node or through it.
            self._arriving(self._begin(Hook.INPUT, Stage.FIRST), (), Stage.FIRST)
            self._origin(Stage.FIRST, ())
            self._write_zones(Stage.FIRST)
        dropped = [r for r in self.routed if r.verdict.action is Action.DROP]
        if zones or dropped:
            gate = self._begin(Hook.FORWARD, Stage.FIRST)
            if zones:
                self._add(gate, "", (Flow.DNAT,), _jump(self._name("origin")))
            for routed in dropped:
                self._route(gate, routed)

    def _write_last(self, answers: Sequence[Judgement]) -> None:
        zones = self._zones(Stage.LAST)
        own = [j for j in self.own if j.refusal.action is not Action.DROP]
        rejected = [r for r in self.routed if r.verdict.action is Action.REJECT]
        verdicts = [j.refusal.action for j in answers]
        mark = self.decisions.mark if zones or rejected or Action.REJECT in verdicts else 0
        if answers or zones:
            self._arriving(self._begin(Hook.INPUT, Stage.LAST, mark), answers, Stage.LAST)
            self._origin(Stage.LAST, answers)
        if answers or zones or rejected:
            gate = self._begin(Hook.FORWARD, Stage.LAST, mark)
            elsewhere = [j for j in answers if j.dialled is not Destination.LOCAL]
            if answers or zones:
                self._add(gate, "", (Flow.DNAT,), _jump(self._name("origin-last")))
            if elsewhere:
                ports = self._name("elsewhere-last")
                self._add(gate, "", (), _jump(ports))
                self._add(ports, "", (Flow.DNAT,), _RETURN)
                self._failsafe(ports, Port.DIALLED)
                self._by_port(ports, elsewhere, Port.DIALLED, ())
            for routed in rejected:
                self._route(gate, routed)
        if zones:
            self._write_zones(Stage.LAST)
        if own:
            gate, origin = self._begin(Hook.OUTPUT, Stage.LAST, mark), self._name("own-origin")
            self._add(gate, "", (Flow.DNAT,), _goto(origin))
            self._failsafe(gate, Port.DIALLED)
            self._by_port(gate, own, Port.DIALLED, self._local)
            self._failsafe(origin, Port.ORIGIN)
            self._by_port(origin, own, Port.ORIGIN, self._local_origin())

    def _arriving(self, gate: str, answers: Sequence[Judgement], stage: Stage) -> None:
        """What comes to this node, whatever its address is."""
        self._add(gate, "", (Flow.DNAT,), _goto(self._name(f"origin{stage}")))
        self._failsafe(gate, Port.DIALLED)
        self._by_port(gate, answers, Port.DIALLED, ())
        if self._zones(stage):
            self._services(gate)
            self._add(gate, "", (), _jump(self._name(f"zones{stage}")))

    def _origin(self, stage: Stage, answers: Sequence[Judgement]) -> None:
        chain = self._name(f"origin{stage}")
        self.table.chains[chain] = []
        self._failsafe(chain, Port.ORIGIN)
        self._by_port(chain, answers, Port.ORIGIN, self._local_origin() if answers else ())
        if self._zones(stage):
            self._add(chain, "", (), _jump(self._name(f"zones{stage}-origin")))

    # Where to

    @property
    def _local(self) -> tuple[Match, ...]:
        """What this node answers; IPv6 knows multicast by its addresses, whatever the routes say."""
        groups = (Within(Side.DESTINATION, MULTICAST),) if self.family is Family.IPV6 else ()
        return (Answered(), *groups)

    def _local_origin(self) -> tuple[Match, ...]:
        name = self._name("own")
        networks = frozenset((*own_networks(self.decisions), LOOPBACK[self.family]))
        self.table.sets[name] = AddressSet.of(name, self.family, networks)
        return (Among(Side.ORIGIN, self.family, name),)

    def _services(self, chain: str) -> None:
        """Addresses on kube-ipvs0 are Services, and not this node's."""
        if self.decisions.has_service_addresses:
            source = Source(set_name=kernel_set_name(IPVS_SET, self.family))
            self._add(chain, "", self._address(source, Side.DESTINATION), _RETURN)

    def _address(self, source: Source, side: Side = Side.SOURCE) -> tuple[Match, ...]:
        if source.network is not None:
            return (Within(side, source.network),)
        name = f"set-{source.set_name}"
        self.table.sets[name] = AddressSet.of(name, self.family, self.contents.get(source.set_name, frozenset()))
        return (Among(side, self.family, name),)

    def _failsafe(self, chain: str, which: Port) -> None:
        sources = self.decisions.failsafe_sources
        for service in self.decisions.failsafe:
            for source in sources.items if not sources.any else (None,):
                port = (named_protocol(service.protocol), Ports(which, service.ports))
                self._add(chain, "failsafe", (*port, *(self._address(source) if source else ())), _RETURN)

    def _by_port(self, gate: str, judgements: Sequence[Judgement], which: Port, local: Sequence[Match] | None) -> None:
        """Lead each port to those who judge it; who judges local destinations only asks for one of `local`, if any.

        `local` None: what is judged at all is asked where it would be refused, behind the question for the source.
        """
        for protocol, spans in by_protocol(judgements).items():
            verdicts, groups = [], dict[tuple[str, ...], str]()
            for ports, judging in segments(spans):
                names = tuple(j.name for j in judging)
                if names not in groups:
                    groups[names] = self._judges(f"{gate}-{protocol}-{len(groups) + 1}", judging, which, local)
                verdicts.append((ports, _jump(groups[names])))
            name = f"{gate}-{protocol}"
            self.table.maps[name] = PortMap(name, tuple(verdicts))
            self._add(gate, "", (named_protocol(protocol),), Dispatch(which, name))

    def _judges(self, chain: str, judging: Sequence[Judgement], which: Port, local: Sequence[Match] | None) -> str:
        """The chain that asks all of these, one after the other."""
        if local is None:
            if len(judging) == 1:
                return self._of("port", judging[0].name)
            for j in judging:
                self._add(chain, j.entry, (), _jump(self._of("port", j.name)))
            return chain
        here = [j for j in judging if j.dialled is Destination.LOCAL]
        side = Side.ORIGIN if which is Port.ORIGIN else Side.DESTINATION
        services = which is Port.DIALLED and self.decisions.has_service_addresses
        if judging == here and len(here) == 1 and not local and not services:
            return self._of("port", here[0].name)
        self.table.chains[chain] = []
        for j in judging:
            if j.dialled is Destination.LOCAL:
                continue
            listed = () if isinstance(j.dialled, Destination) else j.dialled
            anywhere = ((),) if j.dialled is Destination.ANY else ()
            for matches in (*anywhere, *((Within(side, network),) for network in listed)):
                self._add(chain, j.entry, matches, _jump(self._of("port", j.name)))
        if not here:
            return chain
        target = chain
        if local:
            target = f"{chain}-here" if services or len(here) > 1 else self._of("port", here[0].name)
            for match in local:
                self._add(chain, here[0].entry if len(here) == 1 else "", (match,), _goto(target))
        if services:
            self._services(target)
        for j in here if target.startswith(chain) else ():
            self._add(target, j.entry, (), _jump(self._of("port", j.name)))
        return chain

    def _judge(self, j: Judgement) -> None:
        judge, refuse = self._of("port", j.name), self._of("refuse-port", j.name)
        for source in j.deny:
            self._add(judge, j.entry, self._address(source), _goto(refuse))
        for source in j.allow:
            self._add(judge, j.entry, self._address(source), _RETURN)
        self._add(judge, j.entry, (), _goto(refuse))
        if j.refusal.action is Action.REDIRECT:
            # What nat has sent to the closed port must get there, to be answered by it.
            closed = Ports(Port.DIALLED, PortRange(j.refusal.redirect_to, j.refusal.redirect_to))
            for protocol in dict.fromkeys(service.protocol for service in j.services):
                arrived = (named_protocol(protocol), closed, Answered(groups=False))
                self._add(refuse, j.entry, arrived, _RETURN)
        if j.refusal.action is Action.DROP:
            self._drop(refuse, j)
        else:
            self._refuse(refuse, j.entry, (), j.refusal)

    def _drop(self, chain: str, j: Judgement) -> None:
        """As it was dialled, wherever it comes from: most packets are allowed, and need not be asked all this."""
        self._spare(chain)
        if j.dialled is Destination.LOCAL:
            self._services(chain)
            meant: tuple[tuple[Match, ...], ...] = tuple((match,) for match in self._local)
        else:
            listed = () if isinstance(j.dialled, Destination) else j.dialled
            meant = ((),) if j.dialled is Destination.ANY else tuple((Within(Side.DESTINATION, n),) for n in listed)
        for matches in meant:
            self._refuse(chain, j.entry, matches, j.refusal)

    def _spare(self, chain: str) -> None:
        """What no first judgement refuses: what the node says to itself, replies, and the way back in."""
        self._add(chain, "", (Loopback(),), _RETURN)
        self._add(chain, "", (Flow.REPLY,), _RETURN)
        self._failsafe(chain, Port.DIALLED)

    def _refuse(self, chain: str, entry: str, matches: Sequence[Match], verdict: Refusal) -> None:
        """What answers has been logged where it should have been answered."""
        if verdict.log_prefix and verdict.action is Action.DROP:
            self._add(chain, entry, matches, Log(verdict.log_prefix))
        self._add(chain, entry, matches, _DROP)

    # Zones

    def _zones(self, stage: Stage) -> frozenset[str]:
        """The names of the zones that refuse at a stage."""
        wanted = Action.DROP if stage is Stage.FIRST else Action.REJECT
        return frozenset(name for name, action in self.refusing_zones.items() if action is wanted)

    def _write_zones(self, stage: Stage) -> None:
        refusing = self._zones(stage)
        for kind, which in (("", Port.DIALLED), ("-origin", Port.ORIGIN)):
            if self._name(f"zones{stage}{kind}") in self._targets():
                self._sort_zones(f"{stage}{kind}", refusing)
                for zone in self.decisions.zones:
                    if zone.name in refusing:
                        self._write_zone(zone, self._of(f"zone{kind}", zone.name), which)
        for zone in self.decisions.zones:
            if zone.name in refusing:
                self._refuse(self._of("refuse-zone", zone.name), zone.entry, (), zone.verdict)

    def _sort_zones(self, suffix: str, refusing: frozenset[str]) -> None:
        sort, icmp, members = (self._name(f"{name}{suffix}") for name in ("zones", "icmp", "members"))
        number = icmp_protocol(self.family)
        self._add(sort, "zones", (number,), _goto(icmp))
        for matches in passing(self.family):
            self._add(sort, "zones", matches, _RETURN)
        self._add(sort, "zones", (), _goto(members))
        for kind in ICMP if self.family is Family.IPV4 else ICMPV6:
            self._add(icmp, "zones", (IcmpType(kind),), _RETURN)
        self._add(icmp, "zones", (), _goto(members))
        origin = "-origin" if suffix.endswith("-origin") else ""
        self.table.chains[members] = []
        for zone, member in zone_members(self.decisions.zones):
            matches = links((member,), outgoing=False)[0] if isinstance(member, str) else self._address(member)
            then = _goto(self._of(f"zone{origin}", zone.name)) if zone.name in refusing else _RETURN
            self._add(members, zone.entry, matches, then)

    def _write_zone(self, zone: ZoneDecision, chain: str, which: Port) -> None:
        spans: dict[str, list[tuple[PortRange, str]]] = {}
        for service in zone.ports:
            spans.setdefault(service.protocol, []).append((service.ports, zone.name))
        for protocol, ranges in spans.items():
            name = f"{chain}-{protocol}"
            self.table.maps[name] = PortMap(name, tuple((ports, _RETURN) for ports, _ in segments(ranges)))
            self._add(chain, zone.entry, (named_protocol(protocol),), Dispatch(which, name))
        for allowed in zone.protocols:
            self._add(chain, zone.entry, (named_protocol(allowed),), _RETURN)
        self._add(chain, zone.entry, (), _goto(self._of("refuse-zone", zone.name)))

    # Routed traffic

    def _route(self, gate: str, r: Routed) -> None:
        chain = self._of("forward", r.name)
        ways = product(
            links(() if r.inside.negated else r.inside.names, outgoing=False) or [()],
            links(() if r.outside.negated else r.outside.names, outgoing=True) or [()],
        )
        for inside, outside in ways:
            self._add(gate, r.entry, (*inside, *outside), _jump(chain))
        self._add(chain, r.entry, (icmp_protocol(self.family), Flow.RELATED), _RETURN)
        for match in self._exclusions(r):
            self._add(chain, r.entry, match, _RETURN)
        for matches in self._conditions(r):
            self._refuse(chain, r.entry, matches, r.verdict)

    def _exclusions(self, r: Routed) -> Iterator[tuple[Match, ...]]:
        for interfaces, outgoing in ((r.inside, False), (r.outside, True)):
            if interfaces.negated:
                yield from links(interfaces.names, outgoing=outgoing)
        for sources, side in ((r.source, Side.SOURCE), (r.destination, Side.DESTINATION)):
            if sources.negated:
                yield from (self._address(source, side) for source in sources.items)

    def _conditions(self, r: Routed) -> Iterator[tuple[Match, ...]]:
        sources = () if r.source.negated else r.source.items
        destinations = () if r.destination.negated else r.destination.items
        protocol = (named_protocol(r.protocol),) if r.protocol else ()
        for source, destination, ports in product(sources or (None,), destinations or (None,), r.ports or (None,)):
            yield (
                *(self._address(source) if source else ()),
                *(self._address(destination, Side.DESTINATION) if destination else ()),
                *protocol,
                *((Ports(Port.DIALLED, ports),) if ports else ()),
            )


def _accepts(raw: RawRule) -> bool:
    """Whether a [[rule]] may let a packet pass before our own chains in mangle judge it."""
    return raw.rule.enforce and raw.rule.table is Table.MANGLE and "ACCEPT" in raw.words
