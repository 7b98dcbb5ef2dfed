"""Programs that write rules, and what each of them does: the table that suites and measurements share.

Laws: a program is on its node, started, and lets a flow of UDP pass through FORWARD, before anything is done; `act`
returns when the program says that it is done; `prepare` and `undo` bring about the state from which it can be done
(again). What can be run is the real program (`lab.programs`), the others are played (`lab.rivals`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import programs
from lab.node import FAMILIES, NODE, POD1, STRANGER, TABLES, Address, BackendName, Node
from lab.rivals import PORTS, Rival

SOURCE_PORT = 40001
_ANSWERED = "-u SEEN_REPLY,ASSURED -t 600"
_CAPTURES = Path(__file__).resolve().parent.parent / "tests/captures"
_CALICO = "kp126+felix3264-insert-{backend}-3svc"
_GUEST = "172.17.0.77"
_CONTAINER = Address("172.17.0.2", "fd00:d0c::242:ac11:2")


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
        """Have the flow known to conntrack as one that was answered: what most programs accept above all else."""
        for port in () if self.translated else PORTS:
            ends = f"-s {STRANGER.ipv4} -d {self.to} -p udp --sport {SOURCE_PORT} --dport {port}"
            self.node.run(f"conntrack -I {ends} {_ANSWERED} 2>&- || conntrack -U {ends} {_ANSWERED}", check=False)

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


# --- a person or a script


def _nobody(backend: BackendName) -> Iterator[Stage]:
    with Node(backend) as node:
        for family in FAMILIES:
            node.run(f"cat > /run/boot.{family}", stdin=node.rules(family) or "*filter\nCOMMIT\n")
        yield Stage(node)


def _restore(stage: Stage) -> None:
    """As iptables-persistent does at boot, whatever has been added since."""
    tables = "".join(f"*{table}\n{_BUILT_IN[table]}COMMIT\n" for table in TABLES if table != "security")
    for tool in ("iptables", "ip6tables"):
        stage.node.run([f"{tool}-restore", "-w"], stdin=tables)


_BUILT_IN = {
    table: "".join(f":{chain} ACCEPT [0:0]\n" for chain in chains.split())
    for table, chains in {
        "raw": "PREROUTING OUTPUT",
        "mangle": "PREROUTING INPUT FORWARD OUTPUT POSTROUTING",
        "nat": "PREROUTING INPUT OUTPUT POSTROUTING",
        "filter": "INPUT FORWARD OUTPUT",
        "security": "INPUT FORWARD OUTPUT",
    }.items()
}


def _flush(stage: Stage) -> None:
    stage.tools(*(f"-t {table} -F" for table in TABLES))


def _clear(stage: Stage) -> None:
    stage.tools(*(f"-t {table} {what}" for table in TABLES for what in ("-F", "-X")))


_ACCEPT = "-s 203.0.113.0/24 -j ACCEPT"
_PERSON = (
    Action(
        "iptables -I FORWARD ... -j ACCEPT",
        lambda stage: stage.node.run(f"iptables -w -I FORWARD {_ACCEPT}"),
        undo=lambda stage: stage.node.run(f"iptables -w -D FORWARD {_ACCEPT}", check=False),
    ),
    Action("iptables -F, every table", _flush),
    Action("iptables -F; -X, every table", _clear),
    Action("iptables-restore of a saved file", _restore),
    Action("nft flush ruleset", lambda stage: stage.node.run("nft flush ruleset"), only="nft"),
)


# --- played: Kubernetes


def _kube_proxy(backend: BackendName) -> Iterator[Stage]:
    with Node(backend) as node:
        yield Stage(node, _started(Rival(node, "kube-proxy")), to=NODE.ipv4)


def _started(rival: Rival) -> Rival:
    rival.do("start")
    return rival


def _did(*words: str) -> Deed:
    return lambda stage: stage.program.do(*words)


def _without(pattern: str) -> Deed:
    """Its jumps in filter FORWARD are gone, as on a node on which it was not yet."""

    def gone(stage: Stage) -> None:
        for tool in ("iptables", "ip6tables"):
            rules = f"{tool} -w -S FORWARD | grep -E -- '{pattern}' | sed 's/^-A/-D/'"
            stage.node.run(f"{rules} | while read -r rule; do eval {tool} -w $rule; done", check=False)

    return gone


def _flushed_then(word: str) -> Deed:
    def both(stage: Stage) -> None:
        _clear(stage)
        stage.program.do(word)

    return both


_KUBE_PROXY = (
    Action("start", _did("start"), prepare=_without("KUBE-")),
    Action("sync of all Services", _did("sync")),
    Action("flush by a person, canaries missed", _flushed_then("tick")),
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
            yield Stage(node, _started(felix(node, mode)))

    return setting


_FELIX = (
    Action("start", _did("refresh"), prepare=_without("cali:")),
    Action("refresh, nothing foreign moved", _did("refresh")),
    Action(
        "refresh after foreign rules at both ends",
        _did("refresh"),
        prepare=lambda stage: stage.tools("-I FORWARD -p tcp --dport 9 -j DROP", "-A FORWARD -p tcp --dport 9 -j DROP"),
        undo=lambda stage: stage.tools(*["-D FORWARD -p tcp --dport 9 -j DROP"] * 2),
    ),
)


def _kube_router(backend: BackendName) -> Iterator[Stage]:
    with Node(backend) as node:
        yield Stage(node, _started(Rival(node, "kube-router")))


_KUBE_ROUTER = (
    Action("start", _did("sync"), prepare=_without("kube-router")),
    Action("sync: save, edit, restore", _did("sync")),
)


def _flannel(backend: BackendName) -> Iterator[Stage]:
    with Node(backend) as node:
        yield Stage(node, _started(Rival(node, "flannel")))


_FLANNEL = (Action("rules appended again", _did("tick"), prepare=_without("FLANNEL")),)


# --- Docker


def _docker28(backend: BackendName) -> Iterator[Stage]:
    with Node(backend) as node:
        addresses = ["172.17.0.1/16", "fd00:d0c::1/64"], [f"{_CONTAINER.ipv4}/16", f"{_CONTAINER.ipv6}/64"]
        node.attach("web", "docker0", node=addresses[0], host=addresses[1])
        yield Stage(node, _started(Rival(node, "docker28")), to=_CONTAINER.ipv4, sink="web")


_DOCKER28 = (Action("start", _did("start")), Action("network create", _did("network")))


def _dockerd(backend: BackendName) -> Iterator[Stage]:
    with Node(backend, programs=programs.tree()) as node:
        yield _published(node, None)


def _published(node: Node, firewalld: programs.Firewalld | None) -> Stage:
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
_CREATE = Action(
    "docker network create",
    lambda stage: _docker(stage)("network", "create", "more"),
    undo=lambda stage: _docker(stage)("network", "rm", "more"),
)
_DOCKER_RESTART = Action("dockerd restart", lambda stage: _docker(stage).daemon.restart(), settle=0.4)
_DOCKERD = (
    Action(
        "dockerd start",
        lambda stage: _docker(stage).daemon.start(),
        prepare=lambda stage: _docker(stage).daemon.stop(),
        settle=0.4,
    ),
    _DOCKER_RESTART,
    _CREATE,
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


# --- firewalld


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
        yield _published(node, firewalld)


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
    _DOCKER_RESTART,
    _CREATE,
)


# --- others


def _cni(backend: BackendName) -> Iterator[Stage]:
    with Node(backend, programs=programs.tree()) as node:
        cni = programs.Cni(node)
        cni.add("one", *PORTS)
        yield Stage(node, cni, to="10.88.0.2", sink="one")


_CNI = (
    Action(
        "ADD, the first one",
        lambda stage: stage.program.add("two", 8080),
        prepare=_without("CNI"),
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
        prepare=_without("NETAVARK"),
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


NEIGHBOURS: dict[str, Neighbour] = {
    neighbour.name: neighbour
    for neighbour in (
        Neighbour("a person", _nobody, _PERSON),
        Neighbour("dockerd 20.10", _dockerd, _DOCKERD),
        Neighbour("Docker 28", _docker28, _DOCKER28, played=True),
        Neighbour("firewalld 1.3, FirewallBackend=iptables", _firewalld("iptables"), _FIREWALLD),
        Neighbour("firewalld 1.3, FirewallBackend=nftables", _firewalld("nftables"), _FIREWALLD),
        Neighbour("dockerd 20.10 and firewalld 1.3 (iptables)", _both, _BOTH),
        Neighbour("CNI plugins 1.1: bridge, firewall, portmap", _cni, _CNI),
        Neighbour("ufw 0.36", _ufw(manage_builtins=False), _UFW),
        Neighbour("ufw 0.36, MANAGE_BUILTINS=yes", _ufw(manage_builtins=True), _UFW[:3]),
        Neighbour("fail2ban 1.0", _fail2ban, _FAIL2BAN),
        Neighbour("podman 4.3 with netavark", _podman, _PODMAN),
        Neighbour("kube-proxy 1.26", _kube_proxy, _KUBE_PROXY, played=True),
        Neighbour("Felix 3.26, Insert", _felix("Insert"), _FELIX, played=True),
        Neighbour("Felix 3.26, Append", _felix("Append"), _FELIX, played=True),
        Neighbour("kube-router", _kube_router, _KUBE_ROUTER, played=True),
        Neighbour("flannel", _flannel, _FLANNEL, played=True),
    )
}
"""Everybody, in the order of the table."""
