"""Which packets to follow, as it is asked for and as iptables is told.

Law: what is followed is little: `RATE` packets a second at most, so that a busy port harms nobody, and until an end
that stands in the rule itself where a rule is needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from nodewalld.core.ruletext import tag_words
from nodewalld.core.words import Family, Network

RATE = 20
"""Packets a second that are followed at most, and how many may come at once."""

TAG = "trace/"
"""How our word in the comment of a trace's rule begins; the rest is for whoever finds one that was left."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Packets of one of PROTOCOLS, narrowed down by what is given; `ports` are destination ports, both included.

    `from_node` means what this node sends itself, else what comes in.
    """

    protocol: str
    ports: tuple[int, int] | None = None
    source: Network | None = None
    destination: Network | None = None
    interface: str = ""
    from_node: bool = False

    @property
    def hook(self) -> str:
        """Where such packets are first seen, in iptables' words."""
        return "OUTPUT" if self.from_node else "PREROUTING"

    @property
    def families(self) -> tuple[Family, ...]:
        """The families that such packets can have."""
        versions = {network.version for network in (self.source, self.destination) if network}
        return tuple(family for family in Family if versions <= {family.version})

    def rule(self, family: Family, word: str, until: datetime) -> list[str]:
        """The rule that has such packets traced, without its chain; `word` is the rest of its tag.

        `until` is in UTC; from then on the rule does nothing, whether somebody takes it out or not.
        """
        protocol = "ipv6-icmp" if self.protocol == "icmp" and family is Family.IPV6 else self.protocol
        ends = (("-s", self.source), ("-d", self.destination), ("-i", self.interface))
        words = [word for option, value in ends if value for word in (option, str(value))]
        words += ["-p", protocol]
        if self.ports:
            words += ["-m", self.protocol, "--dport", ":".join(map(str, dict.fromkeys(self.ports)))]
        words += ["-m", "time", "--datestop", f"{until:%Y-%m-%dT%H:%M:%S}"]
        words += ["-m", "limit", "--limit", f"{RATE}/second", "--limit-burst", str(RATE)]
        return [*words, *tag_words(f"{TAG}{word}"), "-j", "TRACE"]


def left_by(tag: str) -> tuple[int, str] | None:
    """What a trace's tag says: the netlink port that is open while somebody follows, and the logger as it was before.

    None for another tag.
    """
    parts: Sequence[str] = tag.removeprefix(TAG).split("/")
    if not tag.startswith(TAG) or len(parts) != 2 or not parts[0].isascii() or not parts[0].isdigit():
        return None
    return int(parts[0]), parts[1]


def word_of(port: int, logger: str) -> str:
    """The rest of the tag that `left_by` reads."""
    return f"{port}/{logger}"
