"""The known methods: ours, those that a program registers, and those that installed packages announce."""

from __future__ import annotations

import reprlib
from importlib.metadata import entry_points
from typing import TypeVar

from merge_engine.errors import RecipeError
from merge_engine.methods.base import Method
from merge_engine.methods.geometric import GEOMETRIC
from merge_engine.methods.linear import Linear, Passthrough
from merge_engine.methods.overlap import NearSwap, Ram, RamPlus
from merge_engine.methods.scored import ArceeFusion, Sce
from merge_engine.methods.task_arithmetic import FAMILY
from merge_engine.recipe.problems import suggestion
from merge_engine.text import shown

ENTRY_POINTS = "merge_engine.methods"
"""The group of entry points in which a package names its methods: classes or objects."""

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Linear(),
        Passthrough(),
        *GEOMETRIC,
        *FAMILY.values(),
        NearSwap(),
        Ram(),
        RamPlus(),
        Sce(),
        ArceeFusion(),
    )
}

_OF_NO_METHOD = frozenset(
    (
        # of mergekit-evolve, and of older versions of mergekit
        *("allow_negative_weights", "consensus_method", "embed_slerp", "layer_granularity", "smooth"),
        # keys of other places
        *("arithmetic", "dtype", "int8_mask", "out_dtype", "pad_to_multiple_of", "seed"),
    )
)
"""Names under ``parameters`` in published recipes that no method has."""

M = TypeVar("M", Method, type[Method])


def register(method: M) -> M:
    """Make a method known by its name; also a decorator for its class.

    Returns its argument. Raises ``ValueError`` when another method has the name, and ``TypeError`` when its
    parameters cannot be declared.
    """
    made = method() if isinstance(method, type) else method
    known = METHODS.get(made.name)
    if known is not None and type(known) is not type(made):
        raise ValueError(f'there is a method "{made.name}" already: {type(known).__qualname__}')
    if len(made.parameters) != len({parameter.name for parameter in made.parameters}):
        raise TypeError(f"{made.name}: Settings and Common declare a parameter of the same name")
    METHODS[made.name] = made
    return method


def find_method(name: str) -> Method:
    """The method of this name. Raises ``RecipeError`` that names the nearest one, or all if none is near."""
    if not isinstance(name, str):
        raise RecipeError(f"merge_method: must be the name of a method, not {reprlib.repr(name)}")
    if name in METHODS:
        return METHODS[name]
    for point in entry_points(group=ENTRY_POINTS, name=name):  # slow: reads about all installed packages
        register(point.load())
        if name in METHODS:
            return METHODS[name]
    raise RecipeError(f"merge_method: there is no method {shown(name)}{suggestion(name, METHODS)}")


def parameter_names() -> frozenset[str]:
    """The names of the parameters of all methods, and what else is known to stand under ``parameters``."""
    return _OF_NO_METHOD.union(p.name for method in METHODS.values() for p in method.parameters)
