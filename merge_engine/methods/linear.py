"""Methods that combine whole models and need no base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from merge_engine.backends.operations import Combine
from merge_engine.dtypes import F32
from merge_engine.methods.base import Answers, Method
from merge_engine.methods.rounding import weight_sum
from merge_engine.methods.task import Task
from merge_engine.recipe import Recipe, parameter


class Linear(Method):
    """Weighted sum or mean of models: sum of w_i * x_i, divided by sum of w_i unless ``normalize: false``.

    "Model soups" (Wortsman et al., ICML 2022).
    """

    name = "linear"
    uses_base = False

    @dataclass(frozen=True)
    class Settings:
        """Parameters of each model."""

        weight: float = parameter()

    @dataclass(frozen=True)
    class Common:
        """Parameters of all models together."""

        normalize: bool = parameter(True)

    def check(self, recipe: Recipe, tasks: Sequence[Task]) -> list[str]:
        """Refuse weights with the sum 0 if the mean divides by it."""
        names = [task.name for task in tasks if task.common.normalize and _divisor(task) == 0]
        if not names:
            return []
        more = f" and of {len(names) - 1} more tensors" if len(names) > 1 else ""
        remedy = "change them or set normalize: false"
        return [f"{names[0]}: the weights sum to 0, so the mean of it{more} is undefined; {remedy}"]

    def solve(self, task: Task, answers: Answers) -> Combine:
        """One combination with constant coefficients."""
        divisor = _divisor(task) if task.common.normalize else None
        return Combine(_weights(task), divisor, fused=task.storage_rounding)


class Passthrough(Method):
    """Copy one model, or multiply it by ``scale``."""

    name = "passthrough"
    uses_base = False
    max_models = 1

    @dataclass(frozen=True)
    class Settings:
        """Parameters of the model."""

        scale: float | None = parameter(None)

    def solve(self, task: Task, answers: Answers) -> Combine:
        """One coefficient; 1 copies every finite value bit for bit."""
        scale = task.settings[0].scale
        return Combine((1.0 if scale is None else scale,))


def _weights(task: Task) -> tuple[float, ...]:
    return tuple(float(settings.weight) for settings in task.settings)


def _divisor(task: Task) -> float:
    # In mergekit, linear is the only method that keeps its weights in float32.
    working = F32 if task.storage_rounding else task.working
    return weight_sum(_weights(task), working, task.storage_rounding)
