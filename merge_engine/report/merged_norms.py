"""Norms of a merged task vector and of what was kept of each task vector, from one more read of inputs and output.

No merge can give them: a norm of the merged task vector needs the output's values beside those of the base, and the
counts of a merge say how many entries were kept, not how large they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from merge_engine.backends.operations import Dense
from merge_engine.methods import Answers, Gram, MaskedSquares, Method, Need, Operation, Task
from merge_engine.methods.task import Action
from merge_engine.planning import make_plan
from merge_engine.recipe import ModelReference, load_recipe
from merge_engine.report.record import Record
from merge_engine.report.rereading import at_paths, measure_all, plan_again
from merge_engine.report.vectors import InnerProducts, Products, products_of


@dataclass(frozen=True)
class Norms:
    """L2 norms: of the base, of the merged task vector, and of each task vector and its kept entries.

    ``base`` and ``merged`` are None for recipes of several slices, whose output has no one base. ``vectors`` is by
    recipe position, and empty for methods that keep whole task vectors or choose the entries of all models together.
    """

    base: float | None
    merged: float | None
    vectors: Mapping[int, tuple[float, float]]

    @property
    def merged_share(self) -> float | None:
        """The norm of the merged task vector over that of the base; None if it is not known, or the base is zero."""
        return self.merged / self.base if self.merged is not None and self.base else None

    @property
    def kept_shares(self) -> dict[int, float]:
        """The norm of the kept entries over that of the task vector, by recipe position, without zero vectors."""
        return {model: kept / whole for model, (whole, kept) in self.vectors.items() if whole}


def measure_norms(folder: Path) -> Norms:
    """Read the inputs and the output of a finished merge again.

    Raises ``ManifestError`` if the folder holds no merge, ``ReportError`` if it has no task vectors or an input is
    no longer as it was, and other ``MergeError`` if one cannot be read.
    """
    record = Record(folder)
    plan = plan_again(record)
    vectors: dict[int, tuple[float, float]] = {}

    def add(task: Task, answers: Answers) -> None:
        for need in _squares(plan.method, task):
            whole, kept = answers[need]
            before = vectors.get(need.model, (0.0, 0.0))
            vectors[need.model] = before[0] + whole, before[1] + kept

    if any(_squares(plan.method, task) for task in plan.tasks):
        measure_all(plan, _KeptSquares(plan.method), add)
    base, merged = _of_output(record)
    roots = {model: (math.sqrt(whole), math.sqrt(kept)) for model, (whole, kept) in vectors.items()}
    return Norms(base, merged, roots)


def _of_output(record: Record) -> tuple[float | None, float | None]:
    """The norm of the base, and that of the output minus the base."""
    slices = list(at_paths(record).stacks.slices)
    base = slices[0].base
    if len(slices) > 1 or base is None:
        return None, None
    model = {"model": ModelReference(path=str(record.folder)), "parameters": {"weight": 1}}
    recipe = load_recipe({"merge_method": "task_arithmetic", "base_model": base, "models": [model]})
    total = Products()
    measure_all(
        make_plan(recipe, None, shard_size=2**62),
        InnerProducts(),
        lambda task, answers: total.add(products_of(task, answers[Gram()])),
    )
    return math.sqrt(total.base), total.norm(0)


class _KeptSquares(Method):
    """Measures the squares of each task vector, whole and kept, with the masks of another method."""

    name = "squares of what is kept"

    def __init__(self, method: Method):
        self._method = method

    def needs(self, task: Task) -> list[Need]:
        """The needs of the masks, and the squares."""
        return [*self._method.needs(task), *_squares(self._method, task)]

    def solve(self, task: Task, answers: Answers) -> Operation:
        """Nothing is merged."""
        raise NotImplementedError


def _squares(method: Method, task: Task) -> list[MaskedSquares]:
    masks = method.masks(task) if task.action is not Action.COPY else {}
    return [MaskedSquares(model, mask) for model, mask in masks.items() if mask != Dense()]
