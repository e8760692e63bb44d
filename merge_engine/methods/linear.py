"""Methods that combine whole models and need no base."""

from __future__ import annotations

from collections.abc import Sequence

from merge_engine.backends.operations import Combine
from merge_engine.methods.base import Fixed, MergeTask, Method, Program, Share
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
        return [
            f"{task.name}: the weights sum to 0, so the mean is undefined; "
            "change them or set normalize: false"
            for task in tasks
            if task.common["normalize"] and sum(float(s["weight"] or 0) for s in task.settings) == 0
        ]

    def program(self, task: MergeTask, share: Share | None) -> Program:
        """One combination with constant coefficients."""
        weights = tuple(float(settings["weight"] or 0) for settings in task.settings)
        return Fixed(Combine(weights, bool(task.common["normalize"]), fused=task.storage_rounding))


class Passthrough(Method):
    """Copy one model, or multiply it by ``scale``."""

    name = "passthrough"
    uses_base = False
    max_models = 1
    parameters = (Parameter("scale", float, "model"),)

    def program(self, task: MergeTask, share: Share | None) -> Program:
        """One coefficient; 1 gives back every finite value, bit for bit."""
        scale = task.settings[0]["scale"]
        return Fixed(Combine((1.0 if scale is None else float(scale),), normalize=False))
