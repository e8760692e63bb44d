"""Methods that see tensors as vectors: means along arcs instead of straight lines, and shares that angles decide.

Each needs inner products only, and becomes a linear combination of the inputs, or of the task vectors. The formulas are
steps 15 to 19 of docs/arithmetic.md; names, parameters and defaults are mergekit's.

- slerp: Shoemake, SIGGRAPH 1985
- nuslerp, multislerp: mergekit (Goddard et al., EMNLP 2024)
- karcher: the Riemannian centre of mass on the sphere, Karcher 1977
- model_stock: Jang et al., ECCV 2024
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import merge_engine._native as _native
from merge_engine.backends.operations import Combine, Line, LineCoefficients
from merge_engine.backends.statistics import sum_block
from merge_engine.dtypes import F32, DType
from merge_engine.errors import PlanError
from merge_engine.methods.base import Answers, Method
from merge_engine.methods.needs import Gram, Need, Together
from merge_engine.methods.task import Task
from merge_engine.recipe import Recipe, parameter


@dataclass(frozen=True)
class _Weighted:
    """Parameters of each model."""

    weight: float = parameter()


class Slerp(Method):
    """Spherical interpolation from the base (t = 0) to one model (t = 1)."""

    name = "slerp"
    max_models = 1
    if_lacking = "lone"
    keeps_unchanged = False  # (1 - t) * v + t * v is rounded

    @dataclass(frozen=True)
    class Common:
        """Parameters of both models."""

        t: float = parameter()

    def needs(self, task: Task) -> Sequence[Need]:
        """The inner products of both inputs."""
        return (Gram(),)

    def solve(self, task: Task, answers: Answers) -> Combine:
        """Coefficients of base and model."""
        products, coefficients = _products(answers, Gram(), 2)
        steps = _native_dtype(F32) if task.storage_rounding else None  # mergekit computes slerp in float32
        _native.slerp(products=products, t=task.common.t, steps=steps, coefficients=coefficients)
        return _combination(task, Gram(), coefficients)


class NuSlerp(Method):
    """Spherical interpolation of two models, or of their task vectors if there is a base, by their weights.

    With ``nuslerp_flatten: false`` each line along the last dimension is a vector of its own; with
    ``nuslerp_row_wise`` each line along the first.
    """

    name = "nuslerp"
    requires_base = False
    min_models = max_models = 2
    if_lacking = "lone"
    sums_lines = True
    Settings = _Weighted

    @dataclass(frozen=True)
    class Common:
        """Parameters of both models together."""

        nuslerp_flatten: bool = parameter(True)
        nuslerp_row_wise: bool = parameter(False)

    def needs(self, task: Task) -> Sequence[Need]:
        """The inner products of the two vectors, or of each pair of lines."""
        gram = _of_lines(task)
        if gram.line is None or gram.line.stride == 1:
            return (gram,)
        return (gram, Together(sum_block(gram.line)))

    def solve(self, task: Task, answers: Answers) -> Combine:
        """Coefficients of the two models, or of their task vectors."""
        gram = _of_lines(task)
        first, second = (settings.weight for settings in task.settings)
        total = first + second
        t = 0.5 if abs(total) < 1e-6 else second / total
        products, coefficients = _products(answers, gram, 2)
        if task.storage_rounding and gram.line is None:
            *shares, divisor = _native.nuslerp_arc(products=products, t=t, steps=_steps(task))
            return Combine(tuple(shares), divisor, stepwise=True, on_base=gram.of_deltas)
        _native.nuslerp(products=products, t=t, steps=_steps(task), coefficients=coefficients)
        return _combination(task, gram, coefficients)


class MultiSlerp(Method):
    """The weighted mean direction of any number of models, or task vectors, with the weighted mean of their norms."""

    name = "multislerp"
    requires_base = False
    Settings = _Weighted

    @dataclass(frozen=True)
    class Common:
        """Parameters of all models together."""

        normalize_weights: bool = parameter(True)
        eps: float = parameter(1e-8, minimum=0)

    def check(self, recipe: Recipe, tasks: Sequence[Task]) -> list[str]:
        """Refuse weights with the sum 0 if they are divided by it."""
        names = [task.name for task in tasks if task.common.normalize_weights and sum(_weights(task)) == 0]
        if not names:
            return []
        more = f" and of {len(names) - 1} more tensors" if len(names) > 1 else ""
        return [
            f"{names[0]}: the weights sum to 0, so the mean of it{more} is undefined; change them or set "
            "normalize_weights: false"
        ]

    def needs(self, task: Task) -> Sequence[Need]:
        """The inner products of all models or task vectors. One model is its own mean."""
        return () if len(task.models) == 1 else (Gram(of_deltas=task.has_base),)

    def solve(self, task: Task, answers: Answers) -> Combine:
        """Coefficients of the models or task vectors.

        Raises ``PlanError`` if three or more directions cancel out.
        """
        if len(task.models) == 1:
            return Combine((0.0, 1.0) if task.has_base else (1.0,), rounded=task.storage_rounding)
        gram, weights = Gram(of_deltas=task.has_base), _weights(task)
        if task.common.normalize_weights:
            total = sum(weights)
            weights = [weight / total for weight in weights]
        products, coefficients = _products(answers, gram, len(weights))
        if not _native.multislerp(
            products=products, weights=weights, epsilon=task.common.eps, coefficients=coefficients
        ):
            raise PlanError(
                f"{task.name}: the weighted directions of the models cancel out, so they have no mean; change the "
                "weights, or merge this tensor with another method"
            )
        return _combination(task, gram, coefficients)


class Karcher(Method):
    """The Karcher mean of the directions of any number of models, with the mean of their norms."""

    name = "karcher"
    uses_base = False

    @dataclass(frozen=True)
    class Common:
        """Parameters of all models together."""

        max_iter: int = parameter(10, minimum=0)
        tol: float = parameter(1e-5, minimum=0)

    def needs(self, task: Task) -> Sequence[Need]:
        """The inner products of all models. One model is its own mean."""
        return () if len(task.models) == 1 else (Gram(),)

    def solve(self, task: Task, answers: Answers) -> Combine:
        """Coefficients of the models: the iteration needs no elements."""
        count = len(task.models)
        if count == 1:
            return Combine((1.0,), rounded=task.storage_rounding)
        products, coefficients = _products(answers, Gram(), count)
        _native.karcher(
            products=products,
            count=count,
            max_iterations=task.common.max_iter,
            tolerance=task.common.tol,
            coefficients=coefficients,
        )
        return _combination(task, Gram(), coefficients)


class ModelStock(Method):
    """From the base a part of the way to the mean of the models: the more the task vectors agree, the further."""

    name = "model_stock"
    min_models = 2
    if_lacking = "base"
    sums_lines = True

    @dataclass(frozen=True)
    class Common:
        """Parameters of all models together."""

        filter_wise: bool = parameter(False)

    def needs(self, task: Task) -> Sequence[Need]:
        """The inner products of the task vectors; with ``filter_wise`` of each line along the last dimension."""
        return (self._gram(task),)

    def solve(self, task: Task, answers: Answers) -> Combine:
        """The same coefficient for all task vectors (of a line)."""
        gram, count = self._gram(task), len(task.models)
        products, coefficients = _products(answers, gram, count)
        _native.model_stock(
            products=products,
            count=count,
            least_product=1e-6 if task.storage_rounding else 0.0,
            steps=_steps(task),
            coefficients=coefficients,
        )
        return _combination(task, gram, coefficients)

    @staticmethod
    def _gram(task: Task) -> Gram:
        return Gram(True, Line.along(task.shape, "last") if task.common.filter_wise else None)


def _of_lines(task: Task) -> Gram:
    """The inner products that nuslerp needs."""
    common = task.common
    if common.nuslerp_flatten:
        return Gram(task.has_base)
    return Gram(task.has_base, Line.along(task.shape, "first" if common.nuslerp_row_wise else "last"))


def _weights(task: Task) -> list[float]:
    return [float(settings.weight) for settings in task.settings]


def _native_dtype(dtype: DType) -> _native.DType:
    result: _native.DType = getattr(_native.DType, dtype.code)
    return result


def _steps(task: Task) -> _native.DType | None:
    """What mergekit rounds each of its steps to."""
    return _native_dtype(task.working) if task.storage_rounding else None


def _products(answers: Answers, gram: Gram, vectors: int) -> tuple[array[float], array[float]]:
    """The inner products, [lines, pairs], and room for coefficients, [lines, vectors]."""
    found = answers[gram]
    if gram.line is None:
        found = array("d", [found[i][k] for i in range(vectors) for k in range(i, vectors)])
    lines = len(found) // (vectors * (vectors + 1) // 2)
    return found, array("d", bytes(8 * lines * vectors))


def _combination(task: Task, gram: Gram, coefficients: array[float]) -> Combine:
    """The combination of inputs, or of task vectors on the base."""
    if gram.line is None:
        return Combine(tuple(coefficients), rounded=task.storage_rounding, on_base=gram.of_deltas)
    lines = LineCoefficients(gram.line, coefficients)
    return Combine((), rounded=task.storage_rounding, on_base=gram.of_deltas, lines=lines)


GEOMETRIC: tuple[Method, ...] = (Slerp(), NuSlerp(), MultiSlerp(), Karcher(), ModelStock())
"""All methods of this file."""
