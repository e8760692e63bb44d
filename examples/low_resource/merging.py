"""Merges of a base, a CT and an SFT model by the recipes in ``recipes/``, for any seed, budget and slack."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch

import merge_engine
from examples.low_resource.settings import RECIPES
from merge_engine import MergeResult, Recipe, load_recipe

SFT = 1
"""The position of the SFT model in all recipes."""


class Variant(NamedTuple):
    """A recipe, and the value of its slack (None: as the recipe has it)."""

    recipe: str
    slack: float | None = None

    @property
    def label(self) -> str:
        """As tables and results name it."""
        return self.recipe.replace("_", " ") + ("" if self.slack is None else f" {self.slack:g}")


def recipe_for(variant: Variant, folder: Path, ct_steps: int) -> Recipe:
    """The recipe with the models of a folder, the CT snapshot of this budget, and this slack for SFT."""
    recipe = load_recipe(RECIPES / f"{variant.recipe}.yaml").model_dump()
    if recipe["base_model"] is not None:
        recipe["base_model"]["path"] = str(folder / "base")
    for entry in recipe["models"]:
        name = PurePosixPath(entry["model"]["path"]).name
        entry["model"]["path"] = str(folder / (f"ct-{ct_steps}" if name.startswith("ct-") else name))
    if variant.slack is not None:
        own = recipe["models"][SFT]["parameters"]
        own["trim_slack" if "trim_slack" in own else "sign_slack"] = variant.slack
    return load_recipe(recipe)


def merge(variant: Variant, folder: Path, ct_steps: int) -> tuple[dict[str, torch.Tensor], MergeResult]:
    """The merged tensors in memory, and the run's counts."""
    result = merge_engine.run(recipe_for(variant, folder, ct_steps), threads=1)
    assert result.tensors is not None
    return dict(result.tensors), result
