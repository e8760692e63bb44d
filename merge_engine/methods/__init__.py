"""Merge methods: each says what to measure, how to solve, and which operation to apply."""

from __future__ import annotations

from merge_engine.errors import RecipeError
from merge_engine.methods.base import MergeTask, Method, Operation, Program, Share, Solution
from merge_engine.methods.linear import Linear, Passthrough
from merge_engine.methods.task_arithmetic import FAMILY
from merge_engine.recipe.problems import suggestion

__all__ = [
    "METHODS",
    "MergeTask",
    "Method",
    "Operation",
    "Program",
    "Share",
    "Solution",
    "find_method",
]

METHODS: dict[str, Method] = {method.name: method for method in (Linear(), Passthrough(), *FAMILY)}


def find_method(name: str) -> Method:
    """The method of this name. Raises ``RecipeError`` that names the nearest one, or all if none is near."""
    if name in METHODS:
        return METHODS[name]
    raise RecipeError(f'merge_method: there is no method "{name}"{suggestion(name, METHODS)}')
