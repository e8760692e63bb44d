"""Losses to the election, by layer and by kind of tensor (the analysis of Tao et al., Findings of EMNLP 2024)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from merge_engine.observe.result import MergeResult, ModelCounts, TensorResult
from merge_engine.recipe import layer_of

Counts = dict[int, ModelCounts]
"""By recipe position."""


class Place(NamedTuple):
    """The place of a tensor in a model: its stack of layers, its layer in the stack, and its kind.

    ``model.layers.3.mlp.up_proj.weight`` is ``mlp.up_proj`` in layer 3 of ``model.layers``. Outside the layers
    ``layer`` is None and ``stack`` empty. A further number in the name, such as an expert's, becomes ``*``.
    """

    stack: str
    layer: int | None
    kind: str

    @classmethod
    def of(cls, name: str) -> Place:
        """The place of the tensor with this name."""
        stack, layer, rest = layer_of(name) or ("", None, name)
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", rest.removesuffix(".weight"))
        return cls(stack, layer, kind or rest)


@dataclass
class Discards:
    """Counts of a merge, summed up. Shares are properties of ``ModelCounts``: ``lost_share``, ``saved_share``.

    ``total``: over all tensors. ``by_layer``: by stack and layer. ``by_kind``: by kind of tensor, all layers
    together. If a slack relaxed one trim over the whole model, only ``total`` counts the entries that it saved.
    """

    total: Counts
    by_layer: dict[tuple[str, int], Counts] = field(default_factory=dict)
    by_kind: dict[str, Counts] = field(default_factory=dict)


def discards(result: MergeResult) -> Discards:
    """Each model's entries that the election of a merge discarded and that slack saved. See ``Discards``."""
    return sum_up(result.per_tensor, result.counts)


def sum_up(tensors: Iterable[TensorResult], total: Counts) -> Discards:
    """Counts of tensors by layer and by kind. ``total`` are the counts of all of them."""
    result = Discards(total)
    for tensor in tensors:
        if not tensor.counts:
            continue
        place = Place.of(tensor.name)
        groups = [result.by_kind.setdefault(place.kind, {})]
        if place.layer is not None:
            groups.append(result.by_layer.setdefault((place.stack, place.layer), {}))
        for group in groups:
            for model, counts in tensor.counts.items():
                group[model] = group.get(model, ModelCounts()) + counts
    return result
