"""Grids: a recipe with every combination of some values."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

from merge_engine.errors import MergeError, RecipeError
from merge_engine.methods import find_method
from merge_engine.recipe import Recipe, RecipeSource, load_recipe
from merge_engine.recipe.changes import changed
from merge_engine.sweeps.messages import for_each
from merge_engine.text import shown

MOST = 4096
"""Recipes of a sweep. Each of them has an output open while all are merged."""


class Grid(dict[str, Recipe]):
    """The recipes of a grid by label, such as ``density=0.2,sign_slack=0``.

    ``changes`` has what distinguishes each of them: its value on each axis.
    """

    changes: Mapping[str, Mapping[str, object]]

    def __init__(self, recipes: Mapping[str, Recipe], changes: Mapping[str, Mapping[str, object]]):
        super().__init__(recipes)
        self.changes = changes


def grid(recipe: RecipeSource, **axes: Iterable[object]) -> Grid:
    """The recipes with every combination of values.

    ``recipe`` is one recipe (see ``load_recipe``). ``axes`` has lists of values by name, the last one changing fastest.
    A name is a parameter (``density``), a parameter of one model (``**{"weight[1]": [0.5, 1]}``), or a key of the
    recipe (``dtype``); for what each means see ``recipe/changes.py``.

    Raises ``RecipeError`` with one line for each name that does not exist and each value that is not allowed, for a
    grid without recipes or with more than 4,096, and for a value that stands twice on an axis.
    """
    base = load_recipe(recipe)
    if problems := _no_lists(axes):
        raise RecipeError(problems)
    lists = {name: list(values) for name, values in axes.items()}
    if problems := _wrong_lists(lists) or _wrong_values(base, lists):
        raise RecipeError(problems)
    points = [dict(zip(lists, values, strict=True)) for values in product(*lists.values())]
    changes = {label_of(point): point for point in points}
    labels = list(changes)
    recipes = for_each(labels, lambda number: changed(base, changes[labels[number]], find_method))
    return Grid(dict(zip(labels, recipes, strict=True)), changes)


def label_of(point: Mapping[str, object]) -> str:
    """The label of a recipe with these values: ``density=0.2,weight=[0.5,1]``."""
    return ",".join(f"{name}={_text(value)}" for name, value in point.items())


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, separators=(",", ":"), default=str, ensure_ascii=False)


def _no_lists(axes: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}: must be a list of values, not {shown(values)}; write [{_text(values)}]"
        for name, values in axes.items()
        if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable)
    ]


def _wrong_lists(axes: Mapping[str, Sequence[object]]) -> list[str]:
    """The problems of the axes, whatever their names and values mean."""
    if not axes:
        return ["the grid has no axes; name at least one, such as density=[0.2, 0.5]"]
    problems = []
    for name, values in axes.items():
        texts = [_text(value) for value in values]
        if not texts:
            problems.append(f"{name}: has no values, so the grid is empty")
        problems += [
            f"{name}: has the value {text} twice" for text in dict.fromkeys(texts) if texts.count(text) > 1
        ]
    count = math.prod(map(len, axes.values()))
    if count > MOST:
        problems.append(f"the grid has {count:,} recipes; at most {MOST:,} are merged at a time")
    return problems


def _wrong_values(base: Recipe, axes: Mapping[str, Sequence[object]]) -> list[str]:
    """The problems of each value on its own, each once. Those of the method change what is known."""
    if "merge_method" in axes:
        return []  # which parameters there are depends on the method: each recipe says it
    problems: dict[str, None] = {}
    for name, values in axes.items():
        for value in values:
            try:
                changed(base, {name: value}, find_method)
            except MergeError as error:
                problems |= dict.fromkeys(error.problems)
    return list(problems)
