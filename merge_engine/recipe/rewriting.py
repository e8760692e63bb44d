"""Walks through all maps of a recipe: the models that it names, other models, other settings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

from pydantic import BaseModel

from merge_engine.recipe.reference import ModelReference


def models_in(value: object) -> Iterator[ModelReference]:
    """Every model that a part of a recipe names, in order, as often as it names it."""
    if isinstance(value, ModelReference):
        yield value
    elif isinstance(value, BaseModel):
        for key in type(value).model_fields:
            yield from models_in(getattr(value, key))
    elif isinstance(value, tuple):
        for each in value:
            yield from models_in(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from models_in(each)


def with_models(value: object, models: Mapping[ModelReference, ModelReference]) -> object:
    """The part of a recipe with other models in place of some."""
    if isinstance(value, ModelReference):
        return models.get(value, value)
    if isinstance(value, BaseModel):
        fields = {key: with_models(getattr(value, key), models) for key in value.model_fields_set}
        return value.model_copy(update=fields)
    if isinstance(value, tuple):
        return tuple(with_models(each, models) for each in value)
    if isinstance(value, dict):
        return {key: with_models(each, models) for key, each in value.items()}
    return value


def with_maps(
    value: object,
    places: Collection[str],
    change: Callable[[str, dict[str, object]], dict[str, object]],
    place: str = "",
) -> object:
    """The part of a recipe at a place with other maps of parameters at ``places``, such as ``models[0].parameters``.

    ``change`` makes them, from the place and the map there, which is empty if the recipe leaves it out.
    """
    if place in places and isinstance(value, dict):
        return change(place, value)
    if isinstance(value, ModelReference):
        return value
    if isinstance(value, BaseModel):
        below = f"{place}." if place else ""
        fields = {
            key: with_maps(getattr(value, key), places, change, below + key)
            for key in type(value).model_fields
            if key in value.model_fields_set or below + key in places
        }
        return value.model_copy(update=fields)
    if isinstance(value, tuple):
        return tuple(with_maps(each, places, change, f"{place}[{i}]") for i, each in enumerate(value))
    if isinstance(value, dict):
        return {key: with_maps(each, places, change, f"{place}.{key}") for key, each in value.items()}
    return value
