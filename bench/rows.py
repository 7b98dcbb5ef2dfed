"""The rows of the bench by name, in the order in which they are measured."""

from collections.abc import Callable

from bench import beside, cost, endurance, exposure, lean, repair, shield
from bench.results import Outcome, Scale
from bench.stage import Stage

Row = Callable[[Stage, Scale], Outcome]

ROWS: dict[str, Row] = {
    "hot": repair.hot,
    "hot-crowded": repair.hot_crowded,
    "hot-open": repair.hot_open,
    "legacy": repair.legacy,
    "exposure": exposure.exposure,
    "transaction": cost.transaction,
    "sync": cost.syncing,
    "check": cost.check,
    "idle": cost.idle,
    "shield": shield.cost,
    "memory": lean.memory,
    "start": lean.start,
    "reload": lean.reload,
    "beside": beside.beside,
    "repair-growth": repair.growth,
    "cost-growth": cost.growth,
}
"""What `make bench` measures."""

LONG: dict[str, Row] = {"endurance": endurance.endurance}
"""What `make bench-long` measures."""
