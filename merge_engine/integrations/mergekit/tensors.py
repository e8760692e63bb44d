"""mergekit's functions for tensors in memory, computed by the engine. mergekit need not be installed."""

from __future__ import annotations

import reprlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from merge_engine.errors import OptionError, PlanError
from merge_engine.integrations.mergekit.arguments import bound, check_dtype, check_ids, inputs_of
from merge_engine.integrations.mergekit.merging import merge_one
from merge_engine.methods import Method, find_method
from merge_engine.text import some

StateDictLike: TypeAlias = "Mapping[str, torch.Tensor] | torch.nn.Module"


def merge_tensors(
    tensors: Sequence[torch.Tensor],
    method: str,
    *,
    parameters: Mapping[str, Any] | None = None,
    ids: Sequence[Hashable] | None = None,
    base_index: int | None = None,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Merge tensors of one shape, with the arguments of mergekit's function of this name.

    ``ids`` name the inputs, by default 0, 1, ...; ``base_index`` is the position of the base model's tensor. A
    parameter that each model has, such as ``weight``, is one value for all, a list in the order of the inputs without
    the base, or a mapping by id. ``dtype`` is what inputs are rounded to before the merge, by default their promoted
    type; ``out_dtype`` is that of the result. Autograd follows the inputs that require gradients. Raises
    ``MergeError``, which is a ``ValueError``.
    """
    known = list(range(len(tensors))) if ids is None else list(ids)
    if len(known) != len(tensors):
        raise OptionError(f"ids: {len(known)} for {len(tensors)} tensors; give one for each")
    if base_index is not None and not 0 <= base_index < len(tensors):
        raise OptionError(
            f"base_index: must be the position of one of {len(tensors)} tensors, not {base_index}"
        )
    check_dtype("dtype", dtype)
    check_dtype("out_dtype", out_dtype)
    base = None if base_index is None else known[base_index]
    check_ids(known, base)
    found = find_method(method)
    return _merged(found, tensors, known, base, parameters or {}, name, dtype, out_dtype)


def merge_state_dicts(
    models: Mapping[Hashable, StateDictLike] | Sequence[StateDictLike],
    method: str,
    *,
    parameters: Mapping[str, Any] | None = None,
    base: Hashable | None = None,
    strict: bool = True,
    dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    batch_options: object = None,
) -> dict[str, torch.Tensor]:
    """Merge state dicts or modules, with the arguments of mergekit's function of this name.

    ``models`` are a list, whose ids are 0, 1, ..., or a mapping by id; ``base`` is the id of the base model. All have
    tensors of the same names; with ``strict=False`` those are merged that all have. Tensors that are not floating-point
    are copied, and must be equal in all models. Results are in the order of the first model. The engine packs nothing,
    so ``batch_options`` has no effect. For the rest see ``merge_tensors``.
    """
    check_dtype("dtype", dtype)
    check_dtype("out_dtype", out_dtype)
    items = list(models.items()) if isinstance(models, Mapping) else list(enumerate(models))
    ids = [one for one, _ in items]
    if not items:
        raise OptionError("models: at least one is needed")
    check_ids(ids, base)
    held = [_state_dict(one, model) for one, model in items]
    found = find_method(method)
    merged = {}
    for name in _names(ids, held, strict):
        tensors = [tensors[name] for tensors in held]
        if all(tensor.is_floating_point() for tensor in tensors):
            merged[name] = _merged(found, tensors, ids, base, parameters or {}, name, dtype, out_dtype)
        else:
            merged[name] = _copied(name, tensors)
    return merged


def _merged(
    method: Method,
    tensors: Sequence[torch.Tensor],
    ids: Sequence[Hashable],
    base: Hashable | None,
    parameters: Mapping[str, Any],
    name: str | None,
    dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    origin, others = inputs_of(method, ids, base)
    return merge_one(
        method.name,
        None if origin is None else tensors[origin],
        [tensors[i] for i in others],
        bound(method, parameters, [ids[i] for i in others]),
        name=name,
        dtype=dtype,
        out_dtype=out_dtype,
    )


def _state_dict(model: Hashable, given: object) -> Mapping[str, torch.Tensor]:
    if isinstance(given, torch.nn.Module):
        return given.state_dict(keep_vars=True)
    if not isinstance(given, Mapping):
        kind = type(given).__qualname__
        raise PlanError(f"{model!r}: must be a module or a state dict, not an object of type {kind}")
    return given


def _names(
    ids: Sequence[Hashable], held: Sequence[Mapping[str, torch.Tensor]], strict: bool
) -> Sequence[str]:
    """The names to merge, in the order of the first model."""
    shared = [name for name in held[0] if all(name in tensors for tensors in held)]
    every = dict.fromkeys(name for tensors in held for name in tensors)
    if strict and len(shared) < len(every):
        raise PlanError(
            [
                f"{one!r}: lacks {some([name for name in every if name not in tensors])}, which other models have; "
                "strict=False merges what all have"
                for one, tensors in zip(ids, held, strict=True)
                if len(tensors) < len(every)
            ]
        )
    return shared


def _copied(name: str, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The tensor that all models hold. Raises ``PlanError`` if they differ."""
    first = tensors[0]
    if any(tensor.dtype != first.dtype or not torch.equal(tensor, first) for tensor in tensors[1:]):
        raise PlanError(
            f"{name}: is {reprlib.repr(first.dtype)}, which is copied and not merged, but the models hold different "
            "values; leave it out, or give all models the same"
        )
    return first.clone()
