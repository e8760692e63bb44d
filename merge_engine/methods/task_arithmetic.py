"""Task arithmetic and its kin: a base plus combined task vectors.

One formula, eight methods: they differ in which entries of a task vector survive (``sparsify``), whether
models elect a sign for every parameter, and in their defaults. Names, parameters and defaults are
mergekit's; ties, scope and slacks are ours.

- task_arithmetic: Ilharco et al., ICLR 2023
- ties: Yadav et al., NeurIPS 2023; the slacks are after Tao et al., Findings of EMNLP 2024
- dare_linear, dare_ties: Yu et al., ICML 2024
- breadcrumbs, breadcrumbs_ties: Davari and Belilovsky, ECCV 2024
- della, della_linear: Deep et al., 2024
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, Literal, cast

from merge_engine.backends import Backend
from merge_engine.backends.operations import (
    Chunk,
    Consensus,
    Dense,
    Entry,
    Found,
    Mask,
    RankBand,
    Ranked,
    SolvedBand,
)
from merge_engine.backends.statistics import BlockSums
from merge_engine.methods.base import MergeTask, Method, Program, Share, Solution, Statistic, Values
from merge_engine.methods.rounding import rounded, weight_sum
from merge_engine.methods.selection import Query, Selection
from merge_engine.methods.sparsify import (
    RESCALE_CHOICES,
    Bernoulli,
    Cut,
    Everything,
    Magnitude,
    Outliers,
    RankedBernoulli,
    Sparsifier,
    Ties,
)
from merge_engine.recipe import Parameter, Recipe

WEIGHT = Parameter("weight", float, "model", required=True)
LAMBDA = Parameter("lambda", float, "tensor", default=1.0)
ELECTION = (
    Parameter("elect", str, "tensor", default="sum", choices=("sum", "count")),
    Parameter("sign_slack", float, "model", default=0.0, minimum=0),
    Parameter("sign_slack_mode", str, "tensor", default="elect", choices=("elect", "retain")),
)
NEGLIGIBLE_NORM = 1e-7
VANISHING_WEIGHT = 1e-8


class TaskArithmetic(Method):
    """A member of the family."""

    uses_base = True

    def __init__(self, name: str, sparsifier: Sparsifier, elects: bool, normalize: bool, rescale: str):
        self.name = name
        self.sparsifier = sparsifier
        self.elects = elects
        self.whole_lines = sparsifier.whole_lines
        self.parameters = (
            WEIGHT,
            Parameter("normalize", bool, "tensor", default=normalize),
            LAMBDA,
            Parameter("rescale", str, "tensor", default=rescale, choices=RESCALE_CHOICES),
            *(
                sparsifier.parameters
                or (Parameter("density", float, "model", default=1.0, minimum=0, maximum=1),)
            ),
            *(ELECTION if elects else ()),
        )

    def check(self, recipe: Recipe, tasks: Sequence[MergeTask]) -> list[str]:
        """Combinations of parameters that cannot work, once each."""
        problems: dict[str, None] = {}
        for task in tasks:
            for model, settings in zip(task.models, task.settings, strict=True):
                problem = self.sparsifier.problem(settings)
                if (
                    self.elects
                    and task.common["sign_slack_mode"] == "retain"
                    and _number(settings, "sign_slack") > 1
                ):
                    problem = "sign_slack must not exceed 1 when sign_slack_mode is retain"
                if problem:
                    problems[f"models[{model}] ({recipe.models[model].model}): {problem}"] = None
        if _scope(tasks) == "model":
            problems |= dict.fromkeys(_check_model_scope(recipe, tasks))
        return list(problems)

    def share(self, tasks: Sequence[MergeTask]) -> Share | None:
        """With ``trim_scope: model``, one selection over all tensors."""
        return ModelTrim(self.sparsifier, tasks) if _scope(tasks) == "model" else None

    def program(self, task: MergeTask, share: Share | None) -> Program:
        """Thresholds, then norms if they are to be kept, then the consensus."""
        return Merge(self, task, share if isinstance(share, ModelTrim) else None)

    def scratch_bytes(self, models: int) -> int:
        """DELLA holds a threshold for every element of every model, and the keys of one."""
        return 4 * models + 8 if self.whole_lines else 0


class Trim:
    """The cuts of all models over one or several tensors, and the selection that answers their ranks."""

    def __init__(self, cuts: Mapping[int, Cut], first: MergeTask, elements: int):
        self.cuts = cuts
        by_index = first.common.get("ties") == "index"
        queries = [Query(model, rank) for model, cut in cuts.items() for rank in cut.ranks]
        self._selection = Selection(queries, first.working, self._tie_counts if by_index else None, elements)
        self.statistics = self._selection.statistics

    def masks(self, task: MergeTask, backend: Backend) -> list[SolvedBand]:
        """Each model's mask for a tensor, and what it would keep without trim slack."""
        rule = cast(Literal["spread", "index", "all"], task.common.get("ties"))
        masks: list[Mask | RankBand] = []
        for model in task.models:
            places = {
                query.rank: place for query, place in self._selection.places.items() if query.model == model
            }
            ties = Ties(rule, task.name, task.random_key(model), places)
            masks.append(self.cuts[model].mask(_of(model, self._selection.found), ties))
        solved = iter(backend.bands([mask for mask in masks if isinstance(mask, RankBand)], task.working))
        return [next(solved) if isinstance(mask, RankBand) else SolvedBand(mask, None) for mask in masks]

    def _tie_counts(self, found: Mapping[Query, Found]) -> Mapping[Query, int]:
        return {
            Query(model, rank): nth
            for model, cut in self.cuts.items()
            if cut.ranks
            for rank, nth in cut.tie_counts(_of(model, found)).items()
        }


def _of(model: int, found: Mapping[Query, Any]) -> dict[int, Any]:
    """What was found for one model, by rank."""
    return {query.rank: answer for query, answer in found.items() if query.model == model}


class ModelTrim(Share):
    """One threshold per model over all its tensors, as in the TIES paper."""

    def __init__(self, sparsifier: Sparsifier, tasks: Sequence[MergeTask]):
        counts: dict[int, int] = {}
        settings = {}
        for task in tasks:
            for model, values in zip(task.models, task.settings, strict=True):
                counts[model] = counts.get(model, 0) + task.count
                settings[model] = values
        self.trim = Trim(
            {
                model: sparsifier.cut(settings[model], tasks[0].common, counts[model], random_key=0)
                for model in sorted(counts)
            },
            tasks[0],
            sum(task.count for task in tasks),
        )
        self.statistics = self.trim.statistics


class NormRatio(Statistic):
    """The L1 norm of each task vector before and after its mask."""

    notes = True

    def __init__(self, program: Merge):
        self._program = program
        self._task = program.task
        self._norms: list[Any] = []

    def measure(self, backend: Backend, chunk: Chunk, task: MergeTask) -> None:
        """Add a chunk's norms."""
        masks = [mask for mask, _ in self._program.masks(backend)]
        self._norms.append(backend.l1_norms(chunk, masks, task.storage_rounding))

    def finish(self, backend: Backend) -> None:
        """The norms are looked at once they are needed, when other tensors have been measured too."""

    def ratios(self, backend: Backend) -> list[float]:
        """For each model. Negligible norms leave the task vector as it is."""
        of_chunks: list[BlockSums] = [backend.fetch(norms) for norms in self._norms]
        sums = reduce(BlockSums.merge, of_chunks).totals()
        if self._task.storage_rounding:  # but not where mergekit's sums overflow
            sums = [n if math.isinf(r := rounded(n, self._task.working)) else r for n in sums]
        pairs = zip(sums[::2], sums[1::2], strict=True)
        return [before / after if min(before, after) >= NEGLIGIBLE_NORM else 1.0 for before, after in pairs]


class Merge(Program):
    """One tensor of the family."""

    def __init__(self, method: TaskArithmetic, task: MergeTask, shared: ModelTrim | None):
        self.method = method
        self.task = task
        self._shared = shared is not None
        own: list[Statistic] = []
        if shared is None:
            cuts = {
                model: method.sparsifier.cut(settings, task.common, task.count, task.random_key(model))
                for model, settings in zip(task.models, task.settings, strict=True)
            }
            self._trim = Trim(cuts, task, task.count)
            own += self._trim.statistics
        else:
            self._trim = shared.trim
        self._masks: list[SolvedBand] | None = None
        self._norms: NormRatio | None = None
        if task.common["rescale"] == "true" and not isinstance(method.sparsifier, Everything):
            self._norms = NormRatio(self)
            own.append(self._norms)
        self.statistics = own

    def masks(self, backend: Backend) -> list[SolvedBand]:
        """The masks, once the selection is complete."""
        if self._masks is None:
            self._masks = self._trim.masks(self.task, backend)
        return self._masks

    def solve(self, backend: Backend) -> Solution:
        """The consensus with every model's mask, weight, scale and slack."""
        task, common = self.task, self.task.common
        retains = common.get("sign_slack_mode") == "retain"
        entries, trimmed_to = [], {}
        ratios = self._norms.ratios(backend) if self._norms is not None else None
        for position, (model, settings) in enumerate(zip(task.models, task.settings, strict=True)):
            mask, kept_without_slack = self.masks(backend)[position]
            if kept_without_slack is not None:
                trimmed_to[model] = kept_without_slack
            slack = _number(settings, "sign_slack") if self.method.elects else 0.0
            entries.append(
                Entry(
                    mask,
                    weight=_number(settings, "weight"),
                    rescale=ratios[position] if ratios else self._rescale(mask, settings),
                    vote_slack=0.0 if retains else slack,
                    retain_slack=slack if retains else 0.0,
                )
            )
        operation = Consensus(
            tuple(entries),
            election=("count" if common["elect"] == "count" else "sum") if self.method.elects else "none",
            normalize=bool(common["normalize"]),
            scale=_number(common, "lambda"),
            storage_rounding=task.storage_rounding,
            divisor=self._divisor([entry.weight for entry in entries]),
        )
        return Solution(operation, trimmed_to, whole_model=self._shared)

    def _divisor(self, weights: Sequence[float]) -> float:
        """Weights that cancel divide by 1, and so do those that nearly cancel in mergekit."""
        total = weight_sum(weights, self.task.working, self.task.storage_rounding)
        vanishes = abs(total) < VANISHING_WEIGHT if self.task.storage_rounding else total == 0
        return 1.0 if vanishes else total

    def _rescale(self, mask: Mask, settings: Values) -> float:
        density = _number(settings, "density")
        if self.task.common["rescale"] == "density" and not isinstance(mask, Dense | Ranked) and density > 0:
            return 1.0 / density
        return 1.0


def _number(values: Mapping[str, object], name: str) -> float:
    value = values[name]
    assert isinstance(value, int | float), f"{name} is declared as a number"
    return float(value)


def _scope(tasks: Sequence[MergeTask]) -> str:
    return str(tasks[0].common.get("trim_scope", "tensor")) if tasks else "tensor"


def _check_model_scope(recipe: Recipe, tasks: Sequence[MergeTask]) -> list[str]:
    """One threshold needs one kind of key, and one density per model."""
    problems = []
    working = sorted({task.working.name for task in tasks})
    if len(working) > 1:
        problems.append(
            f"trim_scope: model compares magnitudes across tensors, but they are merged in "
            f"{', '.join(working)}; set dtype to one of them"
        )
    values: dict[tuple[int, str], set[object]] = {}
    for task in tasks:
        for model, settings in zip(task.models, task.settings, strict=True):
            for name in ("density", "gamma", "trim_slack"):
                if name in settings:
                    values.setdefault((model, name), set()).add(settings[name])
    problems += [
        f"models[{model}] ({recipe.models[model].model}): trim_scope: model needs one {name} for the whole "
        "model, not a gradient or filters"
        for (model, name), distinct in values.items()
        if len(distinct) > 1
    ]
    return problems


FAMILY = (
    TaskArithmetic("task_arithmetic", Everything(), elects=False, normalize=False, rescale="false"),
    TaskArithmetic("ties", Magnitude(), elects=True, normalize=True, rescale="false"),
    TaskArithmetic("dare_linear", Bernoulli(), elects=False, normalize=False, rescale="true"),
    TaskArithmetic("dare_ties", Bernoulli(), elects=True, normalize=False, rescale="true"),
    TaskArithmetic("breadcrumbs", Outliers(), elects=False, normalize=False, rescale="false"),
    TaskArithmetic("breadcrumbs_ties", Outliers(), elects=True, normalize=False, rescale="false"),
    TaskArithmetic("della", RankedBernoulli(), elects=True, normalize=True, rescale="true"),
    TaskArithmetic("della_linear", RankedBernoulli(), elects=False, normalize=False, rescale="true"),
)
