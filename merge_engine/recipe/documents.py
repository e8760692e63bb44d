"""Several recipes that refer to each other by name: what one makes is an input of another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from merge_engine.errors import RecipeError
from merge_engine.recipe.schema import Recipe
from merge_engine.text import shown, some

_LONGEST_NAME = 200
"""Bytes in the name of a recipe, which is that of a folder."""

_MOST_CIRCLES = 20
"""So many are reported: few recipes can have very many."""

_TAKEN = ("base", "union")
"""Names that mean something else as the source of a tokenizer."""


def parts_of(recipe: Recipe, names: Mapping[str, object]) -> list[str]:
    """The names, of those given, that a recipe refers to, each once."""
    return list(dict.fromkeys(model.path for model in recipe.named_models if model.path in names))


def in_order(recipes: Sequence[Recipe], prefix: str = "") -> tuple[Recipe, ...]:
    """Recipes in an order in which each comes after those that it refers to, and else in the given order.

    One without a name, which none can refer to, comes last. ``prefix`` begins each message. Raises ``RecipeError`` for
    names that no folder can have or that are not unique, for several recipes without one, and for references in a
    circle.
    """
    if len(recipes) == 1:
        return tuple(recipes)
    if problems := [prefix + line for line in (*_wrong_names(recipes), *_wrong_references(recipes))]:
        raise RecipeError(problems)
    named = {recipe.name: recipe for recipe in recipes if recipe.name is not None}
    order: dict[str, Recipe] = {}
    circles: list[str] = []
    for name in named:
        _visit(name, named, order, circles)
    if circles:
        raise RecipeError([prefix + line for line in circles])
    return (*order.values(), *(recipe for recipe in recipes if recipe.name is None))


def _visit(start: str, named: Mapping[str, Recipe], order: dict[str, Recipe], circles: list[str]) -> None:
    """Add a recipe to ``order``, after those that it refers to. Of references in a circle one line tells."""
    way = {start: iter(parts_of(named[start], named))} if start not in order else {}
    while way:
        name = next(reversed(way))
        below = next(way[name], None)
        if below is None:
            order[name] = named[name]
            del way[name]
        elif below in way:
            if len(circles) == _MOST_CIRCLES:
                continue
            names = [*way]
            circle = [*names[names.index(below) :], below]
            circles.append(f"recipes refer to each other in a circle: {' -> '.join(map(shown, circle))}")
        elif below not in order:
            way[below] = iter(parts_of(named[below], named))


def _wrong_names(recipes: Sequence[Recipe]) -> list[str]:
    names = Counter(recipe.name for recipe in recipes if recipe.name is not None)
    lines = [
        f"name: {shown(name)} is the name of {count} recipes; give each its own"
        for name, count in names.items()
        if count > 1
    ]
    lines += [
        f"name: {shown(name)} cannot be the name of a folder; choose another"
        for name in names
        if not _fits(name)
    ]
    lines += [
        f"name: {shown(name)} means something else as a tokenizer's source; choose another"
        for name in names
        if name in _TAKEN
    ]
    if (unnamed := len(recipes) - names.total()) > 1:
        lines.append(
            f"{unnamed} of {len(recipes)} recipes have no name; only that of the result may have none"
        )
    return lines


def _fits(name: str) -> bool:
    forbidden = {"/", "\\", "\0"} & set(name) or name.startswith(".") or name.endswith(".part")
    return not forbidden and len(name.encode("utf-8", "replace")) <= _LONGEST_NAME


def _wrong_references(recipes: Sequence[Recipe]) -> list[str]:
    names = {recipe.name for recipe in recipes if recipe.name is not None}
    wrong = [
        str(model)
        for recipe in recipes
        for model in recipe.named_models
        if model.path in names and model.revision is not None
    ]
    return [f"{some(wrong)}: a recipe's output has no revision; leave it out"] if wrong else []
