"""The experts of a mixture in two layouts: a tensor for each expert, or one tensor for all (transformers 5).

In the second, ``experts.gate_up_proj`` [experts, 2 * intermediate, hidden] holds for each expert the rows of its gate
and then those of its up projection, and ``experts.down_proj`` [experts, hidden, intermediate] its down projection. So
both layouts hold the same elements in runs, and a model gets the layout of the reference without computing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from merge_engine.fit import Remarks
from merge_engine.operands import Joined, Operand, Part
from merge_engine.planning.inputs import Catalogue, Inputs, map_all

_EXPERT = re.compile(
    r"(.*)\.(mlp|block_sparse_moe)\.experts\.([0-9]+)\.(w[123]|(?:gate|up|down)_proj)\.weight"
)
_FUSED = re.compile(r"(.*)\.mlp\.experts\.(gate_up_proj|down_proj)")
_ROUTER = re.compile(r"(.*)\.(mlp|block_sparse_moe)\.gate\.weight")
_NAMES = {
    "block_sparse_moe": {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)},
    "mlp": {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)},
}
"""By the block's name: the projections of one expert that each fused tensor is made of, in order."""


def match_experts(slices: Sequence[Inputs], remarks: Remarks) -> list[Inputs]:
    """The inputs of all slices with the experts in the layout of their one reference.

    There is a note for each model that has the other layout.
    """
    reference = slices[0].reference
    if reference is None:
        return list(slices)
    fused = {name for name in reference.tensors if _FUSED.fullmatch(name)}
    single = any(_EXPERT.fullmatch(name) for name in reference.tensors)

    def matched(catalogue: Catalogue) -> Catalogue:
        if catalogue is reference or catalogue.names == reference.names:
            return catalogue
        convert = _joined if fused else _taken_apart if single else None
        found = {} if convert is None else convert(catalogue, reference)
        if not found:
            return catalogue
        remarks.notes.append(
            f"{catalogue.label}: its experts are read in the layout of {reference.label}: "
            + ("one tensor for all experts of a layer" if fused else "tensors for each expert")
        )
        kept = {name: each for name, each in catalogue.tensors.items() if _layer_of(name) not in found}
        return catalogue.holding(kept | {name: each for new in found.values() for name, each in new.items()})

    return map_all(slices, matched)


def _layer_of(name: str) -> str | None:
    """The layer whose experts or router a tensor belongs to; None for other tensors."""
    found = _EXPERT.fullmatch(name) or _FUSED.fullmatch(name) or _ROUTER.fullmatch(name)
    return None if found is None else found[1]


def _joined(catalogue: Catalogue, reference: Catalogue) -> dict[str, dict[str, Operand]]:
    """By layer the fused tensors of the reference, each made of a model's single ones.

    A layer that lacks some, or has others, is left as it is.
    """
    experts: dict[tuple[str, str], dict[int, dict[str, Operand]]] = {}
    for name, operand in catalogue.tensors.items():
        if found := _EXPERT.fullmatch(name):
            layer, block, number, projection = found.groups()
            experts.setdefault((layer, block), {}).setdefault(int(number), {})[projection] = operand
    result: dict[str, dict[str, Operand]] = {}
    for (layer, block), of_layer in experts.items():
        new: dict[str, Operand] = {}
        for fused, projections in _NAMES[block].items():
            there = reference.tensors.get(f"{layer}.mlp.experts.{fused}")
            parts = [of_layer.get(i, {}).get(each) for i in range(len(of_layer)) for each in projections]
            whole = [part for part in parts if part is not None]
            if there is not None and len(whole) == len(parts) and _fit(whole, there):
                new[f"{layer}.mlp.experts.{fused}"] = Joined(tuple(whole), there.shape)
        own = sum(each.count for expert in of_layer.values() for each in expert.values())
        if sum(each.count for each in new.values()) == own:
            result[layer] = new | _router(catalogue, layer, block, "mlp")
    return result


def _taken_apart(catalogue: Catalogue, reference: Catalogue) -> dict[str, dict[str, Operand]]:
    """By layer the single tensors of the reference, each a part of a model's fused one.

    A layer of which some elements would be left over is left as it is.
    """
    result: dict[str, dict[str, Operand]] = {}
    for name, operand in reference.tensors.items():
        if not (found := _EXPERT.fullmatch(name)):
            continue
        layer, block, number, projection = found.groups()
        fused, projections = next(each for each in _NAMES[block].items() if projection in each[1])
        whole = catalogue.tensors.get(f"{layer}.mlp.experts.{fused}")
        if whole is None or not _holds(whole, operand, len(projections), int(number)):
            continue
        place = int(number) * len(projections) + projections.index(projection)
        new = result.setdefault(layer, _router(catalogue, layer, "mlp", block))
        new[name] = Part(whole, place * operand.count, operand.shape)
    left = {layer: -_elements(new.values()) for layer, new in result.items()}
    for name, operand in catalogue.tensors.items():
        if (found := _FUSED.fullmatch(name)) and found[1] in left:
            left[found[1]] += operand.count
    return {layer: new for layer, new in result.items() if not left[layer]}


def _elements(operands: Iterable[Operand]) -> int:
    """Elements of the parts; the router is none."""
    return sum(each.count for each in operands if isinstance(each, Part))


def _router(catalogue: Catalogue, layer: str, old: str, new: str) -> dict[str, Operand]:
    """The router of a layer under its name in another block."""
    operand = catalogue.tensors.get(f"{layer}.{old}.gate.weight")
    return {} if operand is None else {f"{layer}.{new}.gate.weight": operand}


def _fit(parts: Sequence[Operand], fused: Operand) -> bool:
    """Whether the parts are matrices of one shape and dtype, which together have the shape of a fused tensor."""
    if len({(part.dtype, part.shape) for part in parts}) != 1 or len(fused.shape) != 3:
        return False
    experts, rows, columns = fused.shape
    shape = parts[0].shape
    fits = len(shape) == 2 and len(parts) * shape[0] == experts * rows and shape[1] == columns
    return fits and parts[0].dtype.mergeable


def _holds(fused: Operand, single: Operand, rows: int, number: int) -> bool:
    """Whether a fused tensor has this expert, with matrices of the shape of a single one."""
    shape = single.shape
    return (
        fused.dtype.mergeable
        and len(shape) == 2
        and len(fused.shape) == 3
        and number < fused.shape[0]
        and fused.shape[1:] == (rows * shape[0], shape[1])
    )
