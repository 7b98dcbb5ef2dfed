"""Whatever neighbours, people and the machine do in any order: the laws of the product hold.

1. No foreign rule is ever changed by us: a twin without a daemon, to which the same is done, looks the same.
2. Everything is in force within a second of the last disturbance (of a slow machine, ten are borne; what was measured
   is printed). Where contention is told of, its own wait is waited for.
3. Every rule that stood wrong while the daemon could see it is in the history.
4. No traceback, and nothing grows.

What happens is drawn from a seed, which a failure prints: `--chaos-seed` draws the same again, `--chaos-seconds` goes
on for longer.
"""

import json
import random
import re
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from entries import DOCKER_USER, RELAY, VAULT
from live import ask, asleep
from neighbourhood import ATTACKS, Lines, filled, moves, persistent

from lab.daemon import Daemon
from lab.layout import FAMILIES
from lab.node import BackendName, Node
from lab.saved import foreign
from lab.waiting import LabError, wait_for
from nodewalld.service.wire import Refused

pytestmark = [pytest.mark.kernel, pytest.mark.slow]

HERE = Path(__file__).parent
PATIENCE = 10.0
GROWTH_MAX = 8 << 20  # bytes of one life; the first passes fill caches, and are not counted
WARM = 5

COMMON = f"""
[daemon]
resync = "1h"

[set.friends]
entries = ["10.90.0.7", "fd90::7", "192.0.2.0/24"]
{VAULT}{RELAY}
[[forward]]
name = "pods"
in = "eth0"
source = "!@friends"
action = "reject"

[forward.position]
after = [{{ rule = "-s 10.42.0.0/16 -j ACCEPT" }}, {{ rule = "-s fd42::/16 -j ACCEPT" }}]
before = [{{ rule = "-d 10.42.0.0/16 -j ACCEPT" }}, {{ rule = "-d fd42::/16 -j ACCEPT" }}]

[[rule]]
name = "itself"
table = "filter"
chain = "INPUT"
rule = "-p tcp --dport 8201 -j RETURN"

[[rule]]
name = "telnet"
table = "filter"
chain = "FORWARD"
rule = "-p tcp --dport 23 -j DROP"
position = "last"
{DOCKER_USER}"""
MORE = """
[[port]]
name = "kubelet"
ports = [10250]
action = "reject"

[[rule]]
name = "top"
table = "filter"
chain = "FORWARD"
rule = "-p udp --dport 23 -j DROP"
position = "first"
"""
CONFIGS = (COMMON, COMMON + MORE)
BROKEN = COMMON + '[[rule]]\nname = "x"\ntable = "mangle"\nchain = "INPUT"\nrule = "-j REJECT"\n'
_NOISE = tuple(
    "; ".join(f"iptables -w 20 -t raw {action} NOISE" for action in actions)
    for actions in (["-N"], ["-A"], ["-F", "-X"])
)
_THE_JUMP = re.compile(r"^(:DOCKER-USER -.*|-A FORWARD -j DOCKER-USER)\n", re.MULTILINE)
_OURS = re.compile(r"^-A (\S+) (.*nodewalld:at/.*)$")


@dataclass
class Chaos:
    """A node with a daemon, its twin without one, and the dice."""

    node: Node
    twin: Node
    daemon: Daemon
    dice: random.Random
    clock: Path
    eye: "Eye"
    log: list[str] = field(default_factory=list)
    owed: Lines = field(default_factory=list)
    ended: float = 0.0
    expected: tuple[set[tuple[str, str]], int] = field(default_factory=lambda: (set(), 0))
    lags: list[tuple[float, str]] = field(default_factory=list)
    exposures: list[float] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    grown: list[tuple[int, int]] = field(default_factory=list)
    base: tuple[int, int] = (0, 0)
    steps: int = 0
    config: str = COMMON

    # --- what happens

    def step(self) -> None:
        what = self.dice.choices(
            (self.live, self.stopped, self.killed, self.reload, self.broken, self.sets, self.time_jump, self.load),
            weights=(12, 5, 2, 2, 1, 1, 2, 2),
        )[0]
        self.note(f"-- {what.__name__}")
        self.ended = 0.0
        what()
        self.settle(what.__name__)
        self.recorded(*self.expected)
        self.expected = (set(), 0)
        self.twin.run("\n".join(self.owed), check=False)
        self.owed.clear()
        self.check()

    def note(self, line: str) -> None:
        self.log.append(line)

    def disturb(self) -> None:
        """What neighbours do, here; the twin has it done to it later."""
        lines: Lines = []
        for _ in range(self.dice.randint(1, 3)):
            move, family = self.dice.choice(moves(self.node.backend)), self.dice.choice(FAMILIES)
            self.note(f"{move.__name__} {family}")
            lines += filled(move(self.dice), family)
        self.node.run("\n".join(lines), check=False)
        self.ended = time.monotonic()
        self.owed += lines

    def live(self) -> None:
        """Neighbours, and now and then somebody who means us."""
        before = ask(self.daemon, "status")["repairs"]
        attacked = self.attack() if self.dice.random() < 0.3 else None
        if attacked:
            self.recorded({attacked}, before)
        self.disturb()

    def attack(self) -> tuple[str, str] | None:
        """Harm something of ours; returns family and table, where that can't be overlooked."""
        family = self.dice.choice(FAMILIES)
        rules = self.rules_of_ours(family)
        if not rules:
            return None
        table, chain, rule = self.dice.choice(rules)
        attack = self.dice.choice(ATTACKS)
        own = rule.split()[-1]
        if "{own}" in attack and not own.startswith("NODEWALL"):
            return None
        line = attack.replace("{table}", table).replace("{chain}", chain).replace("{rule}", rule).replace("{own}", own)
        self.note(f"attack {family}: {line}")
        self.node.run("\n".join(filled([line], family)), check=False)
        return None if ";" in attack else (family, table)

    def rules_of_ours(self, family: str) -> list[tuple[str, str, str]]:
        found, table = [], ""
        for line in self.node.rules(family).splitlines():
            table = line[1:] if line.startswith("*") else table
            if match := _OURS.match(line):
                found.append((table, match[1], match[2]))
        return found

    def stopped(self) -> None:
        """While it stands still, everything is wrong that the plan says; afterwards all of that is in the history."""
        asleep(self.daemon)
        before = ask(self.daemon, "status")["repairs"]
        self.daemon.signal(signal.SIGSTOP)
        try:
            self.disturb()
            wrong = self.eye.look()
        finally:
            self.daemon.signal(signal.SIGCONT)
            self.ended = time.monotonic()
        places = {(one["family"], one["table"]) for one in wrong if one["table"] != "ipset"}
        self.expected = places, before

    def recorded(self, wanted: set[tuple[str, str]], before: int) -> None:
        """Wait until the repairs since there were `before` of them tell of each of these families and tables."""
        if not wanted:
            return

        def told() -> bool:
            new = ask(self.daemon, "status")["repairs"] - before
            history = [event for event in ask(self.daemon, "history") if event["kind"] == "repair"]
            got = {(event["family"], event["table"]) for event in history[len(history) - new :]}
            return wanted <= got

        wait_for(told, timeout=PATIENCE, what=f"repairs of {wanted} in the history")

    def killed(self) -> None:
        if self.dice.random() < 0.5:
            self.daemon.kill9()
        else:
            self.daemon.stop()
        if self.dice.random() < 0.7:
            self.disturb()
        self.daemon.start()
        if self.dice.random() < 0.5:
            self.disturb()
        self.daemon.wait_ready()
        self.ended = time.monotonic()
        self.steps = 0

    def reload(self) -> None:
        self.config = self.dice.choice(CONFIGS)
        self.daemon.configure(self.config)
        if self.dice.random() < 0.5:
            self.disturb()
        ask(self.daemon, "reload")

    def broken(self) -> None:
        self.daemon.configure(BROKEN)
        with pytest.raises(Refused):
            ask(self.daemon, "reload")
        self.daemon.configure(self.config)

    def sets(self) -> None:
        """The kernel tells of no change of a set: they are looked at when somebody reloads."""
        self.node.run(
            "ipset flush friends; ipset del friends-v6 fd90::7; ipset add friends 203.0.113.0/24", check=False
        )
        ask(self.daemon, "reload")

    def time_jump(self) -> None:
        self.clock.write_text(str(self.dice.choice((-86400, -3600, -1, 0, 1, 3600, 86400, 10**8))))
        self.disturb()

    def load(self) -> None:
        """No processor to be had, somebody who writes all the time, and on legacy a lock that is held."""
        seconds = 0.6
        hog = f"end=$(($(date +%s%N) + {int(seconds * 1e9)})); while [ $(date +%s%N) -lt $end ]; do :; done"
        scripts = [hog, hog, f"{_NOISE[0]}; for i in 1 2 3 4 5 6 7 8 9; do {_NOISE[1]}; done; {_NOISE[2]}"]
        if self.node.backend == "legacy":
            scripts.append(f"flock /run/xtables.lock sleep {seconds}")
        others = [self.node.popen(script) for script in scripts]
        self.disturb()
        for other in others:
            other.wait(PATIENCE)
        self.node.run(_NOISE[2], check=False)

    # --- what must hold

    def settle(self, after: str) -> None:
        began = time.monotonic()
        while True:
            asked = time.monotonic()
            wrong = self.eye.look()
            if not wrong:
                self.lags.append((asked - (self.ended or began), after))
                return
            status = ask(self.daemon, "status")
            slowest = max((self.pace(one["what"]) for one in status["contention"]), default=0.0)
            if asked - began > PATIENCE + slowest:
                raise LabError(f"not in force after {asked - began:.1f} s: {wrong}\nreasons: {status['reasons']}")

    @staticmethod
    def pace(words: str) -> float:
        found = re.search(r"at most every ([\d.]+) s", words)
        return float(found[1]) if found else 0.0

    def check(self) -> None:
        for family in FAMILIES:  # but for the jump that the configuration wants, and the chain that it makes for it
            mine, other = (foreign(_THE_JUMP.sub("", each.rules(family))) for each in (self.node, self.twin))
            assert mine == other, family
        log = self.daemon.log_text()
        assert "Traceback" not in log
        assert "A pass failed" not in log
        assert ask(self.daemon, "status")["state"] in {"enforcing", "degraded"}
        history = [event for event in ask(self.daemon, "history") if event["kind"] == "repair"]
        self.exposures += [event["exposed_ms"] for event in history if event["time"] not in self.seen]
        self.seen = {event["time"] for event in history}
        self.steps += 1
        if self.steps == WARM:
            self.base = self.size()
        elif self.steps > WARM:
            self.grown.append(tuple(now - then for now, then in zip(self.size(), self.base, strict=True)))
            assert self.grown[-1][1] <= 4, "file descriptors"
            assert self.grown[-1][0] < GROWTH_MAX, "memory"

    def size(self) -> tuple[int, int]:
        """Resident bytes, and open files."""
        pages = int(Path(f"/proc/{self.daemon.pid}/statm").read_text().split()[1])
        return pages * 4096, len(list(Path(f"/proc/{self.daemon.pid}/fd").iterdir()))


class Eye:
    """Asks tests/eye.py."""

    def __init__(self, daemon: Daemon) -> None:
        node = daemon.node
        self._process = node.popen(
            [node.python(), str(HERE / "eye.py"), str(daemon.config_directory), str(daemon.state_directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            log="eye",
        )

    def look(self) -> list[dict[str, Any]]:
        """What is wrong; asked again where others wrote too fast to be read."""
        assert self._process.stdin
        assert self._process.stdout
        for _ in range(100):
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
            if isinstance(answer, list):
                return answer
        raise LabError(f"nothing can be seen: {answer}")

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()


@contextmanager
def chaos(backend: BackendName, seed: int) -> Iterator[Chaos]:
    with Node(backend) as node, Node(backend) as twin:
        clock = node.directory / "clock"
        env = {"PYTHONPATH": str(HERE / "clock"), "NODEWALLD_TEST_CLOCK": str(clock)}
        with Daemon(node, COMMON, env=env) as daemon:
            daemon.wait_ready()
            eye = Eye(daemon)
            begin = [line for family in FAMILIES for line in filled(persistent(random.Random()), family)]
            for each in (node, twin):
                each.run("\n".join(begin))
            yield Chaos(node, twin, daemon, random.Random(f"{backend} {seed}"), clock, eye)
            eye.close()


@pytest.mark.parametrize("backend", ["nft", "legacy"])
@pytest.mark.timeout(7200)
def test_the_laws_hold_whatever_happens(laboratory: None, backend: BackendName, request: pytest.FixtureRequest) -> None:
    seconds = float(request.config.getoption("--chaos-seconds"))
    given = request.config.getoption("--chaos-seed")
    seed = int(given) if given is not None else random.SystemRandom().randrange(10**6)
    with chaos(backend, seed) as world:
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end:
                world.step()
        except Exception as error:
            told = "\n".join(world.log[-40:])
            events = "\n".join(event["message"] for event in ask(world.daemon, "history")[-15:])
            log = "\n".join(world.daemon.log_text().splitlines()[-30:])
            pytest.fail(f"--chaos-seed {seed} ({backend}), step {len(world.lags)}: {type(error).__name__}: {error}\n"
                        f"what happened:\n{told}\nhistory:\n{events}\nlog:\n{log}")  # fmt: skip
        lags = sorted(world.lags)
        print(
            f"\nchaos {backend}, seed {seed}: {len(lags)} steps; in force after "
            f"{lags[len(lags) // 2][0] * 1000:.0f} ms (median), {lags[-1][0] * 1000:.0f} ms (worst, {lags[-1][1]}); "
            f"exposures {statistics.median(world.exposures):.1f} ms (median), {max(world.exposures):.0f} ms (worst of "
            f"{len(world.exposures)}); grown by {max(world.grown, default=(0, 0))[0] >> 10} KiB at most"
        )
