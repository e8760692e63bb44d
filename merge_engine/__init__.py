"""merge_engine: exact model merging at the speed of the disk.

    import merge_engine as me

    me.run("recipe.yaml", "merged/")                                     # checkpoints to a checkpoint
    me.merge_tensors(base, [a, b], "ties", density=0.2, weight=[0.5, 0.5])  # tensors to a tensor
    me.merge_state_dicts(base_sd, [sd_a, sd_b], "ties", density=0.2)
    me.plan("recipe.yaml")                                               # what a run would do
    me.write_report("merged/")                                           # what became of the task vectors

Everything that can go wrong for a reason the caller can mend raises a ``MergeError``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from merge_engine.errors import (
    BackendError,
    CheckpointError,
    MergeError,
    NonFiniteError,
    OptionError,
    OutputError,
    PlanError,
    RecipeError,
    ReportError,
)

if TYPE_CHECKING:
    from merge_engine.engine.discards import Discards, discards
    from merge_engine.engine.plan import Plan
    from merge_engine.engine.result import MergeResult, ModelCounts, TensorResult
    from merge_engine.engine.run import plan, run
    from merge_engine.engine.tensors import merge_state_dicts, merge_tensors
    from merge_engine.methods import METHODS
    from merge_engine.recipe import Recipe, load_recipe
    from merge_engine.report import write_report

__all__ = [
    "METHODS",
    "BackendError",
    "CheckpointError",
    "Discards",
    "MergeError",
    "MergeResult",
    "ModelCounts",
    "NonFiniteError",
    "OptionError",
    "OutputError",
    "Plan",
    "PlanError",
    "Recipe",
    "RecipeError",
    "ReportError",
    "TensorResult",
    "discards",
    "load_recipe",
    "merge_state_dicts",
    "merge_tensors",
    "plan",
    "run",
    "write_report",
]

# Loaded when first asked for, so that tools which may merge, but mostly do not, start fast.
_HOMES = {
    "METHODS": "merge_engine.methods",
    "Discards": "merge_engine.engine.discards",
    "MergeResult": "merge_engine.engine.result",
    "ModelCounts": "merge_engine.engine.result",
    "Plan": "merge_engine.engine.plan",
    "Recipe": "merge_engine.recipe",
    "TensorResult": "merge_engine.engine.result",
    "discards": "merge_engine.engine.discards",
    "load_recipe": "merge_engine.recipe",
    "merge_state_dicts": "merge_engine.engine.tensors",
    "merge_tensors": "merge_engine.engine.tensors",
    "plan": "merge_engine.engine.run",
    "run": "merge_engine.engine.run",
    "write_report": "merge_engine.report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
