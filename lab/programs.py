"""Other people's programs that write rules, running in a node as a machine would run them: the real ones.

`tree()` is where they lie (tools/prepare-system unpacks the packages, nothing is installed); `Node(programs=tree())`
has them on its path. Laws: `start` returns when the program is ready, `stop` when it has ended, and a program that does
not start says why; all dies with the node, and so do the containers' cgroups.
"""

import io
import json
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from signal import SIGTERM, Signals

from lab.node import Node
from lab.processes import kill_entered
from lab.waiting import LabError, wait_for

_PREPARE = Path(__file__).resolve().parent.parent / "tools/prepare-system"
_LIMIT = 40.0
"""Seconds until a program that is not ready counts as broken."""


@cache
def tree() -> Path:
    """The folder of the unpacked programs; fetches and unpacks them at the first call on a machine. Raises LabError."""
    done = subprocess.run([_PREPARE, "programs"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"tools/prepare-system failed:\n{done.stdout}{done.stderr}")
    return Path(done.stdout.split()[-1])


class Program:
    """A program that runs in the foreground until it is told to end."""

    def __init__(self, node: Node, name: str, command: Sequence[str], ready: Callable[[], object]) -> None:
        self.node, self.name = node, name
        self._command, self._ready = list(command), ready
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it, and wait until it is ready."""
        process = self._process = self.node.popen(self._command, log=self.name)

        def ready() -> object:
            if process.poll() is not None:
                raise LabError(f"{self.name} has ended:\n{self.node.logs[self.name].read_text()[-3000:]}")
            return self._ready()

        wait_for(ready, timeout=_LIMIT, what=f"{self.name} to be ready")

    def stop(self, number: Signals = SIGTERM) -> None:
        """Have it end, and wait until it has."""
        if self._process is None:
            raise LabError(f"{self.name} was not started")
        kill_entered(self._process, number)
        self._process.wait(_LIMIT)

    def restart(self) -> None:
        """One after the other, as systemctl restart does."""
        self.stop()
        self.start()


class Docker:
    """dockerd, with a containerd that outlives it as Debian's does. Its containers come back when it is restarted."""

    SOCKET = "unix:///run/docker.sock"

    def __init__(self, node: Node, *options: str) -> None:
        self.node = node
        root = Path(f"/proc/{node.pid}/root")
        containerd = ["containerd", "--root", "/var/lib/containerd", "--state", "/run/containerd"]
        containerd += ["--address", "/run/containerd.sock", "--log-level", "warn"]
        self.containerd = Program(node, "containerd", containerd, (root / "run/containerd.sock").is_socket)
        command = ["dockerd", "-H", self.SOCKET, "--containerd", "/run/containerd.sock", "--exec-root", "/run/docker"]
        command += ["--pidfile", "/run/docker.pid", "--storage-driver", "vfs"]
        command += ["--cgroup-parent", f"/{node.cgroup}", "--exec-opt", "native.cgroupdriver=cgroupfs", *options]
        ask = ["docker", "-H", self.SOCKET, "version"]
        self.daemon = Program(node, "dockerd", command, lambda: not node.run(ask, check=False).returncode)

    def start(self) -> None:
        """Both daemons, and an image of one program."""
        self.containerd.start()
        self.daemon.start()
        image = self.node.directory / "image.tar"
        with tarfile.open(image, "w") as packed:
            packed.add(tree() / "usr/bin/busybox", "bin/busybox")
            for folder in ("tmp", "etc", "proc", "sys", "dev"):
                entry = tarfile.TarInfo(folder)
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                packed.addfile(entry, io.BytesIO())
        self("import", str(image), "still:1")

    def __call__(self, *arguments: str) -> str:
        """The docker command line; what it printed."""
        return self.node.run(["docker", "-H", self.SOCKET, *arguments]).stdout

    def run(self, name: str, *options: str) -> None:
        """A container that does nothing; its network namespace is `name` in the node, for `lab.traffic`."""
        still = ("--restart", "always", "--stop-signal", "KILL", *options, "still:1", "/bin/busybox", "sleep", "86400")
        self("run", "-d", "--name", name, *still)
        self.adopt(name)

    def adopt(self, name: str, known_as: str = "") -> None:
        """Wait until a container runs (again), and have its present network namespace known by a name."""
        asked = ["inspect", "-f", "{{.State.Running}} {{.NetworkSettings.SandboxKey}}", name]
        wait_for(lambda: self(*asked).startswith("true /"), timeout=_LIMIT, what=f"container {name}")
        self.node.adopt(known_as or name, self(*asked).split()[1].replace("/var/run", "/run", 1))


_BUS = """
<busconfig>
  <type>system</type><listen>unix:path=/run/dbus/system_bus_socket</listen><auth>EXTERNAL</auth>
  <policy context="default">
    <allow own="*"/><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow user="*"/>
  </policy>
</busconfig>
"""


class Firewalld:
    """firewalld on a D-Bus of the node's own; `backend` is its FirewallBackend. Its default zone lets everything pass.

    dockerd, when it is started later, finds it on that bus and puts its own rules back after each reload.
    """

    def __init__(self, node: Node, backend: str) -> None:
        self.node = node
        socket = Path(f"/proc/{node.pid}/root/run/dbus/system_bus_socket")
        node.run("mkdir -p /run/dbus && cat > /run/dbus/conf", stdin=_BUS)
        bus = ["dbus-daemon", "--config-file=/run/dbus/conf", "--nofork", "--nopidfile"]
        self.bus = Program(node, "dbus", bus, socket.is_socket)
        command = ["firewalld", "--nofork", "--nopid"]
        running = ["firewall-cmd", "--state"]
        self.daemon = Program(node, "firewalld", command, lambda: node.run(running, check=False).returncode == 0)
        for key, value in (("FirewallBackend", backend), ("DefaultZone", "trusted")):
            file = "/etc/firewalld/firewalld.conf"
            node.run(f"sed -i 's/^{key}=.*/{key}={value}/' {file} && grep -qx {key}={value} {file}")

    def start(self) -> None:
        """The bus and the daemon."""
        self.bus.start()
        self.daemon.start()

    def __call__(self, *arguments: str, check: bool = True) -> str:
        """firewall-cmd; what it printed."""
        return self.node.run(["firewall-cmd", *arguments], check=check).stdout


class Ufw:
    """ufw as its package leaves it, with ssh allowed and routed packets left alone."""

    def __init__(self, node: Node, *, manage_builtins: bool = False) -> None:
        self.node = node
        node.run(
            "set -e; cp -n /usr/share/ufw/*.init /etc/ufw/; cp -n /usr/share/ufw/iptables/*.rules /etc/ufw/;"
            "cp -n /usr/share/ufw/ufw.conf /etc/ufw/ || true;"
            'sed -i \'s/^DEFAULT_FORWARD_POLICY=.*/DEFAULT_FORWARD_POLICY="ACCEPT"/;'
            f"s/^MANAGE_BUILTINS=.*/MANAGE_BUILTINS={'yes' if manage_builtins else 'no'}/;"
            "s/^IPT_SYSCTL=.*/IPT_SYSCTL=/' /etc/default/ufw"
        )
        self("allow", "22/tcp")

    def __call__(self, *arguments: str) -> str:
        """The ufw command line; what it printed."""
        return self.node.run(["ufw", *arguments]).stdout

    def enable(self, *, check: bool = True) -> None:
        """Start it, without the question whether ssh may be cut."""
        self.node.run(["ufw", "--force", "enable"], check=check)

    def disable(self) -> None:
        """Stop it, even if it complains: with MANAGE_BUILTINS it means to delete others' chains that are in use."""
        self.node.run(["ufw", "disable"], check=False)


_JAIL = """
[DEFAULT]
backend = polling
[sshd]
enabled = true
filter = sshd
logpath = /var/log/auth.log
banaction = iptables-multiport
port = ssh
"""


class Fail2ban:
    """fail2ban with one jail, that of sshd."""

    def __init__(self, node: Node) -> None:
        self.node = node
        node.run(
            "touch /var/log/auth.log; rm -f /etc/fail2ban/jail.d/*; cat > /etc/fail2ban/jail.d/one.conf", stdin=_JAIL
        )
        command = ["fail2ban-server", "-f", "-s", "/run/fail2ban.sock", "-p", "/run/fail2ban.pid", "start"]
        ask = ["fail2ban-client", "-s", "/run/fail2ban.sock", "status", "sshd"]
        self.daemon = Program(node, "fail2ban", command, lambda: node.run(ask, check=False).returncode == 0)

    def __call__(self, *arguments: str) -> str:
        """fail2ban-client; what it printed."""
        return self.node.run(["fail2ban-client", "-s", "/run/fail2ban.sock", *arguments]).stdout


class Cni:
    """The plugins bridge, firewall and portmap, called as a container runtime calls them."""

    _PLUGINS = Path("/usr/lib/cni")

    def __init__(self, node: Node) -> None:
        self.node = node

    def add(self, name: str, *ports: int) -> None:
        """A pod: a namespace of that name, attached, with these UDP host ports."""
        self.node.run(["ip", "netns", "add", name])
        self.node.namespaces.append(name)
        result: object = None
        for plugin in self._plugins(ports):
            result = json.loads(self._call("ADD", name, plugin | ({"prevResult": result} if result else {})))

    def delete(self, name: str, *ports: int) -> None:
        """Take it away."""
        for plugin in reversed(self._plugins(ports)):
            self._call("DEL", name, plugin)
        self.node.run(["ip", "netns", "delete", name])
        self.node.namespaces.remove(name)

    @staticmethod
    def _plugins(ports: Sequence[int]) -> list[dict[str, object]]:
        head: dict[str, object] = {"cniVersion": "0.4.0", "name": "pods"}
        ranges = {"type": "host-local", "ranges": [[{"subnet": "10.88.0.0/16"}], [{"subnet": "fd88::/64"}]]}
        bridge: dict[str, object] = {
            "type": "bridge",
            "bridge": "cni1",
            "isGateway": True,
            "ipMasq": True,
            "ipam": ranges,
        }
        mapped = [{"hostPort": port, "containerPort": port, "protocol": "udp"} for port in ports]
        portmap: dict[str, object] = {"type": "portmap", "capabilities": {"portMappings": True}}
        portmap["runtimeConfig"] = {"portMappings": mapped}
        firewall: dict[str, object] = {"type": "firewall", "backend": "iptables"}
        return [head | plugin for plugin in (bridge, firewall, portmap)]

    def _call(self, command: str, name: str, plugin: dict[str, object]) -> str:
        environment = {"CNI_COMMAND": command, "CNI_CONTAINERID": name, "CNI_NETNS": f"/run/netns/{name}"}
        environment |= {"CNI_IFNAME": "eth0", "CNI_PATH": str(self._PLUGINS)}
        program = str(self._PLUGINS / str(plugin["type"]))
        return self.node.run([program], stdin=json.dumps(plugin), env=environment).stdout


class Podman:
    """podman with netavark; its containers need no image."""

    def __init__(self, node: Node) -> None:
        self.node = node
        node.run(
            "set -e; cd /run; mkdir -p still/bin still/proc still/dev still/sys still/etc still/tmp;"
            "cp /usr/bin/busybox still/bin/; cat > /etc/containers/containers.conf",
            stdin='[network]\nnetwork_backend = "netavark"\n[engine]\ncgroup_manager = "cgroupfs"\nruntime = "runc"\n',
        )

    def __call__(self, *arguments: str) -> str:
        """The podman command line; what it printed."""
        return self.node.run(["podman", "--storage-driver", "vfs", *arguments]).stdout

    def run(self, name: str, *options: str) -> None:
        """A container that does nothing; its network namespace is `name` in the node."""
        parent = ("--cgroup-parent", f"/{self.node.cgroup}", "--stop-signal", "KILL")
        still = ("--rootfs", "/run/still", "/bin/busybox", "sleep", "86400")
        self("run", "-d", "--name", name, *parent, *options, *still)
        pid = self("inspect", "-f", "{{.State.Pid}}", name).strip()
        self.node.adopt(name, f"/proc/{pid}/ns/net")
