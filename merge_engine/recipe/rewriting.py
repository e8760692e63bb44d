"""Walks through all maps of a recipe: the models that it names, other models, fewer and other settings."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

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


def without_settings(value: object, names: Mapping[str, Collection[str]], place: str = "") -> object:
    """The part of a recipe at a place without some settings.

    ``names`` has the names of parameters by the place of their map, such as ``models[0].parameters``.
    """
    if place in names and isinstance(value, dict):
        return {key: each for key, each in value.items() if key not in names[place]}
    if isinstance(value, ModelReference):
        return value
    if isinstance(value, BaseModel):
        below = f"{place}." if place else ""
        fields = {
            key: without_settings(getattr(value, key), names, below + key) for key in value.model_fields_set
        }
        return value.model_copy(update=fields)
    if isinstance(value, tuple):
        return tuple(without_settings(each, names, f"{place}[{i}]") for i, each in enumerate(value))
    if isinstance(value, dict):
        return {key: without_settings(each, names, f"{place}.{key}") for key, each in value.items()}
    return value


def with_settings(value: object, settings: Mapping[str, Mapping[str, object]], place: str = "") -> object:
    """The part of a recipe at a place with more settings, in place of those of the same name.

    ``settings`` has the parameters by the place of their map, such as ``models[0].parameters``.
    """
    if place in settings and isinstance(value, dict):
        return {**value, **settings[place]}
    if isinstance(value, ModelReference):
        return value
    if isinstance(value, BaseModel):
        below = f"{place}." if place else ""
        fields = {
            key: with_settings(getattr(value, key), settings, below + key)
            for key in type(value).model_fields
            if key in value.model_fields_set or below + key in settings
        }
        return value.model_copy(update=fields)
    if isinstance(value, tuple):
        return tuple(with_settings(each, settings, f"{place}[{i}]") for i, each in enumerate(value))
    if isinstance(value, dict):
        return {key: with_settings(each, settings, f"{place}.{key}") for key, each in value.items()}
    return value
