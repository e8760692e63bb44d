"""From what ``Session.merge`` is asked for to a recipe over the session's models."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from merge_engine.methods import find_method
from merge_engine.recipe import ModelReference, Recipe, RecipeSource, load_recipe
from merge_engine.recipe.changes import changed


def recipe_of(
    loaded: Recipe,
    references: Collection[ModelReference],
    what: RecipeSource | None,
    changes: Mapping[str, object],
) -> Recipe:
    """The recipe that ``what`` and ``changes`` mean: see ``Session.merge``.

    ``loaded`` is the recipe that the session was loaded with, and names all models. ``references`` are the names that
    the models have in the session. Raises ``RecipeError``.
    """
    if what is None:
        recipe = loaded
    elif isinstance(what, str) and what.isidentifier():
        recipe = with_method(loaded, what)
    else:
        recipe = _as_loaded(load_recipe(what), references)
    return changed(recipe, changes, find_method) if changes else recipe


def _as_loaded(recipe: Recipe, references: Collection[ModelReference]) -> Recipe:
    """The recipe with the names that the models were loaded by, in place of other paths to the same folders."""
    known = {_place(reference): reference for reference in references}
    others = [each for each in recipe.references if each not in references and _place(each) in known]
    return recipe.replacing({each: known[_place(each)] for each in others}) if others else recipe


def _place(reference: ModelReference) -> tuple[object, ...]:
    lora = None if reference.lora is None else _place(reference.lora)
    return Path(reference.path).expanduser().resolve(), reference.revision, lora


def with_method(recipe: Recipe, name: str) -> Recipe:
    """The recipe with another method, and with those of its parameters that the method has. Weights default to 1."""
    declared = {parameter.name for parameter in find_method(name).parameters}
    scopes = list(recipe.stacks.scopes)
    given = {setting for scope in scopes for setting in scope.settings}
    recipe = recipe.without({scope.place: scope.settings.keys() - declared for scope in scopes})
    if "weight" in declared - given:
        recipe = recipe.setting({"parameters": {"weight": 1.0}})
    return recipe.model_copy(update={"merge_method": name})
