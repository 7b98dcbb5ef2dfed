"""A busy writer beside us: what our looks and our writes cost him.

Law: with and without us in turn, and each time somebody displaces the same jump, so that we have to write.
"""

import json
import subprocess

from bench.crowd import sync
from bench.figures import median
from bench.results import Outcome, Scale, compared
from bench.stage import Stage, configuration, inside, write
from lab.node import Node
from lab.waiting import LabError

_INTERVAL = 1.0  # seconds between two displacements


def beside(stage: Stage, scale: Scale) -> Outcome:
    """A writer of many rules in nat, as kube-proxy writes them."""
    with_us: list[float] = []
    without: list[float] = []
    with Node("nft") as node:
        write(node, "sync", sync(scale.sync))
        _sync(node)  # the first makes the chains, later ones fill them anew
        for _ in range(scale.slow_runs):
            without.append(_sync(node))
            with stage.daemon(node, configuration()):
                with_us.append(_sync(node))
    what = f"a writer of {scale.sync:,} rules in nat beside us, our writes included, median"
    of = "the same without us"
    result = compared(
        "beside", what, median(with_us), median(without), unit="ms", limit=1.1, of=of, events=len(with_us)
    )
    return Outcome([result])


def _sync(node: Node) -> float:
    """Milliseconds of one sync, while somebody displaces the top of FORWARD now and then."""
    argv = [node.python(), "-m", "bench.inside", "vandal", json.dumps({"interval": _INTERVAL})]
    vandal = node.popen(argv, log="vandal", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        argv = ["iptables-nft-restore", "--noflush"]
        took: float = inside(node, "programs", argv=argv, stdin="/run/sync", times=1)["ms"][0]
    finally:
        vandal.communicate("stop\n", timeout=30)
    if vandal.returncode:
        raise LabError("the vandal has died:\n" + node.logs["vandal"].read_text())
    return took
