"""Whether layers of several models can be stacked: tensors of the same names and shapes in their layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from merge_engine.fit import Remarks
from merge_engine.planning.buffers import is_buffer
from merge_engine.planning.inputs import Catalogue, examples
from merge_engine.planning.modules import Stack

Shape = tuple[int, ...]


def check_stacked(
    stack: Stack,
    models: Sequence[tuple[Catalogue, Mapping[int, Collection[str]]]],
    remarks: Remarks,
) -> None:
    """Report models whose layers are not like those of the first.

    ``models`` come with the names in each of their layers. All layers of a model count, so that it does not matter
    which kinds of layers are taken.
    """
    first, *others = ((model, _shapes(stack, model, layers)) for model, layers in models)
    own = first[1]
    for model, theirs in others:
        alone, missing = sorted(theirs.keys() - own.keys()), sorted(own.keys() - theirs.keys())
        if alone or missing:
            has = f"have {examples(alone)}" if alone else ""
            lacks = f"lack {examples(missing)}" if missing else ""
            remarks.misfit(
                "names",
                f"the layers of {model.label} {' and '.join(filter(None, (has, lacks)))}, unlike those of "
                f"{first[0].label}",
                "stack models of one architecture",
            )
            continue
        differing = [
            f"{name} ({list(min(own[name]))} in {first[0].label}, {list(min(shapes))} in {model.label})"
            for name, shapes in theirs.items()
            if len(shapes) == len(own[name]) == 1 and shapes != own[name]
        ]
        if differing:
            remarks.problems.append(
                f"the layers that are stacked have other shapes: {examples(differing)}; stack models of one size"
            )


def _shapes(stack: Stack, model: Catalogue, layers: Mapping[int, Collection[str]]) -> dict[str, set[Shape]]:
    """The shapes of the tensors in layers, by the rest of their names, without buffers."""
    found: dict[str, set[Shape]] = {}
    for number, names in layers.items():
        start = len(stack.layer(number))
        for name in names:
            operand = model.tensors[name]
            if not is_buffer(name, operand):
                found.setdefault(name[start:], set()).add(operand.shape)
    return found
