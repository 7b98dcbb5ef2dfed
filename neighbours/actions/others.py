"""CNI plugins, ufw, fail2ban and podman."""

from collections.abc import Callable, Iterator

from lab import programs
from lab.node import BackendName, Node
from lab.rivals import PORTS
from neighbours.actions.stage import Action, Neighbour, Stage, without


def _cni(backend: BackendName) -> Iterator[Stage]:
    with Node(backend, programs=programs.tree()) as node:
        cni = programs.Cni(node)
        cni.add("one", *PORTS)
        yield Stage(node, cni, to="10.88.0.2", sink="one")


_CNI = (
    Action(
        "ADD, the first one",
        lambda stage: stage.program.add("two", 8080),
        prepare=without("CNI"),
        undo=lambda stage: stage.program.delete("two", 8080),
    ),
    Action(
        "ADD",
        lambda stage: stage.program.add("two", 8080),
        undo=lambda stage: stage.program.delete("two", 8080),
    ),
    Action(
        "DEL",
        lambda stage: stage.program.delete("two", 8080),
        prepare=lambda stage: stage.program.add("two", 8080),
    ),
)


def _ufw(*, manage_builtins: bool) -> Callable[[BackendName], Iterator[Stage]]:
    def setting(backend: BackendName) -> Iterator[Stage]:
        with Node(backend, programs=programs.tree()) as node:
            ufw = programs.Ufw(node, manage_builtins=manage_builtins)
            ufw.enable()
            yield Stage(node, ufw)

    return setting


_UFW = (
    Action("enable", lambda stage: stage.program.enable(), prepare=lambda stage: stage.program.disable()),
    Action("reload", lambda stage: stage.program("reload")),
    Action("disable", lambda stage: stage.program("disable"), undo=lambda stage: stage.program.enable(check=False)),
    Action(
        "allow",
        lambda stage: stage.program("allow", "8080/tcp"),
        undo=lambda stage: stage.program("delete", "allow", "8080/tcp"),
    ),
)


def _fail2ban(backend: BackendName) -> Iterator[Stage]:
    with Node(backend, programs=programs.tree()) as node:
        fail2ban = programs.Fail2ban(node)
        fail2ban.daemon.start()
        yield Stage(node, fail2ban)


_BANNED = "203.0.113.66"
_FAIL2BAN = (
    Action(
        "start, first ban",
        lambda stage: (stage.program.daemon.restart(), stage.program("set", "sshd", "banip", _BANNED)),
        undo=lambda stage: stage.program("set", "sshd", "unbanip", _BANNED),
    ),
    Action(
        "ban",
        lambda stage: stage.program("set", "sshd", "banip", _BANNED),
        undo=lambda stage: stage.program("set", "sshd", "unbanip", _BANNED),
    ),
    Action("reload", lambda stage: stage.program("reload")),
    Action("stop", lambda stage: stage.program.daemon.stop(), undo=lambda stage: stage.program.daemon.start()),
)


def _podman(backend: BackendName) -> Iterator[Stage]:
    with Node(backend, programs=programs.tree()) as node:
        podman = programs.Podman(node)
        podman.run("web")
        address = node.run("ip -4 -o address show dev eth0", ns="web").stdout.split()[3].split("/")[0]
        yield Stage(node, podman, to=address, sink="web")


_PODMAN = (
    Action(
        "run -p, the first one",
        lambda stage: stage.program.run("more", "-p", "8080:80"),
        prepare=without("NETAVARK"),
        undo=lambda stage: stage.program("rm", "-f", "-t", "0", "more"),
    ),
    Action(
        "run -p",
        lambda stage: stage.program.run("more", "-p", "8080:80"),
        undo=lambda stage: stage.program("rm", "-f", "-t", "0", "more"),
    ),
    Action(
        "rm",
        lambda stage: stage.program("rm", "-f", "-t", "0", "more"),
        prepare=lambda stage: stage.program.run("more", "-p", "8080:80"),
    ),
)

CNI = Neighbour("CNI plugins 1.1: bridge, firewall, portmap", _cni, _CNI)
UFW = (
    Neighbour("ufw 0.36", _ufw(manage_builtins=False), _UFW),
    Neighbour("ufw 0.36, MANAGE_BUILTINS=yes", _ufw(manage_builtins=True), _UFW[:3]),
)
FAIL2BAN = Neighbour("fail2ban 1.0", _fail2ban, _FAIL2BAN)
PODMAN = Neighbour("podman 4.3 with netavark", _podman, _PODMAN)
