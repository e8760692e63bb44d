"""One tensor by the engine, the way that mergekit's users expect it: seeds from torch, and gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from merge_engine.engine.resident import merge_tensors
from merge_engine.integrations.mergekit.gradients import merge_with_gradients, wants_gradients
from merge_engine.methods import find_method
from merge_engine.methods.sparsify import Bernoulli, RankedBernoulli


def merge_one(
    method: str,
    base: torch.Tensor | None,
    models: Sequence[torch.Tensor],
    parameters: Mapping[str, Any],
    *,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Merge one tensor.

    A parameter of scope "model" has one value for all models, or a list with one for each; None is "not set". With no
    models the base is returned. The random methods take their seed from torch's generator, so that
    ``torch.manual_seed`` makes them repeatable. For the rest, and for the errors, see ``merge_engine.merge_tensors``.
    """
    if base is not None and not models:
        return base.to(dtype or base.dtype).to(out_dtype or dtype or base.dtype)
    options = {key: value for key, value in parameters.items() if not _unset(value)}
    if isinstance(getattr(find_method(method), "sparsifier", None), Bernoulli | RankedBernoulli):
        options["seed"] = int(torch.randint(2**63 - 1, (), device="cpu"))
    merge: Callable[..., torch.Tensor] = merge_tensors
    if wants_gradients([*([] if base is None else [base]), *models]):
        merge = merge_with_gradients
    return merge(
        base,
        models,
        method,
        name="tensor" if name is None else name,
        dtype=dtype,
        out_dtype=out_dtype,
        **options,
    )


def _unset(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(one is None for one in value))
