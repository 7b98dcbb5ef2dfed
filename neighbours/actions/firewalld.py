"""firewalld alone, with either of its backends, and with dockerd on the same bus."""

from collections.abc import Callable, Iterator

from lab import programs
from lab.node import BackendName, Node
from neighbours.actions.docker import CREATE, RESTART, published
from neighbours.actions.stage import Action, Neighbour, Stage


def _firewalld(kind: str) -> Callable[[BackendName], Iterator[Stage]]:
    def setting(backend: BackendName) -> Iterator[Stage]:
        with Node(backend, programs=programs.tree()) as node:
            firewalld = programs.Firewalld(node, kind)
            firewalld.start()
            yield Stage(node, firewalld)

    return setting


def _both(backend: BackendName) -> Iterator[Stage]:
    with Node(backend, programs=programs.tree()) as node:
        firewalld = programs.Firewalld(node, "iptables")
        firewalld.start()
        yield published(node, firewalld)


_DIRECT = ("ipv4", "filter", "FORWARD", "0", "-p", "tcp", "--dport", "9", "-j", "DROP")
_FIREWALLD = (
    Action("start", lambda stage: stage.program.daemon.start(), prepare=lambda stage: stage.program.daemon.stop()),
    Action("reload", lambda stage: stage.program("--reload")),
    Action("complete reload", lambda stage: stage.program("--complete-reload")),
    Action("restart", lambda stage: stage.program.daemon.restart()),
    Action("stop", lambda stage: stage.program.daemon.stop(), undo=lambda stage: stage.program.daemon.start()),
    Action(
        "first direct rule",
        lambda stage: stage.program("--direct", "--add-rule", *_DIRECT),
        prepare=lambda stage: stage.program("--reload", check=False),
    ),
)
_BOTH = (
    Action("firewalld reload", lambda stage: stage.program[1]("--reload"), settle=1.5),
    Action("firewalld restart", lambda stage: stage.program[1].daemon.restart(), settle=1.5),
    RESTART,
    CREATE,
)

FIREWALLD = tuple(
    Neighbour(f"firewalld 1.3, FirewallBackend={kind}", _firewalld(kind), _FIREWALLD)
    for kind in ("iptables", "nftables")
)
BOTH = Neighbour("dockerd 20.10 and firewalld 1.3 (iptables)", _both, _BOTH)
