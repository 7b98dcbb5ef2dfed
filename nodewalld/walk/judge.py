"""One packet from where it comes in to where it ends, through every hook that the kernel would ask.

Laws: the order is the kernel's: hooks, priorities, routing between them. What can't be known forks the way or leaves a
doubt; nothing is guessed. A packet of a flow that exists is led by nat as that flow's first packet would be today.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from nodewalld.core.words import Backend, Family, Table
from nodewalld.walk.hooks import FORWARD, INPUT, OUTPUT, POSTROUTING, PREROUTING, stations
from nodewalld.walk.packet import Packet, State, Tracked, begin, endpoint, spell
from nodewalld.walk.routes import FOR_THE_NODE, REFUSED, Kind, Route, Unclear
from nodewalld.walk.table import Supposed, Walker, Way
from nodewalld.walk.targets import Fate
from nodewalld.walk.verdict import End, Outcome, Path, Step, Verdict
from nodewalld.walk.world import BaseChain, Unread, World, is_link_local, is_loopback, is_multicast

ROUTING = "routing"
_MANY = 64  # ways; from here on what was supposed is forgotten, so that more of them meet
_STRICT = 1  # rp_filter
_ENDS = {Fate.DROP: Outcome.DROPPED, Fate.REJECT: Outcome.REJECTED, Fate.UNKNOWN: Outcome.UNKNOWN}


def judge(packet: Packet, world: World) -> Verdict:
    """Walk a packet through a world. Never fails: what can't be told is part of the answer."""
    return next(judge_each((packet,), world))


def judge_each(packets: Iterable[Packet], world: World) -> Iterator[Verdict]:
    """Walk many packets, each for itself; the rules that they meet are taken apart once."""
    walker = Walker(world)
    for each in packets:
        packet = each
        if packet.from_node and not packet.source:
            packet = replace(packet, source=_chosen_source(packet, world))
        journey = _Journey(packet, world, walker)
        paths = journey.sent() if packet.from_node else journey.received()
        yield Verdict(packet, tuple(paths))


def _chosen_source(packet: Packet, world: World) -> int:
    """The address that the kernel gives a program's packet."""
    try:
        found = world.routes.lookup(packet.destination, mark=packet.mark, outside=packet.outside)
    except Unclear:
        return 0
    if not found:
        return 0
    if found[0].kind is Kind.LOCAL:
        return packet.destination
    return found[0].source or world.address_of(found[0].device)


@dataclass
class _Journey:
    packet: Packet
    world: World
    walker: Walker

    def received(self) -> list[Path]:
        """By an interface."""
        paths = self._hook([Path(begin(self.packet))], PREROUTING)
        return self._onward(paths)

    def sent(self) -> list[Path]:
        """By a program of this node."""
        paths: list[Path] = list(self._routed_out(Path(begin(self.packet)), "a program of this node sends it"))
        paths = _each(self._hook(paths, OUTPUT), self._rerouted)
        gone: list[Path] = []
        back: list[Path] = []
        for path in self._hook(paths, POSTROUTING):
            if path.end:
                gone.append(path)
            elif path.state.outside == "lo":
                # Over lo it comes in again, with its mark and its flow.
                back.append(replace(path, state=replace(path.state, inside="lo", outside="")))
            else:
                gone.append(_sent(path))
        return [*gone, *self._onward(self._hook(back, PREROUTING))]

    def _onward(self, paths: Iterable[Path]) -> list[Path]:
        """From the routing of what came in to its end."""
        ended: list[Path] = []
        here: list[Path] = []
        through: list[Path] = []
        for path in _each(paths, self._routed_in):
            (ended if path.end else through if path.state.outside else here).append(path)
        delivered = (_delivered(path) if not path.end else path for path in self._hook(here, INPUT))
        routed = self._hook(self._hook(through, FORWARD), POSTROUTING)
        forwarded = (_forwarded(path) if not path.end else path for path in routed)
        return [*delivered, *forwarded, *ended]

    # --- hooks

    def _hook(self, paths: Iterable[Path], hook: str) -> list[Path]:
        current = list(paths)
        others = sorted((o for o in self.world.others if o.hook == hook), key=lambda other: other.priority)
        for station in stations(hook):
            while others and others[0].priority < station.priority:
                current = self._other(current, others.pop(0))
            if station.table is None:
                current = _each(current, self._tracked)
            else:
                current = _merged(_each(current, partial(self._table, hook=hook, table=station.table)))
        for other in others:
            current = self._other(current, other)
        return [path if path.end else replace(path, state=_fixed(path.state, hook)) for path in current]

    def _other(self, paths: Iterable[Path], other: Unread | BaseChain) -> list[Path]:
        """A base chain that isn't iptables', or something that can't be read."""
        if isinstance(other, BaseChain):
            return _merged(_each(paths, partial(self._through_base, other=other)))

        def concerned(path: Path) -> bool:
            return not path.end and other.interface in {"", path.state.inside, path.state.outside}

        return [replace(path, doubts=(*path.doubts, other.place)) if concerned(path) else path for path in paths]

    def _through_base(self, path: Path, other: BaseChain) -> Iterator[Path]:
        state = path.state
        if other.nat:
            if not _nat_asked(state, other.hook):
                yield path
                return
            state = replace(state, tracked=Tracked.NEW)
        binds = other.hook in {PREROUTING, OUTPUT}
        for way in self.walker.through(state, other.chains, other.base, binds_destination=binds):
            after = replace(way.state, tracked=path.state.tracked) if other.nat else way.state
            steps = path.steps
            if way.hits or way.fate is not Fate.ACCEPT:
                steps = (*steps, Step(other.hook, after, hits=way.hits, place=other.place))
            end = None
            if way.fate is not Fate.ACCEPT:
                text = way.why or ("" if way.rule else "its policy")
                end = End(_ENDS[way.fate], text, other.hook, rule=way.rule, place=other.place)
            yield replace(path, state=after, steps=steps, supposed=(*path.supposed, *way.supposed), end=end)

    def _tracked(self, path: Path) -> Iterator[Path]:
        """Conntrack looks once; over lo it has seen the packet already."""
        if path.state.tracked is not None:
            yield path
            return
        yield replace(path, state=replace(path.state, tracked=self.packet.seen_by_conntrack()))

    def _table(self, path: Path, hook: str, table: Table) -> Iterator[Path]:
        backends = [backend for backend in Backend if self._concerns(backend, table, hook)]
        if table is Table.NAT and not _nat_asked(path.state, hook):
            yield path
            return
        paths = self._through(path, hook, table, backends)
        if len(backends) == 2:
            paths = self._either_order(path, paths, self._through(path, hook, table, backends[::-1]), backends)
        yield from paths

    def _concerns(self, backend: Backend, table: Table, hook: str) -> bool:
        rules = self.world.rules.get(backend)
        chain = rules.chain(table, hook) if rules else None
        return chain is not None and (bool(chain.texts) or chain.policy != "ACCEPT")

    def _through(self, path: Path, hook: str, table: Table, backends: Iterable[Backend]) -> list[Path]:
        paths = [path]
        for backend in backends:
            paths = _each(paths, partial(self._walk, hook=hook, table=table, backend=backend))
        return paths

    @staticmethod
    def _either_order(path: Path, one: list[Path], other: list[Path], backends: list[Backend]) -> list[Path]:
        """Which backend comes first is a matter of which was there first; where it matters, both are possible."""
        if _ends(one) == _ends(other):
            return one
        both = ((one, backends[0]), (other, backends[1]))
        return [
            replace(each, supposed=(*path.supposed, Supposed(None, f"the kernel asks {first} first", holds=True)))
            for paths, first in both
            for each in paths
        ]

    def _walk(self, path: Path, hook: str, table: Table, backend: Backend) -> Iterator[Path]:
        state = path.state
        if table is Table.NAT:
            if _bound(state, hook):
                yield path
                return
            state = replace(state, tracked=Tracked.NEW)
        for way in self.walker.walk(state, backend, table, hook):
            after = replace(way.state, tracked=path.state.tracked) if table is Table.NAT else way.state
            step = Step(hook, after, backend, table, way.hits)
            steps = (*path.steps, step) if way.hits or way.fate is not Fate.ACCEPT else path.steps
            supposed = (*path.supposed, *way.supposed)
            yield replace(path, state=after, steps=steps, supposed=supposed, end=_end(way, hook, table, backend))

    # --- routing

    def _routed_in(self, path: Path) -> Iterator[Path]:
        state, family = path.state, self.world.family
        refusal = self._martian(state)
        if refusal:
            yield _stopped(path, refusal)
            return
        if is_multicast(state.destination, family):
            yield self._to_group(path)
            return
        try:
            routes = self.world.routes.lookup(
                state.destination, source=state.source, mark=state.mark, inside=state.inside
            )
        except Unclear as error:
            yield replace(path, end=End(Outcome.UNKNOWN, f"where it goes depends on {error}", ROUTING))
            return
        to = spell(state.destination, family)
        if not routes:
            yield _stopped(path, f"there is no route to {to}", rejected=self._forwards(state.inside))
        for route in routes:
            yield self._by_route(_supposing(path, route, routes), route, to)

    def _by_route(self, path: Path, route: Route, to: str) -> Path:
        if route.kind in FOR_THE_NODE:
            return _told(path, f"{to} is this node's own", outside="")
        if route.kind in REFUSED:
            return _stopped(path, f"the route to {to} is {route.kind}", rejected=route.kind is not Kind.BLACKHOLE)
        if self.world.is_shared(self.packet.destination):
            # Its frame was everybody's, whatever a DNAT made of the packet (pkt_type in ip_forward, ip6_forward).
            return _stopped(path, "what came as a broadcast or multicast is not forwarded")
        if not self._forwards(path.state.inside):
            return _stopped(
                path, f"{to} is elsewhere, and this node does not forward what comes by {path.state.inside}"
            )
        if self.world.family is Family.IPV6 and is_link_local(path.state.source, self.world.family):
            return _stopped(path, "a link-local source is not forwarded", rejected=True)
        return _told(path, f"{to} is reached by {route.device}", outside=route.device)

    def _to_group(self, path: Path) -> Path:
        """A group is taken where it has been joined (ip_check_mc_rcu, ipv6_chk_mcast_addr)."""
        state, groups = path.state, self.world.groups
        name = spell(state.destination, self.world.family)
        if groups is None:
            return _told(
                replace(path, doubts=(*path.doubts, f"whether {name} is joined")), f"{name} is a group", outside=""
            )
        if state.inside == "lo" or state.destination in groups.get(state.inside, ()):
            return _told(path, f"{name} is joined on {state.inside}", outside="")
        return _stopped(path, f"nobody has joined {name} on {state.inside}")

    def _forwards(self, interface: str) -> bool:
        switches = self.world.forwarding
        return switches.get(interface, switches.get("", False))

    def _martian(self, state: State) -> str:
        """Why the kernel takes no packet with such addresses (net/ipv4/route.c, fib_frontend.c); "" if it does."""
        family, inside = self.world.family, state.inside
        if inside == "lo":
            return ""
        source = spell(state.source, family)
        for address in (state.source, state.destination):
            if is_loopback(address, family) and inside not in self.world.localnet:
                return f"{spell(address, family)} can't come by {inside}: it is loopback"
        if family is Family.IPV6 or (state.source == 0 and is_multicast(state.destination, family)):
            return ""
        if self.world.kind_of(state.source) is Kind.LOCAL:
            return f"{source} can't come by {inside}: it is this node's own"
        mode = self.world.reverse_path.get(inside, self.world.reverse_path.get("", 0))
        if mode:
            try:
                if not self.world.reverse_path_holds(state, loose=mode != _STRICT):
                    return f"the way back to {source} is not by {inside} (rp_filter = {mode})"
            except Unclear:
                return ""
        return ""

    def _routed_out(self, path: Path, why: str) -> Iterator[Path]:
        state = path.state
        to = spell(state.destination, self.world.family)
        try:
            routes = self.world.routes.lookup(
                state.destination, source=state.source, mark=state.mark, outside=self.packet.outside
            )
        except Unclear as error:
            yield replace(path, end=End(Outcome.UNKNOWN, f"where it goes depends on {error}", ROUTING))
            return
        if not routes or routes[0].kind in REFUSED:
            yield _stopped(path, f"there is no route to {to}", rejected=True)
            return
        for route in routes:
            device = "lo" if route.kind in {Kind.LOCAL, Kind.ANYCAST} else route.device
            if self._leaks_loopback(state, device):
                yield _stopped(
                    path, f"{spell(state.source, self.world.family)} can't leave by {device}: it is loopback"
                )
                continue
            text = f"{why}; {to} is reached by {device}"
            yield _told(_supposing(path, route, routes), text, outside=device)

    def _leaks_loopback(self, state: State, device: str) -> bool:
        loopback = self.world.family is Family.IPV4 and is_loopback(state.source, self.world.family)
        return loopback and device != "lo" and device not in self.world.localnet

    def _rerouted(self, path: Path) -> Iterator[Path]:
        """Rules in OUTPUT that change what the way depends on send the packet on another (ip_route_me_harder)."""
        state = path.state
        if state.destination == self.packet.destination and state.mark == self.packet.mark:
            yield path
            return
        yield from self._routed_out(path, "it is routed anew")


def _each(paths: Iterable[Path], step: Callable[[Path], Iterable[Path]]) -> list[Path]:
    """Every way a step further; one that has ended stays."""
    return [after for path in paths for after in ([path] if path.end else step(path))]


def _ends(paths: Iterable[Path]) -> set[tuple[State, Outcome | None]]:
    """What a set of ways comes to; whose rule it was doesn't matter."""
    return {(path.state, path.end.outcome if path.end else None) for path in paths}


def _merged(paths: list[Path]) -> list[Path]:
    """Ways that come to the same packet go on as one."""
    if len(paths) > _MANY:
        paths = [replace(each, state=replace(each.state, assumed=frozenset())) for each in paths]
    found: dict[object, Path] = {}
    for path in paths:
        key = (path.state, path.end, path.doubts)
        known = found.get(key)
        found[key] = path if known is None else replace(known, alike=known.alike + 1 + path.alike)
    return list(found.values())


def _nat_asked(state: State, hook: str) -> bool:
    return state.tracked in {Tracked.NEW, Tracked.ESTABLISHED} and not _bound(state, hook)


def _bound(state: State, hook: str) -> bool:
    return state.bound_destination if hook in {PREROUTING, OUTPUT} else state.bound_source


def _fixed(state: State, hook: str) -> State:
    """A flow is bound once, also when no rule has bound it; FORWARD has no nat."""
    if hook == FORWARD:
        return state
    if hook in {PREROUTING, OUTPUT}:
        return replace(state, bound_destination=True)
    return replace(state, bound_source=True)


def _end(way: Way, hook: str, table: Table, backend: Backend) -> End | None:
    if way.fate is Fate.ACCEPT:
        return None
    text = way.why or (f"the policy of {table} {hook}" if way.rule is None else "")
    return End(_ENDS[way.fate], text, hook, backend, table, way.rule)


def _supposing(path: Path, route: Route, routes: tuple[Route, ...]) -> Path:
    if len(routes) == 1:
        return path
    return replace(path, supposed=(*path.supposed, Supposed(None, f"the route by {route.device} is taken", holds=True)))


def _told(path: Path, text: str, *, outside: str) -> Path:
    state = replace(path.state, outside=outside)
    return replace(path, state=state, steps=(*path.steps, Step(ROUTING, state, text=text)))


def _stopped(path: Path, text: str, *, rejected: bool = False) -> Path:
    return replace(path, end=End(Outcome.REJECTED if rejected else Outcome.DROPPED, text, ROUTING))


def _delivered(path: Path) -> Path:
    return replace(path, end=End(Outcome.DELIVERED, f"to {_where(path.state)} on this node"))


def _forwarded(path: Path) -> Path:
    return replace(path, end=End(Outcome.FORWARDED, f"to {_where(path.state)} by {path.state.outside}"))


def _sent(path: Path) -> Path:
    return replace(path, end=End(Outcome.SENT, f"to {_where(path.state)} by {path.state.outside}"))


def _where(state: State) -> str:
    ports = state.destination_ports
    return endpoint(state.destination, ports, state.family, with_ports=ports != (0, 0))
