"""Values of parameters and scores: as text, in order, on a scale."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence

from merge_engine.text import cut

_WIDEST = 50.0
"""Numbers of which the largest is so many times the smallest are drawn on a logarithmic scale."""


def text_of(value: object) -> str:
    """A value of an axis or a parameter as people write it: names without quotes."""
    if isinstance(value, str):
        return value
    return cut(json.dumps(value, ensure_ascii=False, default=str), 100)


def in_order(values: Iterable[object]) -> list[object]:
    """Each value once: by size if all are numbers, else as they come."""
    distinct = list({text_of(value): value for value in values}.values())
    numbers = numbers_of(distinct)
    if numbers is None:
        return distinct
    return [value for _, value in sorted(zip(numbers, distinct, strict=True), key=lambda pair: pair[0])]


def numbers_of(values: Sequence[object]) -> list[float] | None:
    """The values as numbers; None if one has no place on a scale. True and False are names."""
    numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    return numbers if len(numbers) == len(values) and all(map(math.isfinite, numbers)) else None


def is_logarithmic(numbers: Sequence[float]) -> bool:
    """Whether the numbers belong on a logarithmic scale."""
    return min(numbers) > 0 and max(numbers) >= _WIDEST * min(numbers)


def score_text(value: float | None, error: float | None) -> str:
    """A score for people, with its standard error if it has one: the error's first two digits say how many count."""
    if value is None:
        return "–"
    if not error or not math.isfinite(error) or error < 0:
        return f"{value:.5g}"
    digits = min(max(0, 1 - math.floor(math.log10(error))), 12)
    return f"{value:.{digits}f} ± {error:.{digits}f}"
