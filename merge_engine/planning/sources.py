"""The inputs of each slice of a recipe, from opened checkpoints, and the config of what is stacked of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from merge_engine.checkpoint import Checkpoint, LayerOrigin, stacked_config, tie_flag
from merge_engine.methods import Method
from merge_engine.planning.inputs import Catalogue, Inputs
from merge_engine.planning.modules import Stack
from merge_engine.recipe import ModelReference, Recipe, Slice


def slice_inputs(
    recipe: Recipe, method: Method, opened: Mapping[ModelReference, Checkpoint], donor: Checkpoint
) -> list[Inputs]:
    """The inputs of each slice, with all their tensors. The donor is the reference of all.

    A source that is the base of its slice is the base, however its path is written. If the base stands there once more
    with other layers, that is a model.
    """
    positions = enumerate(recipe.stacks.models)
    models = {i: _catalogue(opened[reference], i) for i, reference in positions}
    bases: dict[int, Catalogue] = {}
    found = []
    for each in recipe.stacks.slices:
        base = opened[each.base] if method.uses_base and each.base is not None else None
        if base is not None and id(base) not in bases:
            bases[id(base)] = _catalogue(base)
        merged = _besides(each, base, opened)
        found.append((None if base is None else bases[id(base)], {i: models[i] for i in merged}))
    used = [catalogue for _, merged in found for catalogue in merged.values()]
    own = [catalogue for catalogue in (*bases.values(), *used) if catalogue.tensors is donor.tensors]
    reference = own[0] if own else _catalogue(donor)
    return [Inputs(base, merged, reference) for base, merged in found]


def stack_config(
    config: dict[str, Any], origins: Mapping[Stack, Sequence[LayerOrigin]]
) -> tuple[dict[str, Any], list[str]]:
    """The donor's config for an output with these layers, and warnings about what it cannot say."""
    warnings = []
    for stack, layers in origins.items():
        config, found = stacked_config(config, stack.kind, stack.alone, stack.count, layers)
        warnings += found
    return config, warnings


def _besides(of: Slice, base: Checkpoint | None, opened: Mapping[ModelReference, Checkpoint]) -> list[int]:
    """The positions of the sources that are not the base."""
    is_base = [opened[source.model] is base for source in of.sources]
    first = next((source.layers for source, same in zip(of.sources, is_base, strict=True) if same), None)
    return [
        source.position
        for source, same in zip(of.sources, is_base, strict=True)
        if not same or source.layers != first
    ]


def _catalogue(checkpoint: Checkpoint, position: int | None = None) -> Catalogue:
    config = checkpoint.config
    return Catalogue(checkpoint.label, checkpoint.tensors, tie_flag(config), position, config)
