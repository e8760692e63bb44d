"""Methods that choose positions by a score of all inputs: what is chosen is chosen for all models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from merge_engine.backends.operations import (
    NOTHING,
    Band,
    Consensus,
    Dense,
    Divergence,
    Entry,
    Mask,
    Scored,
    TopShare,
    Variance,
    key_dtype,
)
from merge_engine.methods.base import Answers, Method
from merge_engine.methods.needs import KeyRanks, MaskedSquares, Need, Together, mask_needs
from merge_engine.methods.rounding import key_of, magnitude_of, rounded
from merge_engine.methods.task import Task
from merge_engine.recipe import parameter

NEGLIGIBLE_SQUARE = 1e-6
"""mergekit weighs all models alike if the mean squares of their task vectors sum to less."""

SHARED_POSITION = -1
"""The recipe position whose draws decide the ties of what all models share."""


class Sce(Method):
    """Select, calculate, erase: a weighted mean of the elements in which models differ most, without minority signs.

    Of the positions whose task vectors are not all equal, the share ``select_topk`` with the largest variance is
    selected. A model's weight is its share of the squared norms of what was selected. Models then elect signs as in
    TIES, without their weights. FuseChat (Wan et al., 2024, arXiv 2408.07990).
    """

    name = "sce"
    elects = True

    @dataclass(frozen=True)
    class Common:
        """Parameters of all models together."""

        select_topk: float = parameter(1.0, minimum=0, maximum=1)
        ties: Literal["spread", "index", "all"] = parameter("spread", constant=True)

    def needs(self, task: Task) -> Sequence[Need]:
        """The variances at the last rank that is selected, and the squares of what is selected."""
        mask = _selected(task)
        squares = [MaskedSquares(model, mask) for model in task.models]
        return [*mask_needs(task.models[0], mask), *squares]

    def solve(self, task: Task, answers: Answers) -> Consensus:
        """A consensus in which all models have one mask."""
        mask = _selected(task)
        squares = [answers[MaskedSquares(model, mask)][1] for model in task.models]
        weights = _weights_as_mergekit(squares, task) if task.storage_rounding else _weights(squares)
        return Consensus(
            tuple(Entry(mask, weight) for weight in weights),
            election="deltas",
            normalize=True,
            storage_rounding=task.storage_rounding,
        )

    def scratch_bytes(self, models: int) -> int:
        """A device holds the scores, zeros to compare them with, and a bit for each."""
        return 17


def _selected(task: Task) -> Mask:
    share = task.common.select_topk
    if share >= 1:
        return Dense()
    if share <= 0:
        return NOTHING
    ties, single = task.common.ties, task.storage_rounding
    random_key = task.random_key(SHARED_POSITION) if ties == "spread" else 0
    return Scored(Variance(task.storage_rounding), TopShare(share, single, ties, random_key))


def _weights(squares: Sequence[float]) -> list[float]:
    total = sum(squares)
    return [square / total for square in squares] if total else [1.0 / len(squares)] * len(squares)


def _weights_as_mergekit(squares: Sequence[float], task: Task) -> list[float]:
    """Of mean squares, rounded as mergekit does."""

    def rn(value: float) -> float:
        return rounded(value, task.working)

    means = [rn(square / task.count) for square in squares]
    total = 0.0
    for mean in means:
        total = rounded(total + mean, key_dtype(Variance(), task.working))
    total = rn(total)
    if abs(total) < NEGLIGIBLE_SQUARE:
        return [rn(1.0 / len(squares))] * len(squares)
    return [rn(mean / total) for mean in means]


class ArceeFusion(Method):
    """Takes the entries of a task vector whose importance stands out: |d| times the divergence of their line.

    Those at or above median + 1.5 * (third - first quartile) of the importance stay. Arcee Fusion (Arcee AI, 2025).
    """

    name = "arcee_fusion"
    max_models = 1
    if_lacking = "lone"

    def needs(self, task: Task) -> Sequence[Need]:
        """The quartiles of the importance, and whole lines."""
        if not task.count:
            return ()
        score = _importance(task)
        return [KeyRanks(score, _quartiles(task)), Together(score.length)]

    def solve(self, task: Task, answers: Answers) -> Consensus:
        """A consensus of one model with the importance as its mask."""
        mask: Mask = Dense()
        if task.count:
            score, ranks = _importance(task), _quartiles(task)
            real = key_dtype(score, task.working)
            found = answers[KeyRanks(score, ranks)]
            third, median, first = (magnitude_of(found[rank].key, real) for rank in ranks)
            spread = rounded(1.5 * rounded(third - first, real), real)
            threshold = rounded(median + spread, real)
            if threshold != threshold:
                mask = NOTHING
            elif threshold > 0:
                mask = Scored(score, Band(key_of(threshold, real)))
        return Consensus(
            (Entry(mask, 1.0),), storage_rounding=task.storage_rounding, wide=task.storage_rounding
        )

    def scratch_bytes(self, models: int) -> int:
        """A device holds the scores, zeros to compare them with, and a bit for each."""
        return 17


def _importance(task: Task) -> Divergence:
    return Divergence(task.shape[-1] if task.shape else 1)


def _quartiles(task: Task) -> tuple[int, int, int]:
    """The ranks of the third quartile, the median and the first, from the largest."""
    last = task.count - 1
    return task.count - 3 * last // 4, task.count - last // 2, task.count - last // 4
