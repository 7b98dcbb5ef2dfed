"""What a valid configuration is: frozen values, valid from birth, each knowing the file and line it came from.

The loader (`nodewalld.configuration`) is the only maker of these; the meaning of each key is told in
`nodewalld.toml(5)` and in `docs/`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from nodewalld.core.words import Backend, Family, Network, Table


@dataclass(frozen=True, slots=True)
class Where:
    """A place in a configuration file; lines count from 1, `rank` counts the files in the order they are read."""

    file: str
    line: int
    rank: int = 0


@dataclass(frozen=True, slots=True)
class SetRef:
    """A `[set.NAME]`, written `@NAME`."""

    name: str


Peer = Network | SetRef
"""One element of an address list. "any" is loaded as the two networks 0.0.0.0/0 and ::/0."""


@dataclass(frozen=True, slots=True)
class Selector:
    """Addresses that a packet must (or, negated, must not) come from or go to. No peers: any address."""

    peers: tuple[Peer, ...] = ()
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Interfaces:
    """Interfaces that a packet must (or, negated, must not) pass. Names may end in "+"; no names: any."""

    names: tuple[str, ...] = ()
    negated: bool = False


DEFAULT_ROUTE = "@default-route"
"""Stands in `Interfaces.names` for every interface that has a default route."""


@dataclass(frozen=True, slots=True, order=True)
class PortRange:
    """Ports `first` to `last`, both included."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class ProtocolPorts:
    """Ports of one transport protocol, as `22/tcp` says."""

    protocol: str
    ports: PortRange


class AnchorKind(StrEnum):
    """What of a rule an anchor looks at."""

    TARGET = "target"
    RULE = "rule"
    COMMENT = "comment"


@dataclass(frozen=True, slots=True)
class Anchor:
    """A foreign rule that a position refers to.

    TARGET: glob over its chain or target. RULE: the whole rule in canonical form, comments and counters aside.
    COMMENT: glob over one of its comments.
    """

    kind: AnchorKind
    pattern: str


class Place(StrEnum):
    """The kind of a position; BETWEEN is `{ after = [...], before = [...] }`."""

    FIRST = "first"
    EARLY = "early"
    BETWEEN = "between"
    LAST = "last"


@dataclass(frozen=True, slots=True)
class Position:
    """Where among the foreign rules of its chain a rule must stand: a constraint, not a number."""

    place: Place = Place.EARLY
    after: tuple[Anchor, ...] = ()
    before: tuple[Anchor, ...] = ()


class Destination(StrEnum):
    """The two destinations of a `[[port]]` that have a name."""

    LOCAL = "local"
    ANY = "any"


class Action(StrEnum):
    """What happens to a packet that an entry decides."""

    ACCEPT = "accept"
    DROP = "drop"
    REJECT = "reject"
    REDIRECT = "redirect"


NOWHERE = Where("", 0)
"""The place of a table that was left out."""


class ShieldMode(StrEnum):
    """Whether the refusals stand in a table of our own as well."""

    AUTO = "auto"
    OFF = "off"
    REQUIRE = "require"


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """`[daemon]`. `backend` None means auto; `resync` is in seconds; `mark` is one bit."""

    backend: Backend | None = None
    families: tuple[Family, ...] = (Family.IPV4, Family.IPV6)
    resync: float = 30.0
    yield_to: tuple[str, ...] = ("cali-*", "KUBE-ROUTER-*", "AZURE-NPM*")
    mark: int = 0x1000
    metrics: str = ""
    shield: ShieldMode = ShieldMode.AUTO
    where: Where = field(default=NOWHERE, compare=False)


@dataclass(frozen=True, slots=True)
class Failsafe:
    """`[failsafe]`: ports that no `[[port]]` or zone can shut, for these sources."""

    ports: tuple[ProtocolPorts, ...] = (ProtocolPorts("tcp", PortRange(22, 22)),)
    sources: Selector = Selector()
    where: Where = field(default=NOWHERE, compare=False)


@dataclass(frozen=True, slots=True)
class SetFile:
    """A file of a set, and what it held when it was read."""

    path: str
    networks: tuple[Network, ...]


@dataclass(frozen=True, slots=True)
class SetEntry:
    """`[set.NAME]`, in both families: its `entries` with their places, its files, and what was `added` at run time."""

    name: str
    entries: tuple[tuple[Network, Where], ...]
    files: tuple[SetFile, ...]
    where: Where
    added: tuple[Network, ...] = ()

    def members(self) -> Iterator[Network]:
        """All that it holds; what comes from several places comes several times."""
        yield from (network for network, _ in self.entries)
        yield from (network for file in self.files for network in file.networks)
        yield from self.added

    @property
    def networks(self) -> tuple[Network, ...]:
        """All that it holds, each once."""
        return tuple(dict.fromkeys(self.members()))


@dataclass(frozen=True, slots=True)
class PortEntry:
    """`[[port]]`: who may reach these ports of this node, judged as the client dialled them.

    `destination` is a `Destination` or the addresses dialled; `redirect_to` is the closed port of action redirect.
    """

    name: str
    ports: tuple[PortRange, ...]
    protocols: tuple[str, ...]
    allow: tuple[Peer, ...]
    deny: tuple[Peer, ...]
    action: Action
    redirect_to: int
    from_node: bool
    destination: Destination | tuple[Network, ...]
    log: bool
    enforce: bool
    where: Where


@dataclass(frozen=True, slots=True)
class ForwardEntry:
    """`[[forward]]`: routed traffic. `protocol` "" is any; `position` None leaves the place to the compiler."""

    name: str
    inside: Interfaces
    outside: Interfaces
    source: Selector
    destination: Selector
    protocol: str
    ports: tuple[PortRange, ...]
    action: Action
    position: Position | None
    log: bool
    enforce: bool
    where: Where


@dataclass(frozen=True, slots=True)
class Service:
    """What a service name stands for: ports, and IP protocols as iptables takes them after -p."""

    ports: tuple[ProtocolPorts, ...] = ()
    protocols: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ZoneEntry:
    """`[zone.NAME]`: `ports` and `protocols` are all that it allows, services and included zones written out."""

    name: str
    sources: tuple[Peer, ...]
    interfaces: tuple[str, ...]
    ports: tuple[ProtocolPorts, ...]
    protocols: tuple[str, ...]
    target: Action
    log: bool
    enforce: bool
    where: Where


@dataclass(frozen=True, slots=True)
class RuleEntry:
    """`[[rule]]`: one rule as iptables takes it after `-A CHAIN`; `families` are those it can be written in."""

    name: str
    table: Table
    chain: str
    text: str
    families: tuple[Family, ...]
    position: Position
    enforce: bool
    where: Where


@dataclass(frozen=True, slots=True)
class JumpEntry:
    """`[[jump]]`: a foreign chain that must be reached from another, exactly once."""

    name: str
    table: Table
    from_chain: str
    to_chain: str
    families: tuple[Family, ...]
    position: Position
    where: Where


@dataclass(frozen=True, slots=True)
class Sources:
    """The very texts that a configuration was made of: its TOML files in their order, and its set files."""

    directory: str = ""
    texts: Mapping[str, str] = field(default_factory=dict)
    sets: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Config:
    """Everything of one configuration folder. Two are equal when they mean the same, whatever they were read from."""

    path: str
    daemon: DaemonConfig = DaemonConfig()
    failsafe: Failsafe = Failsafe()
    sets: tuple[SetEntry, ...] = ()
    ports: tuple[PortEntry, ...] = ()
    forwards: tuple[ForwardEntry, ...] = ()
    rules: tuple[RuleEntry, ...] = ()
    jumps: tuple[JumpEntry, ...] = ()
    zones: tuple[ZoneEntry, ...] = ()
    warnings: tuple["Problem", ...] = ()
    sources: Sources = field(default=Sources(), compare=False)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong in the configuration: whose line, which key, what, and what would be right.

    `code` names its kind for good, as docs/lints.md tells it; what is simply an error has none.
    """

    where: Where
    key: str
    message: str
    cure: str = ""
    code: str = ""

    def __str__(self) -> str:
        text = f"{self.where.file}:{self.where.line}: {self.key}: {self.message}"
        return text + (f" ({self.cure})" if self.cure else "") + (f" [{self.code}]" if self.code else "")
