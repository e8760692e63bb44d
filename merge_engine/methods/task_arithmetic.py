"""Task arithmetic and its relatives: a base plus combined task vectors.

One formula, eight methods. They differ in three things: the entries of a task vector that are kept (``sparsify``),
whether models elect a sign for every element, and their defaults. Names, parameters and defaults are mergekit's;
ties, scope and slacks are ours.

- task_arithmetic: Ilharco et al., ICLR 2023
- ties: Yadav et al., NeurIPS 2023; the slacks are after Tao et al., Findings of EMNLP 2024
- dare_linear, dare_ties: Yu et al., ICML 2024
- breadcrumbs, breadcrumbs_ties: Davari and Belilovsky, ECCV 2024
- della, della_linear: Deep et al., 2024
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache

from merge_engine.backends.operations import Consensus, Dense, Entry, Line, Mask, Ranked
from merge_engine.dtypes import DType
from merge_engine.methods.base import Answers, Method
from merge_engine.methods.needs import MaskedL1, Need, Together, mask_needs
from merge_engine.methods.rounding import rounded, weight_sum
from merge_engine.methods.sparsify import (
    Bernoulli,
    Common,
    Everything,
    Magnitude,
    Outliers,
    RankedBernoulli,
    Settings,
    Sparsifier,
)
from merge_engine.methods.task import Task
from merge_engine.recipe import Parameter, Recipe, Scalar

NEGLIGIBLE_NORM = 1e-7
VANISHING_WEIGHT = 1e-8

_EVERY_METHOD = ("weight", "normalize", "lambda", "rescale")
_ELECTION = ("elect", "sign_slack", "sign_slack_mode")


class TaskArithmetic(Method):
    """A method of this family. ``defaults`` are the defaults that differ from those of ``Common``."""

    Settings = Settings
    Common = Common

    def __init__(self, name: str, sparsifier: Sparsifier, elects: bool, **defaults: Scalar):
        self.name = name
        self.sparsifier = sparsifier
        self.elects = elects
        self._defaults = defaults

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """See ``Method.parameters``."""
        by_name = {parameter.name: parameter for parameter in super().parameters}
        names = (*_EVERY_METHOD, *self.sparsifier.parameters, *(_ELECTION if self.elects else ()))
        return tuple(
            replace(by_name[name], default=self._defaults.get(name, by_name[name].default)) for name in names
        )

    def check(self, recipe: Recipe, tasks: Sequence[Task]) -> list[str]:
        """The combinations of parameters that cannot work, each once."""
        problems: dict[str, None] = {}
        stacks = recipe.stacks
        seen: set[tuple[int, Settings, Common]] = set()
        for task in tasks:
            for model, settings in zip(task.models, task.settings, strict=True):
                if (model, settings, task.common) in seen:
                    continue
                seen.add((model, settings, task.common))
                problem = self.sparsifier.problem(settings)
                if self.elects and task.common.sign_slack_mode == "retain" and settings.sign_slack > 1:
                    problem = "sign_slack must not exceed 1 when sign_slack_mode is retain"
                if problem:
                    problems[f"{stacks.label(model)}: {problem}"] = None
        if any(task.common.trim_scope == "model" for task in tasks):
            problems |= dict.fromkeys(_check_model_scope(recipe, tasks))
        return list(problems)

    def needs(self, task: Task) -> list[Need]:
        """The magnitudes at the ranks of the masks, the norms with ``rescale: true``, and whole lines for DELLA."""
        masks = self.masks(task)
        needs = [need for model, mask in masks.items() for need in mask_needs(model, mask)]
        if self._keeps_norms(task):
            needs += [MaskedL1(model, mask) for model, mask in masks.items()]
        if isinstance(self.sparsifier, RankedBernoulli) and task.count:
            line = Line.of(task.shape)
            needs.append(Together(line.length * line.stride))
        return needs

    def masks(self, task: Task) -> dict[int, Mask]:
        """The mask of each model, by recipe position."""
        common: Common = task.common
        return {
            model: self.sparsifier.mask(
                settings,
                common,
                task.elements[model] if common.trim_scope == "model" else task.count,
                task.random_key(model),
            )
            for model, settings in zip(task.models, task.settings, strict=True)
        }

    def solve(self, task: Task, answers: Answers) -> Consensus:
        """The consensus with every model's mask, weight, scale and slack."""
        common: Common = task.common
        retains = common.sign_slack_mode == "retain"
        keeps_norms = self._keeps_norms(task)
        entries = []
        for (model, mask), settings in zip(self.masks(task).items(), task.settings, strict=True):
            slack = settings.sign_slack if self.elects else 0.0
            entries.append(
                Entry(
                    mask,
                    weight=settings.weight,
                    rescale=_norm_ratio(task, answers[MaskedL1(model, mask)])
                    if keeps_norms
                    else _rescale(mask, settings, common),
                    vote_slack=0.0 if retains else slack,
                    retain_slack=slack if retains else 0.0,
                )
            )
        return Consensus(
            tuple(entries),
            election=common.elect if self.elects else "none",
            normalize=common.normalize,
            scale=common.lambda_,
            storage_rounding=task.storage_rounding,
            divisor=_divisor(tuple(e.weight for e in entries), task.working, task.storage_rounding),
        )

    def scratch_bytes(self, models: int) -> int:
        """DELLA holds a threshold for every element of every model, and the keys of one model."""
        return 4 * models + 8 if isinstance(self.sparsifier, RankedBernoulli) else 0

    def _keeps_norms(self, task: Task) -> bool:
        return task.common.rescale == "true" and not isinstance(self.sparsifier, Everything)


def _norm_ratio(task: Task, norms: tuple[float, float]) -> float:
    """The L1 norm before the mask over the norm after it; 1 if either is negligible."""
    before, after = norms
    if task.storage_rounding:  # round as mergekit does, except where its sums overflow
        before, after = (n if math.isinf(r := rounded(n, task.working)) else r for n in norms)
    return before / after if min(before, after) >= NEGLIGIBLE_NORM else 1.0


def _rescale(mask: Mask, settings: Settings, common: Common) -> float:
    if common.rescale == "density" and not isinstance(mask, Dense | Ranked) and settings.density > 0:
        return 1.0 / settings.density
    return 1.0


@lru_cache(maxsize=64)  # most tensors of a merge have the same weights
def _divisor(weights: tuple[float, ...], working: DType, storage_rounding: bool) -> float:
    """The sum of the weights, or 1 if it is 0 (in mergekit: nearly 0)."""
    total = weight_sum(weights, working, storage_rounding)
    vanishes = abs(total) < VANISHING_WEIGHT if storage_rounding else total == 0
    return 1.0 if vanishes else total


def _check_model_scope(recipe: Recipe, tasks: Sequence[Task]) -> list[str]:
    """Problems of ``trim_scope: model``: one threshold needs one working dtype, and one density per model."""
    problems = []
    stacks = recipe.stacks
    if any(task.common.trim_scope != "model" for task in tasks):
        problems.append("trim_scope: must be the same in all slices, model or tensor")
    working = sorted({task.working.name for task in tasks})
    if len(working) > 1:
        problems.append(
            f"trim_scope: model compares magnitudes across tensors, but they are merged in "
            f"{', '.join(working)}; set dtype to one of them"
        )
    values: dict[tuple[int, str], set[float]] = {}
    for task in tasks:
        for model, settings in zip(task.models, task.settings, strict=True):
            for name in ("density", "gamma", "trim_slack"):
                values.setdefault((model, name), set()).add(getattr(settings, name))
    problems += [
        f"{stacks.label(model)}: trim_scope: model needs one {name} for the whole "
        "model, not a gradient or filters"
        for (model, name), distinct in values.items()
        if len(distinct) > 1
    ]
    return problems


FAMILY: Mapping[str, TaskArithmetic] = {
    method.name: method
    for method in (
        TaskArithmetic("task_arithmetic", Everything(), elects=False),
        TaskArithmetic("ties", Magnitude(), elects=True, normalize=True),
        TaskArithmetic("dare_linear", Bernoulli(), elects=False, rescale="true"),
        TaskArithmetic("dare_ties", Bernoulli(), elects=True, rescale="true"),
        TaskArithmetic("breadcrumbs", Outliers(), elects=False),
        TaskArithmetic("breadcrumbs_ties", Outliers(), elects=True),
        TaskArithmetic("della", RankedBernoulli(), elects=True, normalize=True, rescale="true"),
        TaskArithmetic("della_linear", RankedBernoulli(), elects=False, rescale="true"),
    )
}
