"""From the rows of all seeds to means, spreads, and differences within a seed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Rows = Sequence[Mapping[str, Any]]
"""The rows of one seed, see ``measure``."""
TAMIL, ENGLISH = ("tamil edge", "tamil cloze"), ("english edge", "english cloze")
BPB = "tamil bits per byte"
LOST = "lost share"
MEASURES = (*TAMIL, *ENGLISH, BPB)


class Spread(NamedTuple):
    """Mean and sample standard deviation over the seeds."""

    mean: float
    sd: float


class Difference(NamedTuple):
    """A mean difference within a seed, its t value (n - 1 degrees of freedom), and in how many seeds it is above 0."""

    mean: float
    t: float
    above: int
    seeds: int


def value(rows: Rows, method: str, ct_steps: int | None, measure: str) -> float:
    """One number of one seed. ``lost share`` is of SFT's kept entries."""
    row = next(r for r in rows if (r["method"], r["ct_steps"]) == (method, ct_steps))
    if measure == LOST:
        return float(row["counts"]["lost"] / row["counts"]["kept"])
    return float(row["scores"][measure])


def spread(seeds: Sequence[Rows], method: str, ct_steps: int | None, measure: str) -> Spread:
    """A number over all seeds."""
    values = [value(rows, method, ct_steps, measure) for rows in seeds]
    return Spread(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0)


def difference(
    seeds: Sequence[Rows], one: tuple[str, int | None], other: tuple[str, int | None], measure: str
) -> Difference:
    """``one`` minus ``other``, each a method and a CT budget, seed by seed."""
    found = [value(rows, *one, measure) - value(rows, *other, measure) for rows in seeds]
    mean = statistics.mean(found)
    error = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else 0.0
    return Difference(mean, mean / error if error else float("inf"), sum(x > 0 for x in found), len(found))
