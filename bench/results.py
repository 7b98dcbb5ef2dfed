"""What a row of the bench yields, and how much is measured for it.

Law: a result bears its goal, so that whoever reads it sees at once whether it is met.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured: `events` for medians, `runs` of what takes a second, `crowd` foreign rules for "many"."""

    events: int = 200
    runs: int = 15
    slow_runs: int = 5  # of what takes ten seconds and more
    crowd: int = 100_000
    sync: int = 60_000  # rules that the writer beside us writes
    set_size: int = 65_536
    seconds: float = 20.0  # of watching
    idle: float = 300.0
    transactions: int = 100_000
    growth: tuple[int, ...] = (0, 1_000, 10_000, 100_000)


FULL = Scale()
QUICK = Scale(
    events=20,
    runs=3,
    slow_runs=1,
    crowd=5_000,
    sync=5_000,
    set_size=4_096,
    seconds=4.0,
    idle=10.0,
    transactions=5_000,
    growth=(0, 1_000, 5_000),
)
TINY = Scale(
    events=3,
    runs=1,
    slow_runs=1,
    crowd=100,
    sync=100,
    set_size=256,
    seconds=1.0,
    idle=0.5,
    transactions=300,
    growth=(0, 100),
)
SCALES = {"full": FULL, "quick": QUICK, "tiny": TINY}


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the table: a figure, its reference, and the goal for their ratio (or for the figure itself).

    `measured` is what is compared with `limit`; `unit` is that of figure and reference. `more` tells further figures.
    """

    row: str
    what: str
    figure: float
    unit: str
    goal: str
    measured: float
    limit: float
    reference: float | None = None
    reference_what: str = ""
    events: int = 0
    more: Mapping[str, float] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        """Whether the goal is reached."""
        return self.measured <= self.limit


@dataclass(frozen=True, slots=True)
class Outcome:
    """All of a row: its results, and what the picture is drawn of."""

    results: Sequence[Result]
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)
    growth: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)


def compared(
    row: str,
    what: str,
    figure: float,
    reference: float,
    *,
    unit: str,
    limit: float,
    of: str,
    events: int,
    goal: str = "",
    more: Mapping[str, float] | None = None,
) -> Result:
    """A figure whose goal is a ratio to its reference."""
    ratio = figure / reference if reference else float("inf")
    words = goal or f"at most {limit:g} x"
    return Result(row, what, figure, unit, words, ratio, limit, reference, of, events, more or {})
