"""Methods that combine whole models and need no base."""

from __future__ import annotations

from collections.abc import Sequence

from merge_engine.backends.operations import Combine
from merge_engine.dtypes import F32
from merge_engine.methods.base import Fixed, MergeTask, Method, Program, Share
from merge_engine.methods.rounding import weight_sum
from merge_engine.recipe import Parameter, Recipe


class Linear(Method):
    """Weighted sum or mean of models: sum of w_i * x_i, divided by sum of w_i unless ``normalize: false``.

    "Model soups" (Wortsman et al., ICML 2022).
    """

    name = "linear"
    uses_base = False
    parameters = (
        Parameter("weight", float, "model", required=True),
        Parameter("normalize", bool, "tensor", default=True),
    )

    def check(self, recipe: Recipe, tasks: Sequence[MergeTask]) -> list[str]:
        """Weights that cancel leave nothing to divide by."""
        names = [task.name for task in tasks if task.common["normalize"] and self._divisor(task) == 0]
        more = f" and of {len(names) - 1} more tensors" if len(names) > 1 else ""
        remedy = "change them or set normalize: false"
        return (
            [f"{names[0]}: the weights sum to 0, so the mean of it{more} is undefined; {remedy}"]
            if names
            else []
        )

    def program(self, task: MergeTask, share: Share | None) -> Program:
        """One combination with constant coefficients."""
        divisor = self._divisor(task) if task.common["normalize"] else None
        return Fixed(Combine(self._weights(task), divisor, fused=task.storage_rounding))

    def _weights(self, task: MergeTask) -> tuple[float, ...]:
        return tuple(float(settings["weight"] or 0) for settings in task.settings)

    def _divisor(self, task: MergeTask) -> float:
        # mergekit's linear is the one method whose weights stay float32.
        working = F32 if task.storage_rounding else task.working
        return weight_sum(self._weights(task), working, task.storage_rounding)


class Passthrough(Method):
    """Copy one model, or multiply it by ``scale``."""

    name = "passthrough"
    uses_base = False
    max_models = 1
    parameters = (Parameter("scale", float, "model"),)

    def program(self, task: MergeTask, share: Share | None) -> Program:
        """One coefficient; 1 gives back every finite value, bit for bit."""
        scale = task.settings[0]["scale"]
        return Fixed(Combine((1.0 if scale is None else float(scale),)))
