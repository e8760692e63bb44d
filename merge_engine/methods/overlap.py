"""Methods that compare the inputs element by element.

They look at how near a model is to the base, and at how many models changed an element.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from merge_engine.backends.operations import Band, Consensus, Entry, Nearswap, Overlap
from merge_engine.dtypes import F32
from merge_engine.methods.base import Answers, Method
from merge_engine.methods.needs import Need, Overlaps
from merge_engine.methods.rounding import key_of, magnitude_of, rounded
from merge_engine.methods.task import Task
from merge_engine.recipe import parameter


class NearSwap(Method):
    """Takes the model where it is nearer than ``t`` to the base; farther off, less and less of it.

    "NearSwap" (alchemonaut, 2024).
    """

    name = "nearswap"
    max_models = 1

    @dataclass(frozen=True)
    class Common:
        """Parameters of all models together."""

        t: float = parameter(minimum=0)

    def solve(self, task: Task, answers: Answers) -> Nearswap:
        """The threshold."""
        return Nearswap(task.common.t, task.storage_rounding)


class Ram(Method):
    """Adds what one model alone changed, and the mean of what several did: |d| > ``epsilon`` counts as a change.

    Reinforced Agent Merging (arXiv 2601.13572).
    """

    name = "ram"

    @dataclass(frozen=True)
    class Common:
        """Parameters of all models together."""

        epsilon: float = parameter(1e-5, minimum=0)

    def solve(self, task: Task, answers: Answers) -> Consensus:
        """A consensus by overlap in which what one model alone changed counts as it is."""
        mask = _changed(task)
        return Consensus(
            tuple(Entry(mask, 1.0) for _ in task.models),
            election="overlap",
            storage_rounding=task.storage_rounding,
        )


class RamPlus(Ram):
    """RAM in which what a model alone changed counts more, the more of its other changes it shares.

    Its factor is 1 + ``r`` * the ratio of shared to unique changes, which counts no more than ``alpha``. The ratio is
    that of a tensor ("RAM+, tensor-local", arXiv 2601.13572).
    """

    name = "ramplus_tl"

    @dataclass(frozen=True)
    class Common(Ram.Common):
        """Parameters of all models together."""

        r: float = parameter(0.1)
        alpha: float = parameter(0.2, minimum=0)

    def needs(self, task: Task) -> Sequence[Need]:
        """The changes of each model that are its own, and those that it shares."""
        return [Overlaps((_changed(task),) * len(task.models))]

    def solve(self, task: Task, answers: Answers) -> Consensus:
        """A consensus by overlap with a factor for each model. mergekit does not round what it adds up."""
        (need,) = self.needs(task)
        factor = _factor_as_mergekit if task.storage_rounding else _factor
        return Consensus(
            tuple(Entry(_changed(task), factor(overlap, task.common)) for overlap in answers[need]),
            election="overlap",
            storage_rounding=task.storage_rounding,
            wide=task.storage_rounding,
        )


def _changed(task: Task) -> Band:
    """The entries whose magnitude is above epsilon, both in the working dtype; zeros never."""
    epsilon = task.common.epsilon
    key = key_of(epsilon, task.working)
    above = not task.storage_rounding and magnitude_of(key, task.working) > epsilon
    return Band(key if above else key + 1)


def _factor(overlap: Overlap, common: RamPlus.Common) -> float:
    """In float64. Where nothing is unique, any shared change makes the ratio as large as it may be."""
    most = common.alpha if overlap.shared else 0.0
    ratio = min(overlap.shared / overlap.unique, most) if overlap.unique else most
    return 1.0 + common.r * ratio


def _factor_as_mergekit(overlap: Overlap, common: RamPlus.Common) -> float:
    """In float32, every step rounded."""

    def rn(value: float) -> float:
        return rounded(value, F32)

    unique = max(rn(overlap.unique), rn(common.epsilon))
    ratio = rn(rn(overlap.shared) / unique) if unique else (float("inf") if overlap.shared else 0.0)
    return rn(1.0 + rn(rn(common.r) * min(ratio, rn(common.alpha))))
