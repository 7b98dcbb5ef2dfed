"""How soon our jump is right again, beside the iptables tool that moves a jump once.

Law: disturbances come in bursts shorter than what nodewalld calls a war (there it slows down, as it should). Between
two bursts the daemon is started anew, and as many references are taken, so that both see the same machine.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from bench.figures import median, percentile
from bench.results import Outcome, Result, Scale, compared
from bench.stage import Stage, configuration, inside
from lab.node import BackendName, Node

_BURST = 6.0  # seconds; nodewalld's pacing speaks of contention from the eighth second on
_RESTORE = {"nft": "iptables-nft-restore", "legacy": "iptables-legacy-restore"}


def hot(stage: Stage, scale: Scale) -> Outcome:
    """Nft, no foreign rules, by `iptables-nft -I`."""
    ours, theirs = _nft(stage, 0, "tool", scale.events)
    what = "nft: foreign commit -> our jump right again, 0 foreign rules"
    return Outcome(
        [
            _median("hot", f"{what}, median", ours, theirs, 0.05),
            _worst("hot", f"{what}, p99", ours, theirs, 2.5),
        ],
        {"nodewalld, 0 foreign rules": ours, "iptables-nft-restore, 0": theirs},
    )


def hot_crowded(stage: Stage, scale: Scale) -> Outcome:
    """The same with foreign rules in nat."""
    ours, theirs = _nft(stage, scale.crowd, "tool", scale.events)
    what = f"the same, {scale.crowd:,} foreign rules in nat, median"
    return Outcome(
        [_median("hot-crowded", what, ours, theirs, 0.3)],
        {f"nodewalld, {scale.crowd:,} foreign rules": ours, f"iptables-nft-restore, {scale.crowd:,}": theirs},
    )


def hot_open(stage: Stage, scale: Scale) -> Outcome:
    """The same by a writer that keeps its socket open, with and without foreign rules."""
    results = []
    for rules in (0, scale.crowd):
        commits: list[float] = []
        ours, theirs = _nft(stage, rules, "open", scale.events, commits)
        what = f"the same, writer keeps its socket open, {rules:,} foreign rules, p99"
        result = _worst("hot-open", what, ours, theirs, 0.1)
        alone = {"one foreign commit, median": median(commits), "one foreign commit, p99": percentile(commits, 99)}
        results.append(replace(result, more={**result.more, **alone}))
    return Outcome(results)


def legacy(stage: Stage, scale: Scale) -> Outcome:
    """Legacy, from the writing tool's exit."""
    with Node("legacy") as node:
        ours, theirs = _bursts(
            stage, node, scale.events, lambda left: inside(node, "legacy", events=left, seconds=_BURST)
        )
    what = "legacy: the writing tool's exit -> right again (filter), median"
    return Outcome([_median("legacy", what, ours, theirs, 4.0)], {"nodewalld, legacy": ours})


def growth(stage: Stage, scale: Scale) -> Outcome:
    """For the picture: how both grow with the number of foreign rules."""
    ours, theirs = [], []
    for rules in scale.growth:
        some, others = _nft(stage, rules, "tool", max(3, scale.events // 4))
        ours.append((rules, median(some)))
        theirs.append((rules, median(others)))
    return Outcome([], growth={"repair by nodewalld": ours, "iptables-nft-restore, one jump": theirs})


def _nft(
    stage: Stage, rules: int, writer: str, events: int, commits: list[float] | None = None
) -> tuple[list[float], list[float]]:
    """Milliseconds of repairs, and of as many references; those of the foreign commits alone are added to `commits`."""
    node = stage.crowded(rules)

    def burst(left: int) -> dict[str, list[float]]:
        told = inside(node, "repairs", writer=writer, events=left, seconds=_BURST)
        if commits is not None:
            commits.extend(told["commits"])
        return told

    return _bursts(stage, node, events, burst)


def _bursts(
    stage: Stage, node: Node, events: int, burst: Callable[[int], dict[str, list[float]]]
) -> tuple[list[float], list[float]]:
    """Milliseconds of repairs, and of as many references."""
    ours: list[float] = []
    theirs: list[float] = []
    backend: BackendName = node.backend
    while len(ours) < events:
        with stage.daemon(node, configuration(backend)):
            ours += burst(events - len(ours))["ms"]
        theirs += inside(node, "restores", tool=_RESTORE[backend], events=len(ours) - len(theirs))["ms"]
    return ours, theirs


def _median(row: str, what: str, ours: Sequence[float], theirs: Sequence[float], limit: float) -> Result:
    return _compared(row, what, median(ours), ours, theirs, limit)


def _worst(row: str, what: str, ours: Sequence[float], theirs: Sequence[float], limit: float) -> Result:
    return _compared(row, what, percentile(ours, 99), ours, theirs, limit)


def _compared(
    row: str, what: str, figure: float, ours: Sequence[float], theirs: Sequence[float], limit: float
) -> Result:
    of = "one iptables-legacy-restore" if row == "legacy" else "one iptables-nft-restore that moves a jump"
    more = {"median": median(ours), "p99": percentile(ours, 99), "reference p99": percentile(theirs, 99)}
    return compared(row, what, figure, median(theirs), unit="ms", limit=limit, of=of, events=len(ours), more=more)
