"""The plan of a merge of state dicts: tensors in memory, without files beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from merge_engine.checkpoint import Checkpoint
from merge_engine.errors import PlanError, RecipeError
from merge_engine.fit import unused_settings
from merge_engine.planning.plan import Input, MergePlan, among, checked
from merge_engine.planning.sources import slice_inputs
from merge_engine.planning.tasks import Planned, make_tasks
from merge_engine.recipe import ModelReference, Recipe
from merge_engine.vocabulary import plan_vocabulary


def plan_state_dicts(
    recipe: Recipe,
    opened: Mapping[ModelReference, Checkpoint],
    taking: Callable[[Planned], object],
) -> MergePlan:
    """Plan the merge of a recipe over state dicts, which stand for opened checkpoints without config and files.

    ``taking`` gets what the plan's tasks were made of. Raises as ``make_plan`` does, and ``RecipeError`` if the recipe
    needs tokenizers.
    """
    method, recipe, ignored = checked(recipe, False)
    opened = among(recipe, opened)
    if recipe.vocabulary is not None:
        raise RecipeError("tokenizer: state dicts have none; load the models from their folders")
    named_donor = recipe.base_model or recipe.stacks.models[0]
    slices = slice_inputs(recipe, method, opened, opened[named_donor])
    planned = make_tasks(recipe, method, slices, plan_vocabulary(recipe, opened, named_donor))
    if planned.problems:
        raise PlanError(planned.problems)
    taking(planned)
    nowhere = Input(Path(), "", {})
    return MergePlan(
        recipe,
        method,
        dict.fromkeys(recipe.stacks.bases, nowhere) if method.uses_base else {},
        dict.fromkeys(sorted({i for inputs in slices for i in inputs.models}), nowhere),
        nowhere,
        tuple(planned.tasks),
        (),
        tuple(planned.notes),
        (*recipe.remarks, *ignored, *planned.warnings, *unused_settings(recipe, method, planned.names)),
    )
