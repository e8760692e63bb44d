"""Merge methods: each says what to measure, how to solve, and which operation to apply."""

from __future__ import annotations

import difflib

from merge_engine.errors import RecipeError
from merge_engine.methods.base import MergeTask, Method, Operation, Program, Share, Solution
from merge_engine.methods.linear import Linear, Passthrough
from merge_engine.methods.task_arithmetic import FAMILY

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
    """The method of this name. Raises ``RecipeError`` that names the nearest one."""
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, n=1)
    hint = f'; did you mean "{near[0]}"?' if near else ""
    raise RecipeError(
        f'merge_method: there is no method "{name}"{hint} The methods are {", ".join(METHODS)}.'
    )
