"""A throw-away node: mount, network, process, IPC and host name namespaces, dead with one SIGKILL.

The laws: nothing outlives `close()` or the process that built the node; nothing is visible outside (names of
network namespaces, the xtables lock and the runtime folders lie on a private /run); no wait is unbounded.
The network around it is `lab.layout`'s.
"""

import contextlib
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self

from lab.layout import FAMILIES, NAMESPACES, FamilyName, addresses, network
from lab.processes import kill_entered, only_child
from lab.saved import foreign, sets_of
from lab.waiting import LabError, wait_for

BackendName = Literal["nft", "legacy"]
TOOLS = {"ipv4": "iptables", "ipv6": "ip6tables"}

_CHECKOUT = Path(__file__).resolve().parent.parent
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NEEDED = ("unshare", "nsenter", "ip", "iptables-nft", "iptables-legacy", "nft", "ipset", "conntrack")


# Sysctls of every namespace of a node, for links that are there and links to come: no reverse path filter, no
# address detection, no rationing of ICMP errors (a REJECT must never look like a DROP), the second ARP request
# after 20 ms instead of a second, and no wait before a neighbour advertisement for an anycast address.
_TAME = """
put() { value=$1; shift; for key; do [ ! -e /proc/sys/net/$key ] || echo $value > /proc/sys/net/$key; done; }
for link in /proc/sys/net/ipv4/conf/*; do
  link=${link##*/}
  put 0 ipv4/conf/$link/rp_filter ipv6/conf/$link/accept_dad ipv6/conf/$link/disable_ipv6
  put 20 ipv4/neigh/$link/retrans_time_ms ipv6/neigh/$link/retrans_time_ms
  put 20 ipv4/neigh/$link/mcast_solicit ipv6/neigh/$link/mcast_solicit
  put 0 ipv6/neigh/$link/proxy_delay
done
put 0 ipv4/icmp_ratelimit ipv6/icmp/ratelimit
"""

# Other people's programs over the machine's own, unpacked and not installed: what they write to /etc is thrown away,
# their folders in /var are empty, and they see the machine's cgroups, where runtimes make one for each container.
_LAY_OVER = """
mkdir /run/over /run/over/etc /run/over/etc.work /run/over/usr /run/over/usr.work
mount -t overlay -o lowerdir=$PROGRAMS/usr:/usr,upperdir=/run/over/usr,workdir=/run/over/usr.work over /usr
mount -t overlay -o lowerdir=$PROGRAMS/etc:/etc,upperdir=/run/over/etc,workdir=/run/over/etc.work over /etc
for d in /var/lib/docker /var/lib/containerd /var/lib/containers /var/lib/cni /var/lib/fail2ban /var/log /dev/shm; do
  mkdir -p $d
  mount -t tmpfs -o mode=755 over $d
done
"""

# Runs as PID 1 of the node. The last command holds the node until the builder's end of the pipe closes,
# which it also does when the builder dies; SIGCHLD is ignored so that orphans leave no zombies.
_HOLDER = """
set -e
[ -z "$PROGRAMS" ] || mount --rbind /sys/fs/cgroup /mnt
mount -t sysfs sysfs /sys
[ -z "$PROGRAMS" ] || { mount --rbind /mnt /sys/fs/cgroup; umount -l /mnt; }
for d in kernel vm fs debug; do
  [ ! -d /proc/sys/$d ] || { mount --bind /proc/sys/$d /proc/sys/$d; mount -o remount,bind,ro /proc/sys/$d; }
done
mount -t tmpfs -o mode=755 lab /run
mkdir -p /run/lock /run/netns /run/alternatives
[ -z "$PROGRAMS" ] || eval "$LAY_OVER"
cp -a /etc/alternatives/. /run/alternatives
for f in iptables ip6tables; do for x in '' -save -restore; do
  ln -sfn /usr/sbin/$f-$BACKEND$x /run/alternatives/$f$x
done; done
mount --bind /run/alternatives /etc/alternatives
hostname node
eval "$TAME"
put 1 ipv4/ip_forward ipv6/conf/all/forwarding ipv6/conf/default/forwarding
printf '%s' "$NET_node" | ip -batch -
eval "$TAME"
waiting=
for ns in client pod1 pod2 beyond; do
  nsenter --net=/run/netns/$ns /bin/sh -ec "$TAME"'printf %s "$NET_'$ns'" | ip -batch -' &
  waiting="$waiting $!"
done
for pid in $waiting; do wait $pid; done
trap '' CHLD
echo ready
exec cat > /dev/null
"""


def missing() -> list[str]:
    """What the lab needs and this machine lacks, in words for people; empty when all is there."""
    lacking = [f"program {tool}" for tool in _NEEDED if shutil.which(tool, path=_PATH) is None]
    if os.geteuid() != 0:
        lacking.insert(0, "root")
    if not Path("/etc/alternatives/iptables").is_symlink():
        lacking.append("Debian's alternative for iptables (/etc/alternatives/iptables)")
    return lacking


class Node:
    """A throw-away host with a network around it; see `lab.layout` for its parts.

    `uplink` names the interface towards the client, `second` the one towards "beyond". With `pod_links` the
    pods hang on point-to-point links of these two names, as Calico makes them, instead of on bridge cni0.
    `programs` is a folder of unpacked packages to lay over /usr and /etc: see the module `programs`.
    """

    def __init__(
        self,
        backend: BackendName = "nft",
        *,
        uplink: str = "eth0",
        second: str = "eth1",
        pod_links: Sequence[str] = (),
        programs: Path | None = None,
    ) -> None:
        if lacking := missing():
            raise LabError("the lab needs " + ", ".join(lacking))
        self.backend: BackendName = backend
        self.uplink = uplink
        self._programs = programs
        self.namespaces: list[str] = list(NAMESPACES)
        self.directory = Path(tempfile.mkdtemp(prefix="lab-", dir="/tmp"))
        self.logs: dict[str, Path] = {"node": self.directory / "node.log"}
        self._processes: list[subprocess.Popen[str]] = []
        self._at_close: list[Callable[[], None]] = []
        self._holder: subprocess.Popen[str] | None = None
        self._init = -1  # a descriptor of PID 1
        try:
            self._start(network(uplink, second, pod_links))
        except BaseException:
            self.close()
            raise

    def _start(self, network: Mapping[str, str]) -> None:
        with self.logs["node"].open("w") as log:
            self._holder = subprocess.Popen(
                [
                    "unshare",
                    "-m",
                    "-u",
                    "-i",
                    "-n",
                    "-p",
                    "-f",
                    "--kill-child=SIGKILL",
                    "--mount-proc",
                    "--propagation",
                    "private",
                    "/bin/sh",
                    "-c",
                    _HOLDER,
                ],
                env={
                    "PATH": _PATH,
                    "LC_ALL": "C",
                    "BACKEND": self.backend,
                    "TAME": _TAME,
                    "LAY_OVER": _LAY_OVER,
                    "PROGRAMS": str(self._programs or ""),
                }
                | {f"NET_{name}": lines for name, lines in network.items()},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        ready = self._holder.stdout
        readable = ready is not None and select.select([ready], [], [], 20)[0]
        if ready is None or not readable or ready.readline() != "ready\n":
            raise LabError("the node did not start:\n" + self.logs["node"].read_text())
        self.pid = only_child(self._holder.pid)
        self._init = os.pidfd_open(self.pid)

    # --- commands ---------------------------------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        """The environment of every command: fixed, with the checkout on PYTHONPATH."""
        return {
            "PATH": _PATH,
            "LC_ALL": "C",
            "HOME": "/root",
            "PYTHONPATH": str(_CHECKOUT),
        }

    @staticmethod
    def python() -> str:
        """The interpreter to run nodewalld with inside the node; the checkout is on its path."""
        return sys.executable

    def _entered(self, argv: Sequence[str] | str, ns: str) -> list[str]:
        if ns not in self.namespaces:
            raise LabError(f"no namespace {ns!r}; there are {', '.join(self.namespaces)}")
        net = "-n" if ns == "node" else f"--net=/proc/{self.pid}/root/run/netns/{ns}"
        command = ["/bin/sh", "-c", argv] if isinstance(argv, str) else [str(part) for part in argv]
        return ["nsenter", "-t", str(self.pid), "-m", "-u", "-i", "-p", net, "--wdns=/", "--", *command]

    def run(
        self,
        argv: Sequence[str] | str,
        *,
        ns: str = "node",
        check: bool = True,
        stdin: str | None = None,
        timeout: float = 60.0,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program (a list) or a shell command (a string) in a namespace of the node, to its end.

        LabError with all it printed when it fails and `check` is on, or when it takes longer than `timeout`.
        """
        process = subprocess.Popen(
            self._entered(argv, ns),
            env=self.environment() | dict(env or {}),
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        )
        with process:
            try:
                stdout, stderr = process.communicate(stdin, timeout=timeout)
            except subprocess.TimeoutExpired as error:
                kill_entered(process)
                stdout, stderr = process.communicate(timeout=10)
                raise LabError(f"{_shown(argv)} took more than {timeout:g} s\n{stdout}{stderr}") from error
        if check and process.returncode:
            raise LabError(f"{_shown(argv)} in {ns!r} exited {process.returncode}\n{stdout}{stderr}")
        return subprocess.CompletedProcess(argv, process.returncode, stdout, stderr)

    def popen(
        self,
        argv: Sequence[str] | str,
        *,
        ns: str = "node",
        log: str | None = None,
        stdin: int | IO[str] | None = subprocess.DEVNULL,
        stdout: int | IO[str] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        """Start a program in a namespace and leave it running; it dies with the node at the latest.

        What it prints goes to `logs[log]` where a log is named. The pid of the returned process is nsenter's:
        `inner_pid` gives the program's, `kill_entered` signals it; `wait()` gives the program's own status.
        """
        out: int | IO[str] | None = stdout
        with contextlib.ExitStack() as stack:
            errors: IO[str] | int | None = None
            if log is not None:
                path = self.logs.setdefault(log, self.directory / f"{log}.log")
                errors = stack.enter_context(path.open("a"))
                out = errors if out is None else out
            process = subprocess.Popen(
                self._entered(argv, ns),
                env=self.environment() | dict(env or {}),
                stdin=stdin,
                stdout=out if out is not None else subprocess.DEVNULL,
                stderr=errors if errors is not None else subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def sysctl(self, key: str, value: str, *, ns: str = "node") -> None:
        """Set a sysctl of that network namespace: `sysctl("net.ipv4.conf.all.route_localnet", "1")`."""
        if not key.startswith("net."):
            raise LabError(f"{key} belongs to the whole machine, not to a network namespace")
        self.run(["/bin/sh", "-c", f"echo {shlex.quote(value)} > /proc/sys/{key.replace('.', '/')}"], ns=ns)

    def attach(self, name: str, link: str, *, node: Sequence[str], host: Sequence[str]) -> None:
        """Add one more namespace, say a container: joined by a veth that the node calls `link`.

        `node` and `host` are the addresses of either end, with prefix lengths, in any family; the host's
        default routes lead to the node's first address of the family. `attach("web", "docker0",
        node=["172.17.0.1/16"], host=["172.17.0.2/16"])` makes Docker's captured rules work as they are.
        """
        near = [f"netns add {name}", f"link add {link} type veth peer name eth0 netns {name}"]
        near += [*addresses(link, *node), f"link set {link} up"]
        far = [*addresses("eth0", *host), "link set lo up", "link set eth0 up"]
        for colon in (False, True):
            gateways = [address.split("/")[0] for address in node if (":" in address) is colon]
            far += [f"route add default via {gateway} dev eth0 onlink" for gateway in gateways[:1]]
        self.run(["ip", "-batch", "-"], stdin="\n".join(near) + "\n")
        self.namespaces.append(name)
        self.run(_TAME)
        self.run(_TAME, ns=name)
        self.run(["ip", "-batch", "-"], ns=name, stdin="\n".join(far) + "\n")

    def adopt(self, name: str, path: str) -> None:
        """Give a network namespace that a program in the node has made, bound at `path` there, a name here."""
        link = f"/run/netns/{name}"
        self.run(f"umount -q {link}; touch {link} && mount --bind {path} {link}")
        if name not in self.namespaces:
            self.namespaces.append(name)

    @property
    def cgroup(self) -> str:
        """Where container runtimes in the node should put their cgroups, relative to the root; removed at the end."""
        return self.directory.name

    def on_close(self, action: Callable[[], None]) -> None:
        """Call `action` at the beginning of `close()`."""
        self._at_close.append(action)

    # --- rules ------------------------------------------------------------------------------------------

    def load(self, capture: Path | str, *, backend: BackendName | None = None) -> None:
        """Put a captured ruleset in force, replacing the tables that it names.

        `capture` is a file ("x.v4.save", "x.v6.rules") or the stem of one or two such files, of which both
        families are then loaded; "{backend}" in it stands for the node's. Sets that its rules name are made
        first, empty, so that the restore is taken; `backend` loads it into the other half of the kernel.
        """
        chosen = backend or self.backend
        name = Path(str(capture).format(backend=chosen))
        files = [name] if name.is_file() else sorted(name.parent.glob(f"{name.name}.v[46].*"))
        if not files:
            raise LabError(f"no capture {name}")
        for file in files:
            family: FamilyName = "ipv6" if ".v6." in file.name else "ipv4"
            text = file.read_text()
            if sets := sets_of(text, family):
                self.run(["ipset", "restore", "-exist"], stdin=sets)
            command = [f"{TOOLS[family]}-{chosen}-restore", "-w", "30"]
            result = self.run(command, stdin=text, check=False)
            if result.returncode:
                raise LabError(f"{file.name} was not taken by {command[0]}:\n{result.stderr}")

    def rules(self, family: str = "ipv4", *, backend: BackendName | None = None) -> str:
        """What iptables-save (or ip6tables-save) of the backend prints, without counters."""
        return self.run([f"{TOOLS[family]}-{backend or self.backend}-save"]).stdout

    def chain(self, table: str, chain: str, family: str = "ipv4", *, backend: BackendName | None = None) -> list[str]:
        """The rulespecs of one chain in order, without "-A CHAIN"; empty where there is no such chain."""
        command = [f"{TOOLS[family]}-{backend or self.backend}", "-w", "-t", table, "-S", chain]
        prefix = f"-A {chain} "
        lines = self.run(command, check=False).stdout.splitlines()
        return [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]

    def snapshot(self, *backends: BackendName) -> str:
        """The foreign rules of both families in the given backends (the node's): for comparing byte by byte.

        Left out are counters, time stamps, whatever is nodewalld's (chains NODEWALL*, rules tagged
        "nodewalld:"), and tables in which nothing foreign is left. Tables come in a fixed order.
        """
        parts = []
        for backend in backends or (self.backend,):
            for family in FAMILIES:
                parts += [f"# {family} {backend}\n", foreign(self.rules(family, backend=backend))]
        return "".join(parts)

    # --- the end ----------------------------------------------------------------------------------------

    def close(self) -> None:
        """Kill the node with all that runs in it, and wait until it is gone; a second call does nothing."""
        actions, self._at_close = self._at_close, []
        for action in actions:
            action()
        if self._init >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._init, signal.SIGKILL)
            for process in self._processes:
                # nsenter stops when its program is stopped; it must go on to reap it, or PID 1 can't end.
                if process.poll() is None:
                    process.send_signal(signal.SIGCONT)
            if not select.select([self._init], [], [], 20)[0]:
                raise LabError(f"the node's PID 1 ({self.pid}) does not die")
            os.close(self._init)
            self._init = -1
        if self._holder is not None:
            self._holder.kill()
            self._reap(self._holder)
            self._holder = None
        processes, self._processes = self._processes, []
        for process in processes:
            self._reap(process)
        if self._programs is not None:
            _remove_cgroups(self.cgroup)
        shutil.rmtree(self.directory, ignore_errors=True)

    @staticmethod
    def _reap(process: subprocess.Popen[str]) -> None:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _remove_cgroups(name: str) -> None:
    """Of every hierarchy; they are empty once the processes are gone, which the kernel may see a moment later."""
    root = Path("/sys/fs/cgroup")
    for top in (root / name, *root.glob(f"*/{name}")):
        folders = [path for path in top.rglob("*") if path.is_dir()] if top.is_dir() else []
        for folder in sorted(folders, key=lambda path: -len(path.parts)) + [top] * top.is_dir():
            wait_for(partial(_removed, folder), what=f"the end of cgroup {folder}")


def _removed(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        folder.rmdir()
    return not folder.exists()


def _shown(argv: Sequence[str] | str) -> str:
    return argv if isinstance(argv, str) else shlex.join(str(part) for part in argv)
