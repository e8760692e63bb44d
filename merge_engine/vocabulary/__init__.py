"""The vocabulary of the output: one tokenizer for all inputs, and for each input the rows of its tokens."""

from __future__ import annotations

from collections.abc import Mapping

from merge_engine.checkpoint import Checkpoint
from merge_engine.recipe import ModelReference, Recipe
from merge_engine.vocabulary.base import Alignment
from merge_engine.vocabulary.by_tokens import ByTokens
from merge_engine.vocabulary.truncation import Truncation

__all__ = ["Alignment", "plan_vocabulary"]


def plan_vocabulary(
    recipe: Recipe, opened: Mapping[ModelReference, Checkpoint], donor: ModelReference
) -> Alignment | None:
    """What the recipe says of vocabularies, for these inputs; None if it says nothing.

    Raises ``CheckpointError`` with all problems of their tokenizers.
    """
    if recipe.vocabulary is not None:
        return ByTokens(recipe, opened, donor)
    return Truncation(recipe.arithmetic == "mergekit") if recipe.unsafe_truncate_embeddings else None
