"""Docker: dockerd 20.10, and Docker 28 as it is played."""

from collections.abc import Iterator

from lab import programs
from lab.layout import Address
from lab.node import BackendName, Node
from lab.rivals import Rival
from neighbours.actions.stage import Action, Neighbour, Stage, did, started

_GUEST = "172.17.0.77"
_CONTAINER = Address("172.17.0.2", "fd00:d0c::242:ac11:2")


def _docker28(backend: BackendName) -> Iterator[Stage]:
    with Node(backend) as node:
        addresses = ["172.17.0.1/16", "fd00:d0c::1/64"], [f"{_CONTAINER.ipv4}/16", f"{_CONTAINER.ipv6}/64"]
        node.attach("web", "docker0", node=addresses[0], host=addresses[1])
        yield Stage(node, started(Rival(node, "docker28")), to=_CONTAINER.ipv4, sink="web")


_DOCKER28 = (Action("start", did("start")), Action("network create", did("network")))


def _dockerd(backend: BackendName) -> Iterator[Stage]:
    with Node(backend, programs=programs.tree()) as node:
        yield published(node, None)


def published(node: Node, firewalld: programs.Firewalld | None) -> Stage:
    """dockerd with a container, and a guest on the same bridge that stays when the container comes and goes."""
    docker = programs.Docker(node)
    docker.start()
    docker.run("web", "-p", "8081:80")
    node.run(
        "ip netns add guest; ip link add guest0 type veth peer name eth0 netns guest;"
        "ip link set guest0 master docker0;"
        "ip link set guest0 up;"
        f"ip -n guest address add {_GUEST}/16 dev eth0; ip -n guest link set eth0 up;"
        "ip -n guest route add default via 172.17.0.1"
    )
    node.namespaces.append("guest")
    return Stage(node, (docker, firewalld) if firewalld else docker, to=_GUEST, sink="guest")


def _docker(stage: Stage) -> programs.Docker:
    found = stage.program[0] if isinstance(stage.program, tuple) else stage.program
    assert isinstance(found, programs.Docker)  # noqa: S101 - the settings above make it
    return found


_STILL = ("/bin/busybox", "sleep", "86400")
CREATE = Action(
    "docker network create",
    lambda stage: _docker(stage)("network", "create", "more"),
    undo=lambda stage: _docker(stage)("network", "rm", "more"),
)
RESTART = Action("dockerd restart", lambda stage: _docker(stage).daemon.restart(), settle=0.4)
_DOCKERD = (
    Action(
        "dockerd start",
        lambda stage: _docker(stage).daemon.start(),
        prepare=lambda stage: _docker(stage).daemon.stop(),
        settle=0.4,
    ),
    RESTART,
    CREATE,
    Action(
        "docker run -p",
        lambda stage: _docker(stage)("run", "-d", "--name", "more", "-p", "8080:80", "still:1", *_STILL),
        undo=lambda stage: _docker(stage)("rm", "-f", "more"),
    ),
    Action(
        "docker rm",
        lambda stage: _docker(stage)("rm", "-f", "more"),
        prepare=lambda stage: _docker(stage)("run", "-d", "--name", "more", "-p", "8080:80", "still:1", *_STILL),
    ),
)

DOCKERD = Neighbour("dockerd 20.10", _dockerd, _DOCKERD)
DOCKER28 = Neighbour("Docker 28", _docker28, _DOCKER28, played=True)
