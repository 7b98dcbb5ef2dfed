"""A machine whose ports are guarded, and a peer that tries them: what several system tests ask for."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from booted import HOST, Machine, wait_for

FLOOD = Path(__file__).with_name("flood.py")
UNIT = "nodewalld.service"
DROPPED, REJECTED, REDIRECTED, ALLOWED, OPEN = 31002, 31003, 31004, 31005, 31009
ZONED, ZONED_OPEN = 31010, 31011
PER_OPEN = 4
ZONE = {"ipv4": "198.51.100.9", "ipv6": "2001:db8:51::9"}
"""Further addresses of the peer, in a zone that drops all but one port."""

CONFIG = """
[daemon]
backend = "{backend}"

[set.friends]
entries = ["10.99.0.0/24", "fd99::/64"]

[set.nobody]
entries = ["192.0.2.1", "2001:db8::1"]

[[port]]
name = "dropped"
ports = [31002]
protocol = ["tcp", "udp"]
allow = ["@nobody"]

[[port]]
name = "rejected"
ports = [31003]
protocol = ["tcp", "udp"]
action = "reject"

[[port]]
name = "redirected"
ports = [31004]
action = "redirect"

[[port]]
name = "allowed"
ports = [31005]
protocol = ["tcp", "udp"]
allow = ["@friends"]

[[forward]]
name = "routed"
in = "up0"
source = "!@friends"
action = "reject"

[[rule]]
name = "text"
table = "filter"
chain = "INPUT"
rule = "-p tcp --dport 31006 -m set --match-set nobody src -j REJECT --reject-with tcp-reset"

[zone.elsewhere]
sources = ["192.0.2.0/24", "2001:db8:9::/48"]
services = ["ssh"]
target = "reject"

[zone.shut]
sources = ["198.51.100.0/24", "2001:db8:51::/48"]
ports = ["31011/udp"]
target = "drop"

[[jump]]
name = "docker-user"
table = "filter"
from = "FORWARD"
to = "DOCKER-USER"
"""

# Prints "open", "refused" or "silent".
_PROBE = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
probe = socket.socket(family)
probe.settimeout(0.4)
try:
    probe.connect((sys.argv[1], int(sys.argv[2])))
    print("open")
except ConnectionRefusedError:
    print("refused")
except (TimeoutError, OSError):
    print("silent")
"""
_LISTEN = """
import socket, sys, time
for port in map(int, sys.argv[1:]):
    listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64)
    globals()[f"listener{port}"] = listener
time.sleep(1000)
"""


def guard(machine: Machine, backend: str = "nft") -> None:
    """Put the configuration in force, as a person does it: edit, check, reload."""
    machine.path("/etc/nodewalld/nodewalld.toml").write_text(CONFIG.format(backend=backend))
    machine.run("nodewallctl check")
    machine.run(f"systemctl reload {UNIT}")


def listen(machine: Machine) -> None:
    """Answer TCP on all ports of the configuration."""
    machine.path("/root/listen.py").write_text(_LISTEN)
    ports = f"{DROPPED} {REJECTED} {REDIRECTED} {ALLOWED} {OPEN}"
    machine.run(f"systemd-run -q --unit=listen /usr/bin/python3 /root/listen.py {ports}")
    wait_for(lambda: probe(machine, "127.0.0.1", OPEN, "") == "open", what="a listener")


def probe(machine: Machine, address: str, port: int, enter: str = "ip netns exec peer ") -> str:
    """What becomes of a connection from the peer: "open", "refused" or "silent"."""
    machine.path("/root/probe.py").write_text(_PROBE)
    return machine.run(f"{enter}python3 /root/probe.py {address} {port}").stdout.strip()


@contextmanager
def flood(machine: Machine) -> Iterator[Callable[[], dict[str, int]]]:
    """UDP from the peer in both families, each millisecond: to a port that drops, `PER_OPEN` times, and to an open one;
    the same from an address whose zone drops all but one port. The counts so far of what arrives."""
    script, ports = machine.put(FLOOD), (DROPPED, OPEN, ZONED, ZONED_OPEN)
    listen = f"/usr/bin/python3 {script} receive /run/flood.json {' '.join(map(str, ports))}"
    machine.run(f"rm -f /run/flood.json; systemd-run -q --unit=flood-in {listen}")
    wait_for(machine.path("/run/flood.json").exists, what="the receiver")
    units = ["flood-in"]
    for family, address in HOST.items():
        machine.run(f"ip -n peer address replace {ZONE[family]}/{32 if family == 'ipv4' else 128} dev eth0 nodad")
        for name, where, numbers in (
            ("plain", address, f"{f'{DROPPED} ' * PER_OPEN}{OPEN}"),
            ("zone", f"{address},{ZONE[family]}", f"{f'{ZONED} ' * PER_OPEN}{ZONED_OPEN}"),
        ):
            units.append(f"flood-{name}-{family}")
            enter = "-p NetworkNamespacePath=/run/netns/peer"
            command = f"/usr/bin/python3 {script} send {where} {numbers}"
            machine.run(f"systemd-run -q --unit={units[-1]} {enter} {command}")

    def counts() -> dict[str, int]:
        return dict(json.loads(machine.path("/run/flood.json").read_text()))

    def grown(before: dict[str, int]) -> bool:
        return all(counts()[str(port)] > before[str(port)] + 100 for port in (OPEN, ZONED_OPEN))

    wait_for(lambda: grown(dict.fromkeys(map(str, ports), 0)), what="the flood")
    yield counts
    seen = counts()
    wait_for(lambda: grown(seen), what="the flood's end")  # it had gone on all the time
    machine.run(f"systemctl stop {' '.join(units)}")


def sent(counts: dict[str, int]) -> int:
    """How many packets to what drops were sent, by those to what is open."""
    return PER_OPEN * (counts[str(OPEN)] + counts[str(ZONED_OPEN)])


def passed(counts: dict[str, int]) -> int:
    """How many packets came through what drops, port and zone."""
    return counts[str(DROPPED)] + counts[str(ZONED)]


def main_pid(machine: Machine) -> int:
    """The daemon's pid, on the machine."""
    return int(machine.property(UNIT, "MainPID"))


def wait_until_back(machine: Machine, old: int, timeout: float) -> float:
    """Until another process than `old` is READY; how long it took."""
    began = time.monotonic()
    wait_for(
        lambda: machine.property(UNIT, "SubState") == "running" and main_pid(machine) not in {0, old},
        timeout,
        "the daemon's return",
    )
    return time.monotonic() - began


def rules(machine: Machine, backend: str = "nft") -> list[str]:
    """The rules and user chains of both families without counters, and the sets, in the kernel's order."""
    found = []
    for tool in (f"iptables-{backend}-save", f"ip6tables-{backend}-save", "ipset save"):
        table = ""
        for line in machine.run(tool).stdout.splitlines():
            if line.startswith("*"):
                table = f"{tool.split('-')[0]} {line[1:]} "
            elif line.startswith(("-A", "create", "add")) or line.endswith(" - [0:0]"):
                found.append(table * (not line.startswith(("create", "add"))) + line)
    return found
