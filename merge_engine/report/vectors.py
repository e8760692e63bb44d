"""Norms of the task vectors and the angles between them, from one more read of the inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from merge_engine.engine.carrying import carry_out
from merge_engine.engine.choosing import choose_backend
from merge_engine.engine.scheduling import open_access, schedule_for
from merge_engine.engine.sinks import Target
from merge_engine.errors import ReportError
from merge_engine.methods import Answers, Gram, Method, Operation, Task
from merge_engine.observe.discards import Place
from merge_engine.planning import Schedule, make_plan, measuring
from merge_engine.recipe import ModelReference, Recipe
from merge_engine.report.record import Record
from merge_engine.text import some

_NOTHING = 1e-13  # a product below this share of the squared norms in it is rounding error, and counts as 0


@dataclass
class Products:
    """Inner products <d_i, d_j> of the task vectors by recipe positions i <= j, and the base's squared L2 norm."""

    base: float = 0.0
    between: dict[tuple[int, int], float] = field(default_factory=dict)

    def add(self, other: Products) -> None:
        """Add the products of another tensor."""
        self.base += other.base
        for pair, product in other.between.items():
            self.between[pair] = self.between.get(pair, 0.0) + product

    def norm(self, model: int) -> float:
        """The L2 norm of a task vector."""
        return math.sqrt(self.between.get((model, model), 0.0))

    def relative_norm(self, model: int) -> float | None:
        """The L2 norm of a task vector over that of the base; None if the base is zero."""
        return self.norm(model) / math.sqrt(self.base) if self.base else None

    def cosine(self, one: int, other: int) -> float | None:
        """The cosine of the angle between two task vectors; None if one of them is zero, or if no slice has both."""
        norms = self.norm(one) * self.norm(other)
        product = self.between.get((min(one, other), max(one, other)))
        return product / norms if norms and product is not None else None


@dataclass
class TaskVectors:
    """Products over all tensors, and by stack and layer."""

    total: Products = field(default_factory=Products)
    by_layer: dict[tuple[str, int], Products] = field(default_factory=dict)


def measure(
    record: Record, on_schedule: Callable[[Schedule], None], progress: Callable[[int], None]
) -> TaskVectors:
    """Read the inputs of a merge again, as a merge does, and sum their products.

    For ``on_schedule`` and ``progress`` see ``run``. Raises ``ReportError`` if an input is no longer at its path or
    has been rewritten, and other ``MergeError`` if it cannot be read.
    """
    result = TaskVectors()

    def add(task: Task, answers: Answers) -> None:
        products = _products(task, answers[Gram()])
        result.total.add(products)
        place = Place.of(task.name)
        if place.layer is not None:
            result.by_layer.setdefault((place.stack, place.layer), Products()).add(products)

    merge = make_plan(_at_paths(record), None, shard_size=2**62)
    for given in (*merge.bases.values(), *merge.models.values()):
        if record.inputs[given.label].fingerprint != given.fingerprint:
            raise ReportError(f"{given.label}: has been rewritten since it was merged")
    plan = measuring(merge, _InnerProducts())
    backend = choose_backend(plan, None)
    with open_access(plan, backend) as access:
        schedule = schedule_for(plan, access, backend)
        on_schedule(schedule)
        carry_out(schedule, backend, access, [Target()], progress, add)
    return result


class _InnerProducts(Method):
    """Measures the inner products of all inputs, and merges nothing."""

    name = "inner products"

    def needs(self, task: Task) -> tuple[Gram]:
        """The inner products of all inputs."""
        return (Gram(),)

    def solve(self, task: Task, answers: Answers) -> Operation:
        """Nothing is merged."""
        raise NotImplementedError


def _at_paths(record: Record) -> Recipe:
    """The recipe with the local paths of its inputs, so that a name on the hub is not downloaded again."""
    labels = {role: label for label, entry in record.inputs.items() for role in entry.roles}
    paths = {role: record.inputs[label].paths(label) for role, label in labels.items()}
    if removed := sorted({pair[0] for pair in paths.values()} & record.removed):
        raise ReportError(f"{some(removed)}: made by other recipes and removed; --intermediate-dir keeps it")
    missing = [
        path for pair in paths.values() for path in pair if path is not None and not Path(path).exists()
    ]
    if missing:
        raise ReportError(
            f"{missing[0]}: no longer there, seen from the folder that this command is started in"
        )
    stacks = record.recipe.stacks
    if not {*stacks.bases, *map(str, record.labels)} <= paths.keys():
        raise ReportError("the manifest does not say which input was what")
    # A model without a role of its own is a base, which the recipe also lists as a model.
    base = _reference(*paths["base"])
    models = {
        model: _reference(*paths[str(i)]) if str(i) in paths else base
        for i, model in enumerate(stacks.models)
    }
    bases = {model: _reference(*paths[role]) for role, model in stacks.bases.items()}
    return record.recipe.replacing(models | bases)


def _reference(path: str, lora: str | None) -> ModelReference:
    return ModelReference(path=path, lora=None if lora is None else ModelReference(path=lora))


def _products(task: Task, gram: Sequence[Sequence[float]]) -> Products:
    """From the Gram matrix of all inputs: <x - b, y - b> = <x, y> - <x, b> - <y, b> + <b, b>.

    The matrix is summed in float64, where each product of two 32-bit values is exact. For a task vector of a
    thousandth of its base's norm, the difference is wrong in the tenth digit only.
    """
    models, n, base = task.models, len(task.models) + 1, gram[0][0]

    def between(i: int, j: int) -> float:
        product = gram[i][j] - gram[0][i] - gram[0][j] + base
        return product if abs(product) > _NOTHING * (gram[i][i] + gram[j][j] + base) else 0.0

    pairs = [(i, j) for i in range(1, n) for j in range(1, n) if models[i - 1] <= models[j - 1]]
    return Products(base, {(models[i - 1], models[j - 1]): between(i, j) for i, j in pairs})
