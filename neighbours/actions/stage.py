"""What a program's setting and its actions are; and the flow that passes every one of these nodes.

Laws: a program is on its node, started, and lets a flow of UDP pass through FORWARD, before anything is done; `act`
returns when the program says that it is done; `prepare` and `undo` bring about the state from which it can be done
(again). What can be run is the real program (`lab.programs`), the others are played (`lab.rivals`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lab.layout import NODE, POD1, STRANGER
from lab.node import BackendName, Node
from lab.rivals import PORTS, Rival
from lab.saved import TABLES

SOURCE_PORT = 40001
_ANSWERED = "-u SEEN_REPLY,ASSURED -t 600"


@dataclass
class Stage:
    """A node on which a program is at work; the flow goes from STRANGER to `to`, PORTS, and arrives in `sink`."""

    node: Node
    program: Any = None
    to: str = POD1.ipv4
    sink: str = "pod1"

    @property
    def translated(self) -> bool:
        """Whether nat leads the flow to its sink. Then each packet must be a connection of its own."""
        return self.to == NODE.ipv4

    def establish(self) -> None:
        """Have the flow known to conntrack as one that was answered: what most programs accept above all else.

        So is what goes to the node itself, on the first of the ports.
        """
        if self.translated:
            return
        commands = []
        for address, port in ((NODE.ipv4, PORTS[0]), *((self.to, port) for port in PORTS)):
            ends = f"-s {STRANGER.ipv4} -d {address} -p udp --sport {SOURCE_PORT} --dport {port}"
            commands.append(f"conntrack -I {ends} {_ANSWERED} 2>&- || conntrack -U {ends} {_ANSWERED}")
        self.node.run("\n".join(commands), check=False)

    def forgetful(self) -> None:
        """Have a connection that does not pass forgotten before a flood comes to its port again."""
        self.node.sysctl("net.netfilter.nf_conntrack_udp_timeout", "2")

    def tools(self, *arguments: str) -> None:
        """iptables and ip6tables with these arguments, whatever they say."""
        for argument in arguments:
            self.node.run(f"iptables -w {argument}; ip6tables -w {argument}", check=False)


Deed = Callable[[Stage], object]


@dataclass(frozen=True, slots=True)
class Action:
    """Something that a program does. `settle` is how many seconds it may go on behind the scenes."""

    name: str
    act: Deed
    prepare: Deed | None = None
    undo: Deed | None = None
    settle: float = 0.2
    only: BackendName | None = None


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A program (`played` by us or real), how it comes onto a node, and what it does there."""

    name: str
    setting: Callable[[BackendName], Iterator[Stage]]
    actions: Sequence[Action]
    played: bool = False

    @contextmanager
    def stage(self, backend: BackendName) -> Iterator[Stage]:
        """A node with the program at work; all of it is gone afterwards."""
        yield from self.setting(backend)

    def does(self, backend: BackendName) -> list[Action]:
        """What it does where iptables is of that backend."""
        return [action for action in self.actions if action.only in (None, backend)]


def without(pattern: str) -> Deed:
    """Its jumps in filter FORWARD are gone, as on a node on which it was not yet."""

    def gone(stage: Stage) -> None:
        for tool in ("iptables", "ip6tables"):
            rules = f"{tool} -w -S FORWARD | grep -E -- '{pattern}' | sed 's/^-A/-D/'"
            stage.node.run(f"{rules} | while read -r rule; do eval {tool} -w $rule; done", check=False)

    return gone


def clear(stage: Stage) -> None:
    """Every table flushed, and every chain of somebody's deleted."""
    stage.tools(*(f"-t {table} {what}" for table in TABLES for what in ("-F", "-X")))


def started(rival: Rival) -> Rival:
    """A player that has done what it does at its start."""
    rival.do("start")
    return rival


def did(*words: str) -> Deed:
    """What a player does when it is told so."""
    return lambda stage: stage.program.do(*words)
