"""Medians, and the straight line through times: seconds = start + bytes / rate."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from merge_engine.bench.measuring import Measurement


@dataclass(frozen=True)
class Line:
    """The least-squares line: seconds at no bytes, bytes per second, and R squared (1 is a perfect fit)."""

    start: float
    rate: float
    r_squared: float


def median_seconds(runs: Sequence[Measurement]) -> float:
    """The median time of runs."""
    return statistics.median(run.seconds for run in runs)


def fit_line(points: Sequence[tuple[float, float]]) -> Line | None:
    """The line through (bytes, seconds). None with fewer than three different byte counts, or if it falls."""
    if len({nbytes for nbytes, _ in points}) < 3:
        return None
    xs, ys = zip(*points, strict=True)
    slope, start = statistics.linear_regression(xs, ys)
    if slope <= 0:
        return None
    return Line(start, 1 / slope, statistics.correlation(xs, ys) ** 2)
