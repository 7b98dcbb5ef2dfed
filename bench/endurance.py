"""A hundred thousand foreign transactions as fast as they go: does anything grow?

Law: a line is fitted over the last 90 %, and it must not rise. What has a bound (the history, caches) is filled before,
by the same again and again.
"""

from bench.figures import Line, fitted, median
from bench.results import Outcome, Result, Scale
from bench.stage import Stage, configuration, inner_number, inside

_PROBES = 400
_BEFORE = 8  # rounds, after which 3,200 repairs have been told
_UNSEEN = {"memory": 128.0, "descriptors": 0.5, "latency": 0.1}
"""What may be added over the whole run without being called growth: KiB, a number, and a share of the median."""


def endurance(stage: Stage, scale: Scale) -> Outcome:
    """Memory, file descriptors and latency over the last 90 %."""
    node, count = stage.crowded(0), scale.transactions
    node.run("iptables-nft -t nat -N BENCH-NOISE", check=False)
    with stage.daemon(node, configuration()) as daemon:
        every = max(1, count // _PROBES)
        for _ in range(_BEFORE + 1):
            told = inside(node, "endure", transactions=count, probe_every=every, pid=inner_number(daemon.pid))
    probes = [probe for probe in told["probes"] if probe[0] >= count / 10]
    results = []
    for name, unit, column in (("memory", "KiB", 2), ("descriptors", "descriptors", 3), ("latency", "ms", 1)):
        line = fitted([(probe[0], probe[column]) for probe in probes])
        middle = median([probe[column] for probe in probes])
        unseen = _UNSEEN[name] * (middle if name == "latency" else 1.0)
        results.append(_result(name, unit, line, middle, count, unseen))
    return Outcome(results)


def _result(name: str, unit: str, line: Line, middle: float, count: int, unseen: float) -> Result:
    span = count * 0.9
    grown, error = line.slope * span, line.error * span
    what = f"{count:,} foreign transactions: growth of {name} over the last 90 %"
    measured = 1.0 if line.rises(span, unseen=unseen) else 0.0
    more = {"standard error": error, "median": middle}
    return Result("endurance", what, grown, unit, "no slope", measured, 0.0, events=count, more=more)
