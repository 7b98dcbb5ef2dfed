"""What gets through: a constant flood while the jump that stops it is displaced by single commands.

Law: the same flood and the same timetable for every guard. Between two bursts the guard is started anew (see `repair`);
only what was sent during bursts counts.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from bench.results import Outcome, Result, Scale, compared
from bench.stage import PORT, Stage, configuration, inside
from lab.flood import Flood
from lab.layout import BEYOND, STRANGER
from lab.node import Node
from lab.processes import kill_entered

Guard = Callable[[], AbstractContextManager[None]]

RATE = 10_000
_INTERVAL = 0.1  # seconds between two displacements
_BURST = 50  # displacements

# A polling guard, as people write it: it takes a rule that is there for a rule that is in its place.
_ASKS = "iptables-nft -C FORWARD -j GUARD 2>&- || iptables-nft -I FORWARD -j GUARD"
# And one that knows better.
_MOVES = "iptables-nft -D FORWARD -j GUARD 2>&-; iptables-nft -I FORWARD -j GUARD"


def exposure(stage: Stage, scale: Scale) -> Outcome:
    """Nodewalld, a guard that asks each second whether its rule is there, and one that moves it up each second."""
    node = stage.crowded(0)
    ours = _share(node, scale.events, lambda: _nodewalld(stage, node))
    asks = _share(node, scale.events, lambda: _polling(node, _ASKS))
    moves = _share(node, scale.events, lambda: _polling(node, _MOVES))
    what = f"exposure: share of {RATE:,} packets a second that pass while the jump is displaced {scale.events} times"
    return Outcome(
        [
            _result(what, ours, asks, "`iptables -C` or `-I` each second"),
            _result("the same beside a better guard", ours, moves, "`iptables -D` and `-I` each second"),
        ]
    )


def _result(what: str, ours: tuple[int, int, int], theirs: tuple[int, int, int], of: str) -> Result:
    def percent(counts: tuple[int, int, int]) -> float:
        return 100 * counts[1] / counts[0]

    more = {"packets": ours[0], "passed": ours[1], "reference packets": theirs[0], "reference passed": theirs[1]}
    return compared(
        "exposure",
        what,
        percent(ours),
        percent(theirs),
        unit="%",
        limit=0.01,
        of=of,
        events=ours[2],
        goal="at most 1/100",
        more=more,
    )


def _share(node: Node, events: int, guard: Guard) -> tuple[int, int, int]:
    """Packets sent, packets that passed, and displacements."""
    sent = passed = 0
    for number in range(math.ceil(events / _BURST)):
        burst = min(_BURST, events - number * _BURST)
        to = (BEYOND.ipv4, PORT)
        with guard(), Flood(node, "client", to=to, source=STRANGER.ipv4, sinks=("beyond",), rate=RATE) as flood:
            told = inside(node, "displacements", events=burst, interval=_INTERVAL)
            report = flood.stop()
            sent += len(report.sent_between(told["begun"], told["ended"]))
            passed += len(report.passed_between(told["begun"], told["ended"]))
    return sent, passed, events


@contextmanager
def _nodewalld(stage: Stage, node: Node) -> Iterator[None]:
    with stage.daemon(node, configuration()):
        yield


@contextmanager
def _polling(node: Node, command: str) -> Iterator[None]:
    rule = f"-p udp --dport {PORT} -j DROP"
    node.run(f"iptables-nft -N GUARD; iptables-nft -A GUARD {rule}; iptables-nft -I FORWARD -j GUARD")
    guard = node.popen(["sh", "-c", f"while sleep 1; do {command}; done"])
    try:
        yield
    finally:
        kill_entered(guard)
        guard.wait()
        node.run("iptables-nft -F FORWARD; iptables-nft -F GUARD; iptables-nft -X GUARD", check=False)
