"""Memory, start and reload.

Law: what a person would call is timed: the daemon from its start to READY, `nodewallctl reload` until its exit.
"""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.figures import median
from bench.results import Outcome, Result, Scale, compared
from bench.stage import Stage, inside, resident_mib, write
from lab.node import Node
from lab.processes import inner_pid, kill_entered
from lab.waiting import LabError, wait_for

_RULES, _SETS, _SET_SIZE = 100, 2, 1_000
_PREPARE = Path(__file__).resolve().parent.parent / "tools" / "prepare-system"

# firewalld from a Debian of its own, within the node, with its own message bus.
_FIREWALLD = """
set -e
mkdir -p /run/other/new && mount -t tmpfs other /run/other/new && cd /run/other/new && mkdir upper work root
mount -t overlay -o "lowerdir=$TREE,upperdir=$PWD/upper,workdir=$PWD/work" other root
for each in proc sys dev; do mount --rbind /$each root/$each; done
mount -t tmpfs run root/run && mkdir -p root/run/dbus root/run/lock
chroot root dbus-uuidgen --ensure
chroot root dbus-daemon --system --fork
exec chroot root /usr/bin/python3 /usr/sbin/firewalld --nofork --nopid
"""


def memory(stage: Stage, _scale: Scale) -> Outcome:
    """Resident memory, beside firewalld in the same node's kernel."""
    with Node("nft") as node:
        with stage.daemon(node, _hundred_rules()) as daemon:
            ours = resident_mib(daemon.pid)
        with _firewalld(node) as pid:
            theirs = resident_mib(pid)
    what = f"resident memory, {_RULES} rules, {_SETS} sets of {_SET_SIZE:,}"
    return Outcome(
        [
            compared("memory", what, ours, theirs, unit="MiB", limit=1.0, of="firewalld", events=1, goal="below it"),
            Result("memory", "the same", ours, "MiB", "below 40 MiB", ours, 40.0, events=1),
        ]
    )


def start(stage: Stage, scale: Scale) -> Outcome:
    """From the start to READY, with the rules in the kernel already."""
    with Node("nft") as node, stage.daemon(node, _hundred_rules()) as daemon:
        ours, theirs = [], []
        for _ in range(scale.runs):
            daemon.stop()
            begun = time.monotonic()
            daemon.start()
            ours.append((daemon.wait_ready().noticed("READY")[0].when - begun) * 1000)
            begun = time.monotonic()
            node.popen([node.python(), "-c", "pass"]).wait()
            theirs.append((time.monotonic() - begun) * 1000)
    what = f"start to READY with {_RULES} rules, rules already in the kernel"
    figure, reference = median(ours), median(theirs)
    return Outcome(
        [
            Result(
                "start",
                what,
                figure,
                "ms",
                "at most 500 ms more",
                figure - reference,
                500.0,
                reference,
                "python3 -c pass",
                len(ours),
            )
        ]
    )


def reload(stage: Stage, scale: Scale) -> Outcome:
    """A reload that changes one entry of a large set."""
    entries = [f"10.{64 + (n >> 16)}.{n >> 8 & 255}.{n & 255}" for n in range(scale.set_size)]
    with Node("nft") as node:
        create = f"create bench hash:net family inet maxelem {2 * scale.set_size}\n"
        script = write(node, "set", create + "".join(f"add bench {entry}\n" for entry in entries))
        file = node.directory / "entries"
        file.write_text("\n".join(entries) + "\n")
        file.chmod(0o600)
        ours, theirs = [], []
        with stage.daemon(node, _large_set(file)) as daemon:
            for number in range(scale.runs):
                entries[number] = f"192.0.2.{number + 1}"
                file.write_text("\n".join(entries) + "\n")
                begun = time.monotonic()
                answer = daemon.ctl("reload")
                ours.append((time.monotonic() - begun) * 1000)
                if answer.returncode:
                    raise LabError(f"the reload was refused: {answer.stderr}")
                told = inside(node, "programs", argv=["ipset", "restore"], stdin=script, times=1)
                theirs += told["ms"]
                node.run("ipset destroy bench")
    what = f"reload that changes one entry of a {scale.set_size:,}-entry set"
    of = "ipset restore of that set"
    result = compared("reload", what, median(ours), median(theirs), unit="ms", limit=1.5, of=of, events=len(ours))
    return Outcome([result])


def _hundred_rules() -> str:
    """A hundred entries, two of them by sets of a thousand addresses."""
    text = ""
    for number in range(_SETS):
        entries = ", ".join(f'"10.{64 + number}.{n >> 8}.{n & 255}"' for n in range(_SET_SIZE))
        text += f"[set.set{number}]\nentries = [{entries}]\n"
        text += f'[[port]]\nname = "port{number}"\nports = [{20000 + number}]\nallow = ["@set{number}"]\n'
    for number in range(_RULES - _SETS):
        text += f'[[rule]]\nname = "rule{number}"\ntable = "filter"\nchain = "INPUT"\n'
        text += f'rule = "-p tcp --dport {21000 + number} -j DROP"\n'
    return text


def _large_set(file: Path) -> str:
    return f'[set.large]\nfiles = ["{file}"]\n[[port]]\nname = "vault"\nports = [31002]\nallow = ["@large"]\n'


@contextmanager
def _firewalld(node: Node) -> Iterator[int]:
    """A real firewalld that has loaded its rules; its pid."""
    tree = dict(line.split() for line in _printed(str(_PREPARE)).splitlines())["neighbours"]
    process = node.popen(["unshare", "-m", "sh", "-c", _FIREWALLD], log="firewalld", env={"TREE": tree})
    try:
        wait_for(
            lambda: "firewalld" in node.run(["nft", "list", "tables"]).stdout, timeout=60, what="firewalld's rules"
        )
        time.sleep(1)  # it goes on reading for a moment
        yield inner_pid(process)
    finally:
        kill_entered(process)


def _printed(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"{command[0]} failed:\n{done.stderr}")
    return done.stdout
