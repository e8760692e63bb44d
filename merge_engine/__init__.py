"""merge_engine: exact model merging at the speed of the disk.

    import merge_engine as me

    me.run("recipe.yaml", "merged/")                                     # checkpoints to a checkpoint
    me.merge_tensors(base, [a, b], "ties", density=0.2, weight=[0.5, 0.5])  # tensors to a tensor
    me.merge_state_dicts(base_sd, [sd_a, sd_b], "ties", density=0.2)
    me.plan("recipe.yaml")                                               # what a run would do

Everything that can go wrong for a reason the caller can mend raises a ``MergeError``.
"""

from merge_engine.engine.plan import Plan
from merge_engine.engine.result import MergeResult, ModelCounts, TensorResult
from merge_engine.engine.run import plan, run
from merge_engine.engine.tensors import merge_state_dicts, merge_tensors
from merge_engine.errors import (
    BackendError,
    CheckpointError,
    MergeError,
    NonFiniteError,
    OutputError,
    PlanError,
    RecipeError,
)
from merge_engine.methods import METHODS
from merge_engine.recipe import Recipe, load_recipe

__all__ = [
    "METHODS",
    "BackendError",
    "CheckpointError",
    "MergeError",
    "MergeResult",
    "ModelCounts",
    "NonFiniteError",
    "OutputError",
    "Plan",
    "PlanError",
    "Recipe",
    "RecipeError",
    "TensorResult",
    "load_recipe",
    "merge_state_dicts",
    "merge_tensors",
    "plan",
    "run",
]
