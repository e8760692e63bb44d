"""What a configuration of mergekit-evolve says below ``genome``, checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from merge_engine.errors import RecipeError
from merge_engine.recipe import ModelReference
from merge_engine.recipe.problems import InvalidValue, Place, describe
from merge_engine.text import shown


class Definition(BaseModel):
    """The keys of a genome, with mergekit's meaning and defaults.

    ``models``: those to merge. ``layer_granularity``: so many layers, one after the other, share their numbers; 0
    for all layers. ``filters``: parts of tensors' names; the tensors of each have numbers of their own, and all others
    have one more set. ``smooth``: numbers are interpolated over the layers, like any gradient, instead of staying
    the same in a group. ``allow_negative_weights``: otherwise weights are taken without their sign. ``normalize``:
    as in a recipe, by default what the method is known for. Without effect are ``int8_mask``, and ``normalize`` with
    slerp.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: Annotated[tuple[ModelReference, ...], Field(min_length=1)]
    merge_method: Literal["linear", "task_arithmetic", "ties", "dare_ties", "slerp"]
    base_model: ModelReference | None = None
    tokenizer_source: ModelReference | None = None
    layer_granularity: int = 0
    normalize: bool | None = None
    allow_negative_weights: bool = False
    filters: tuple[str, ...] | None = None
    smooth: bool = False
    int8_mask: bool | None = None

    @model_validator(mode="after")
    def _fits_its_method(self) -> Definition:
        method, problems = self.merge_method, []
        if method in ("linear", "slerp"):
            if self.base_model is not None and self.base_model not in self.models:
                problems.append(
                    (".base_model", f"{method} merges no base; leave it out, or list it in models")
                )
        elif self.base_model is None:
            problems.append(
                (".base_model", f"missing, but {method} needs the model that the others were tuned from")
            )
        if method == "slerp":
            if len(self.models) < 2:
                problems.append((".models", "slerp needs two or more"))
            given = (key for key in ("filters", "smooth") if getattr(self, key))
            problems += [(f".{key}", "slerp has no such key; leave it out") for key in given]
        if problems:
            raise InvalidValue(*problems)
        return self


def read_definition(source: object) -> Definition:
    """The genome of a mapping: that below ``genome`` in a configuration, or the whole configuration.

    mergekit's own ``ModelGenomeDefinition`` is taken too. Raises ``RecipeError`` with every problem.
    """
    given: Any = source.model_dump(mode="json") if hasattr(source, "model_dump") else source
    if not isinstance(given, Mapping):
        raise RecipeError(f"genome: must be a map of keys to values, not {shown(given)}")
    given = given.get("genome", given)
    try:
        return Definition.model_validate(given)
    except ValidationError as error:
        raise RecipeError([f"genome: {line}" for line in describe(error, _known_keys)]) from None


def _known_keys(place: Place) -> Collection[str]:
    return Definition.model_fields
