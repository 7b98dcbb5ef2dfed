"""What nodewalld costs the processor: for others' transactions, for a sync of kube-proxy's, for a look, for nothing.

Law: processor time is the kernel's own account of it: of the daemon's threads and the programs it started, or of the
program that is the reference.
"""

import time

from bench.figures import median
from bench.results import Outcome, Result, Scale, compared
from bench.stage import Stage, configuration, cpu_ms, inside
from lab.daemon import Daemon

_PAUSE = 0.005  # seconds between two transactions: each one wakes the daemon
_SETTLED = 0.5  # seconds after which everything that was to be done is done


def transaction(stage: Stage, scale: Scale) -> Outcome:
    """A foreign transaction that does not concern us, with many foreign rules."""
    node = stage.crowded(scale.crowd)
    with stage.daemon(node, configuration()) as daemon:
        ours = _per_transaction(daemon, scale.events)
    listed = inside(node, "programs", argv=["iptables-nft", "-S", "FORWARD"], stdin="", times=scale.events)["cpu"]
    what = f"CPU per foreign transaction that does not concern us, {scale.crowd:,} foreign rules"
    of = "iptables-nft -S FORWARD once"
    result = compared(
        "transaction", what, ours, sum(listed) / len(listed), unit="ms CPU", limit=0.3, of=of, events=scale.events
    )
    return Outcome([result])


def syncing(stage: Stage, scale: Scale) -> Outcome:
    """A sync as kube-proxy makes it: every rule written anew, in one transaction."""
    node = stage.crowded(scale.crowd)
    argv = ["iptables-nft-restore", "--noflush"]
    with stage.daemon(node, configuration()) as daemon:
        time.sleep(_SETTLED)
        before = cpu_ms(daemon.pid)
        told = inside(node, "programs", argv=argv, stdin="/run/crowd", times=scale.slow_runs)
        time.sleep(_SETTLED)
        ours = cpu_ms(daemon.pid) - before
    what = f"CPU during a kube-proxy-like sync of {scale.crowd:,} rules"
    result = compared(
        "sync",
        what,
        ours / scale.slow_runs,
        sum(told["cpu"]) / scale.slow_runs,
        unit="ms CPU",
        limit=0.01,
        of="the CPU of the sync itself",
        events=scale.slow_runs,
        goal="at most 1 %",
        more={"seconds of one sync": median(told["ms"]) / 1000},
    )
    return Outcome([result])


def check(stage: Stage, scale: Scale) -> Outcome:
    """A full check that finds nothing to do, with many foreign rules and with none."""
    crowded, alone = (_per_check(stage, rules, scale.seconds) for rules in (scale.crowd, 0))
    what = f"a no-change check at {scale.crowd:,} foreign rules"
    events = int(scale.seconds)
    result = compared(
        "check", what, crowded, alone, unit="ms CPU", limit=1.5, of="the same at 0", events=events, goal="at most 1.5"
    )
    return Outcome([result])


def idle(stage: Stage, scale: Scale) -> Outcome:
    """Silence."""
    with stage.daemon(stage.crowded(0), configuration(resync="30s")) as daemon:
        time.sleep(_SETTLED)
        share = 100 * _spent(daemon, scale.idle) / (scale.idle * 1000)
    what = f"idle CPU over {scale.idle:g} seconds, resync 30 s"
    return Outcome([Result("idle", what, share, "% of a core", "at most 0.1 %", share, 0.1, events=1)])


def growth(stage: Stage, scale: Scale) -> Outcome:
    """For the picture: both with the number of foreign rules, beside a program that reads them all."""
    checks, transactions, saves = [], [], []
    for rules in scale.growth:
        checks.append((rules, _per_check(stage, rules, scale.seconds / 2)))
        node = stage.crowded(rules)
        with stage.daemon(node, configuration()) as daemon:
            transactions.append((rules, _per_transaction(daemon, scale.events)))
        argv = ["iptables-nft-save", "-t", "mangle"]
        saves.append((rules, median(inside(node, "programs", argv=argv, stdin="", times=scale.slow_runs)["cpu"])))
    names = ("CPU of a full check", "CPU per foreign transaction", "CPU of iptables-nft-save -t mangle")
    return Outcome([], growth=dict(zip(names, (checks, transactions, saves), strict=True)))


def _per_transaction(daemon: Daemon, events: int) -> float:
    daemon.node.run("iptables-nft -t nat -N BENCH-NOISE", check=False)  # it is there already in a node that is kept
    time.sleep(_SETTLED)
    before = cpu_ms(daemon.pid)
    inside(daemon.node, "noise", transactions=events, pause=_PAUSE)
    time.sleep(_SETTLED)
    return (cpu_ms(daemon.pid) - before) / events


def _per_check(stage: Stage, rules: int, seconds: float) -> float:
    """Processor milliseconds of one check: a daemon that checks each second, watched for a while."""
    with stage.daemon(stage.crowded(rules), configuration(resync="1s")) as daemon:
        time.sleep(_SETTLED)
        return _spent(daemon, seconds) / seconds


def _spent(daemon: Daemon, seconds: float) -> float:
    before = cpu_ms(daemon.pid)
    time.sleep(seconds)
    return cpu_ms(daemon.pid) - before
