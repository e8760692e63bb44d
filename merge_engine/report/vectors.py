"""Norms of the task vectors and the angles between them, from one more read of the inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from merge_engine.methods import Answers, Gram, Method, Operation, Task
from merge_engine.observe.discards import Place
from merge_engine.planning import Schedule
from merge_engine.report.record import Record
from merge_engine.report.rereading import measure_all, plan_again

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
        products = products_of(task, answers[Gram()])
        result.total.add(products)
        place = Place.of(task.name)
        if place.layer is not None:
            result.by_layer.setdefault((place.stack, place.layer), Products()).add(products)

    measure_all(plan_again(record), InnerProducts(), add, on_schedule, progress)
    return result


class InnerProducts(Method):
    """Measures the inner products of all inputs, and merges nothing."""

    name = "inner products"

    def needs(self, task: Task) -> tuple[Gram]:
        """The inner products of all inputs."""
        return (Gram(),)

    def solve(self, task: Task, answers: Answers) -> Operation:
        """Nothing is merged."""
        raise NotImplementedError


def products_of(task: Task, gram: Sequence[Sequence[float]]) -> Products:
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
