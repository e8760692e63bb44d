"""The arguments of mergekit's functions: inputs with ids, and parameters by id, in order, or one for all."""

from __future__ import annotations

import reprlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch

from merge_engine.dtypes import MERGEABLE
from merge_engine.errors import OptionError
from merge_engine.methods import Method


def check_ids(ids: Sequence[Hashable], base: Hashable | None) -> None:
    """Raise ``OptionError`` for ids that are None, repeated or no keys, and for a base that is no input."""
    problems = []
    if any(one is None for one in ids):
        problems.append("ids: an input's id cannot be None; give it another")
    try:
        if len(set(ids)) < len(ids):
            problems.append("ids: two inputs have the same id; give each its own")
    except TypeError:
        problems.append(f"ids: an id must be hashable, such as a text, not {reprlib.repr(ids)}")
    if base is not None and base not in ids:
        problems.append(
            f"base: {reprlib.repr(base)} is not the id of an input; choose one of {list(ids)!r:.200}"
        )
    if problems:
        raise OptionError(problems)


def check_dtype(name: str, dtype: torch.dtype | None) -> None:
    """Raise ``OptionError`` for a dtype that merges cannot have."""
    allowed = [getattr(torch, each.name) for each in MERGEABLE]
    if dtype is not None and dtype not in allowed:
        raise OptionError(
            f"{name}: must be a floating-point torch.dtype, one of {', '.join(map(str, allowed))}, not "
            f"{reprlib.repr(dtype)}"
        )


def inputs_of(method: Method, ids: Sequence[Hashable], base: Hashable | None) -> tuple[int | None, list[int]]:
    """The position of the base, None without one, and those of the models. Raises ``OptionError`` without a base.

    For a method that uses no base, the base is a model like the others.
    """
    if not method.uses_base:
        return None, list(range(len(ids)))
    if base is None:
        if method.requires_base:
            raise OptionError(f"{method.name}: requires a base input; say which one it is")
        return None, list(range(len(ids)))
    at = list(ids).index(base)
    return at, [i for i in range(len(ids)) if i != at]


def bound(method: Method, parameters: Mapping[str, Any], models: Sequence[Hashable]) -> dict[str, Any]:
    """The parameters with one value for all models, or a list with one for each. ``models`` are the models' ids.

    Values by id may name other inputs too. Raises ``OptionError`` for values that are missing or too many.
    """
    scopes = {parameter.name: parameter.scope for parameter in method.parameters}
    problems, values = [], {}
    for name, value in parameters.items():
        values[name] = value
        if scopes.get(name) != "model":
            continue
        if isinstance(value, Mapping):
            missing = [one for one in models if one not in value]
            if missing:
                problems.append(f"{name}: has no value for {missing!r:.200}; add one for each input")
            else:
                values[name] = [value[one] for one in models]
        elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
            if len(value) != len(models):
                problems.append(
                    f"{name}: {len(value)} values for {len(models)} inputs; give one for each, or one for all"
                )
            values[name] = list(value)
    for parameter in method.parameters:
        if parameter.required and parameter.name not in parameters and models:
            problems.append(f"{parameter.name}: required by {method.name}; add it to parameters")
    if problems:
        raise OptionError(problems)
    return values
