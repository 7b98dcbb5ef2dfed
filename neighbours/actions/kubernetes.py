"""Programs of a Kubernetes cluster, all of them played: kube-proxy, Felix, kube-router, flannel."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lab.layout import NODE
from lab.node import BackendName, Node
from lab.rivals import Rival
from neighbours.actions.stage import Action, Deed, Neighbour, Stage, clear, did, started, without

_CAPTURES = Path(__file__).resolve().parents[2] / "tests/captures"
_CALICO = "kp126+felix3264-insert-{backend}-3svc"


def _kube_proxy(backend: BackendName) -> Iterator[Stage]:
    with Node(backend) as node:
        yield Stage(node, started(Rival(node, "kube-proxy")), to=NODE.ipv4)


def _flushed_then(word: str) -> Deed:
    def both(stage: Stage) -> None:
        clear(stage)
        stage.program.do(word)

    return both


_KUBE_PROXY = (
    Action("start", did("start"), prepare=without("KUBE-")),
    Action("sync of all Services", did("sync")),
    # Where our chains are back before the person's `-X`, this fails, the canary lives, and nothing is missed.
    Action("flush by a person, canaries missed", _flushed_then("tick"), undo=did("start")),
)


@contextmanager
def calico(backend: BackendName) -> Iterator[Node]:
    """A node as kube-proxy and Felix left it, two workloads on it."""
    with Node(backend, pod_links=("caliabc00000000", "caliabc00001eef")) as node:
        node.load(_CAPTURES / _CALICO)
        yield node


def felix(node: Node, mode: str, clock: float = 1.0) -> Rival:
    """Felix on such a node, by a clock of its own; `mode` is its ChainInsertMode."""
    capture = str(_CAPTURES / _CALICO.format(backend=node.backend))
    return Rival(node, "felix", clock=clock, mode=mode, capture=capture)


def _felix(mode: str) -> Callable[[BackendName], Iterator[Stage]]:
    def setting(backend: BackendName) -> Iterator[Stage]:
        with calico(backend) as node:
            yield Stage(node, started(felix(node, mode)))

    return setting


_FELIX = (
    Action("start", did("refresh"), prepare=without("cali:")),
    Action("refresh, nothing foreign moved", did("refresh")),
    Action(
        "refresh after foreign rules at both ends",
        did("refresh"),
        prepare=lambda stage: stage.tools("-I FORWARD -p tcp --dport 9 -j DROP", "-A FORWARD -p tcp --dport 9 -j DROP"),
        undo=lambda stage: stage.tools(*["-D FORWARD -p tcp --dport 9 -j DROP"] * 2),
    ),
)


def _kube_router(backend: BackendName) -> Iterator[Stage]:
    with Node(backend) as node:
        yield Stage(node, started(Rival(node, "kube-router")))


_KUBE_ROUTER = (
    Action("start", did("sync"), prepare=without("kube-router")),
    Action("sync: save, edit, restore", did("sync")),
)


def _flannel(backend: BackendName) -> Iterator[Stage]:
    with Node(backend) as node:
        yield Stage(node, started(Rival(node, "flannel")))


_FLANNEL = (Action("rules appended again", did("tick"), prepare=without("FLANNEL")),)

KUBE_PROXY = Neighbour("kube-proxy 1.26", _kube_proxy, _KUBE_PROXY, played=True)
FELIX = tuple(Neighbour(f"Felix 3.26, {mode}", _felix(mode), _FELIX, played=True) for mode in ("Insert", "Append"))
KUBE_ROUTER = Neighbour("kube-router", _kube_router, _KUBE_ROUTER, played=True)
FLANNEL = Neighbour("flannel", _flannel, _FLANNEL, played=True)
