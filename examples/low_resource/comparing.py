"""The fronts of several methods beside each other, on the half that judges, with standard errors.

A standard error joins two: that of the texts, by resampling them (all methods get the same samples, so that what a
sample makes easy for all of them cancels in a difference), and that of the searches' luck, from their spread over the
seeds, where there are several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from examples.low_resource.fronts import Measured, hypervolume, resampled, weights_of_texts
from examples.low_resource.halves import BITS, ENGLISH, TAMIL
from examples.low_resource.settings import SEARCH_BUDGETS, SEARCH_REFERENCE, SEARCH_RESAMPLES

RIVALS = ("task_arithmetic", "ties")
"""The recipes that all others are compared with."""


@dataclass(frozen=True)
class Judged:
    """A recipe of a front: the trial, its values, its scores on the half that chose it, and those of the other."""

    trial: int
    values: Mapping[str, Any]
    chosen: Mapping[str, float]
    judged: Mapping[str, Measured]


Fronts = Mapping[str, Sequence[Sequence[Judged]]]
"""By recipe, the front of each seed."""


def compared(fronts: Fronts) -> dict[str, Any]:
    """Hypervolumes and their differences, and the best English within budgets of Tamil, as JSON has them.

    Within a budget the recipe is chosen by the scores of the half that chooses, so its English accuracy is that of
    data that had no part in the choice.
    """
    first = next(iter(fronts.values()))[0][0].judged
    rng = np.random.default_rng(0)
    weights = {name: weights_of_texts(len(first[name].of), SEARCH_RESAMPLES, rng) for name in (BITS, ENGLISH)}
    scored = {
        method: [
            {name: resampled([each.judged[name] for each in front], weights[name]) for name in weights}
            for front in seeds
        ]
        for method, seeds in fronts.items()
    }
    areas = {
        method: np.stack([hypervolume(each[BITS], each[ENGLISH], SEARCH_REFERENCE) for each in seeds])
        for method, seeds in scored.items()
    }
    within = [_within(budget, fronts, scored) for budget in SEARCH_BUDGETS]
    return {
        "hypervolume": {
            method: {"of seeds": rounded(area[:, 0]), **_beside(method, areas)}
            for method, area in areas.items()
        },
        "budgets": [
            {"bits per byte": budget, **found} for budget, found in zip(SEARCH_BUDGETS, within, strict=True)
        ],
    }


def best_within(budget: float, front: Sequence[Mapping[str, float]]) -> int | None:
    """The number of the recipe with the best English among those within a budget of Tamil; None if none is."""
    within = [number for number, scores in enumerate(front) if scores[BITS] <= budget]
    return max(within, key=lambda number: front[number][ENGLISH], default=None)


def _within(
    budget: float, fronts: Fronts, scored: Mapping[str, Sequence[Mapping[str, np.ndarray]]]
) -> dict[str, Any]:
    """By method, the scores of the recipes chosen; without methods for which a seed has none."""
    english, others = {}, {}
    for method, seeds in fronts.items():
        best = [best_within(budget, [each.chosen for each in front]) for front in seeds]
        numbers = [number for number in best if number is not None]
        if len(numbers) == len(seeds):
            columns = list(zip(scored[method], numbers, strict=True))
            english[method] = np.stack([each[ENGLISH][:, number] for each, number in columns])
            picks = [front[number].judged for front, number in zip(seeds, numbers, strict=True)]
            others[method] = {
                name: rounded([np.mean([pick[name].value for pick in picks])]) for name in (BITS, TAMIL)
            }
    return {method: {ENGLISH: _beside(method, english), **others[method]} for method in english}


def _beside(method: str, found: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A number of one method, and how much it is above those of its rivals. ``found`` [seeds, 1 + draws]."""
    rivals = [rival for rival in RIVALS if rival != method and rival in found]
    return {
        "value": _with_error(found[method]),
        **{f"minus {rival}": _with_error(found[method] - found[rival]) for rival in rivals},
    }


def _with_error(found: np.ndarray) -> list[float]:
    """The mean over the seeds and its standard error, of [seeds, 1 + draws], the texts as they are first."""
    texts = found[:, 1:].mean(0).std()
    luck = found[:, 0].std(ddof=1) / np.sqrt(len(found)) if len(found) > 1 else 0.0
    return rounded([found[:, 0].mean(), np.hypot(texts, luck)])


def rounded(values: Any) -> list[float]:
    """As results keep them."""
    return [round(float(value), 5) for value in values]
