"""Gradients: settings that change over the layers of a model.

A tensor's layer position t runs from 0 (first layer) to 1 (last). Tensors outside the layers (embeddings, final norm,
output head) have t = 0, so a gradient gives all of them its *first* value. This is mergekit's rule; a filter such as
``lm_head`` gives the tensors after the layers a value of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from merge_engine.recipe.settings import Scalar

_LAYER = re.compile(r"(?:^|\.)([0-9]+)\.")


def layer_of(name: str) -> tuple[str, int, str] | None:
    """A tensor's stack of layers, its index in it, and the rest of its name; None outside the layers."""
    found = _LAYER.search(name)
    return None if found is None else (name[: found.start()], int(found[1]), name[found.end() :])


def layer_positions(names: Iterable[str]) -> dict[str, float]:
    """The layer position t in [0, 1] of each tensor, by name.

    The first whole number between dots is the layer's index i, and the text before it names the stack of layers. With
    n - 1 the highest index of the stack, t = i / (n - 1), or 1 if n is 1.
    """
    layers: dict[str, tuple[str, int] | None] = {}
    last: dict[str, int] = {}
    for name in names:
        found = layer_of(name)
        if found is None:
            layers[name] = None
            continue
        stack, index, _ = found
        layers[name] = stack, index
        last[stack] = max(index, last.get(stack, 0))
    return {
        name: 0.0 if layer is None else _position(layer[1], last[layer[0]]) for name, layer in layers.items()
    }


def _position(index: int, last: int) -> float:
    return index / last if last else 1.0


def value_at(values: tuple[Scalar, ...], t: float) -> Scalar:
    """The value of a gradient at layer position t.

    Numbers are interpolated linearly between neighbours, as floats. For m other values, it is the one at index
    int(t * (m - 1)). A single value holds everywhere.
    """
    if len(values) == 1:
        return values[0]
    place = t * (len(values) - 1)
    index = int(place)
    here, after = values[index], values[min(index + 1, len(values) - 1)]
    if isinstance(here, bool | str) or isinstance(after, bool | str):
        return here
    rest = place - index
    return (1 - rest) * here + rest * after
