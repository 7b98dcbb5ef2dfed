"""Numbers out of samples: medians, percentiles, straight lines.

Law: nothing is left out of a sample, however far it lies from the others.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


def percentile(sample: Sequence[float], percent: float) -> float:
    """The smallest value that at least so many percent of the sample do not exceed."""
    if not sample:
        raise ValueError("an empty sample has no percentile")
    rank = math.ceil(percent / 100 * len(sample))
    return sorted(sample)[max(rank, 1) - 1]


def median(sample: Sequence[float]) -> float:
    """The value in the middle."""
    return percentile(sample, 50)


@dataclass(frozen=True, slots=True)
class Line:
    """The straight line that fits best (least squares), and the standard error of its slope."""

    start: float
    slope: float
    error: float

    def rises(self, span: float, *, unseen: float) -> bool:
        """Whether it rises: beyond chance (three standard errors), and over `span` by more than `unseen`."""
        return self.slope > 3 * self.error and self.slope * span > unseen


def fitted(points: Sequence[tuple[float, float]]) -> Line:
    """Fit a line to three or more points of different x."""
    count = len(points)
    if count < 3:
        raise ValueError("a line with an error needs three points")
    mean_x = sum(x for x, _ in points) / count
    mean_y = sum(y for _, y in points) / count
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    start = mean_y - slope * mean_x
    rest = sum((y - start - slope * x) ** 2 for x, y in points)
    return Line(start, slope, math.sqrt(rest / (count - 2) / spread))
