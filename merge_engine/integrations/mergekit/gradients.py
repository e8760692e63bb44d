"""Merging with gradients: the engine's bytes, and the derivatives of the formulas.

The value is that of every other merge. Its derivative comes from plain torch operations on the same inputs: the
reference backend applies the operation that the method solved for, on tensors that autograd follows. What is
differentiated is the arithmetic of the kept entries. Masks, thresholds, random draws and elections are constants, as
they are steps almost everywhere. The rescaling by norms is differentiated, and so are the coefficients of methods
that compute them from the inputs (``formulas``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from merge_engine.backends.operations import Chunk, Combine, Consensus, Line, Mask, Nearswap, Outcome
from merge_engine.backends.reference import ReferenceBackend, real_dtype, round_to
from merge_engine.backends.statistics import BlockSums
from merge_engine.dtypes import BY_NAME
from merge_engine.engine.resident import merge_tensors
from merge_engine.errors import OptionError
from merge_engine.integrations.mergekit.formulas import FORMULAS
from merge_engine.methods import find_method


def wants_gradients(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether autograd is recording and follows one of the tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class NoGradientsError(OptionError):
    """The coefficients of a method depend on its inputs, and no formula of their derivatives is known here."""


def merge_with_gradients(
    base: torch.Tensor | None,
    models: Sequence[torch.Tensor],
    method: str,
    *,
    name: str,
    dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
    **options: Any,
) -> torch.Tensor:
    """What ``merge_tensors`` returns, connected to the inputs for autograd.

    Raises ``NoGradientsError`` for a method without known gradients.
    """
    given = [*([] if base is None else [base]), *models]
    working = dtype or given[0].dtype
    for tensor in given if dtype is None else ():
        working = torch.promote_types(working, tensor.dtype)
    kind = BY_NAME[str(working).removeprefix("torch.")]
    followed = [
        _exactly(tensor.to(working), round_to(tensor.detach(), kind)).to(real_dtype(kind)) for tensor in given
    ]
    backend = _Following(followed)
    exact = merge_tensors(
        base, models, method, name=name, dtype=dtype, out_dtype=out_dtype, backend=backend, **options
    )
    if backend.tells_all:
        return _exactly(backend.merged().view(exact.shape), exact)
    formula = FORMULAS.get(method)
    if formula is None:
        raise NoGradientsError(
            f"{method} has no gradients here; merge under torch.no_grad(), or detach its inputs"
        )
    origin, others = (None, followed) if base is None else (followed[0], followed[1:])
    return _exactly(formula(origin, others, _all_values(method, len(models), options)), exact)


def _all_values(method: str, models: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """The value of each parameter: a list with one for each model, or one for all."""
    values = {}
    for parameter in find_method(method).parameters:
        value = options.get(parameter.name, parameter.default)
        each = parameter.scope == "model" and not isinstance(value, Sequence)
        values[parameter.name] = [value] * models if each else value
    return values


def _exactly(followed: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """``exact`` with the derivative of ``followed``, which is another rounding of the same number."""
    connected: torch.Tensor = _Exactly.apply(followed, [exact])  # type: ignore[no-untyped-call]
    return connected


class _Exactly(torch.autograd.Function):
    """See ``_exactly``."""

    @staticmethod
    def forward(ctx: Any, followed: torch.Tensor, exact: list[torch.Tensor]) -> torch.Tensor:
        ctx.dtype = followed.dtype
        return exact[0]  # in a list, because an input that is returned could not be changed in place

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0].to(ctx.dtype), None


class _Following(ReferenceBackend):
    """The reference backend for one tensor, whose operation is also applied to ``inputs`` that autograd follows.

    ``inputs`` hold the values of the inputs, in their order, in the type of the arithmetic.
    """

    def __init__(self, inputs: Sequence[torch.Tensor]):
        self._inputs = [tensor.reshape(-1) for tensor in inputs]
        self._pieces: list[torch.Tensor] = []
        self._by_norms = self._by_values = False

    @property
    def tells_all(self) -> bool:
        """Whether ``merged`` has the whole derivative: no coefficient of the operation was solved from the values."""
        return bool(self._pieces) and not self._by_values

    def merged(self) -> torch.Tensor:
        """The result in the type of the arithmetic, of shape [count]."""
        return torch.cat(self._pieces)

    def l1_norms(self, chunk: Chunk, masks: Sequence[Mask], storage_rounding: bool) -> BlockSums:
        """Sum magnitudes (see ``Backend.l1_norms``)."""
        self._by_norms = True
        return super().l1_norms(chunk, masks, storage_rounding)

    def gram(self, chunk: Chunk, of_deltas: bool = False, line: Line | None = None) -> BlockSums:
        """Sum inner products (see ``Backend.gram``)."""
        self._by_values = True
        return super().gram(chunk, of_deltas, line)

    def squares(self, chunk: Chunk, masks: Sequence[Mask], storage_rounding: bool) -> BlockSums:
        """Sum squares (see ``Backend.squares``)."""
        self._by_values = True
        return super().squares(chunk, masks, storage_rounding)

    def rescaling(self, delta: torch.Tensor, kept: torch.Tensor, factor: float) -> torch.Tensor:
        """The factor; if autograd follows, and it is the ratio of the norms, then by torch operations."""
        if not (torch.is_grad_enabled() and self._by_norms) or factor == 1:
            return super().rescaling(delta, kept, factor)
        magnitude = delta.abs()
        return magnitude.sum() / torch.where(kept, magnitude, 0.0).sum()

    def consensus(self, chunk: Chunk, operation: Consensus, output: torch.Tensor) -> Outcome:
        """Merge task vectors (see ``Backend.consensus``)."""
        return self._follow(super().consensus, chunk, operation, output)

    def combine(self, chunk: Chunk, operation: Combine, output: torch.Tensor) -> Outcome:
        """Write a linear combination (see ``Backend.combine``)."""
        return self._follow(super().combine, chunk, operation, output)

    def nearswap(self, chunk: Chunk, operation: Nearswap, output: torch.Tensor) -> Outcome:
        """Move the base to the model where they are near (see ``Backend.nearswap``)."""
        return self._follow(super().nearswap, chunk, operation, output)

    def _follow(
        self, apply: Callable[..., Outcome], chunk: Chunk, operation: Any, output: torch.Tensor
    ) -> Outcome:
        here = slice(chunk.start, chunk.start + chunk.count)
        inputs = [tensor[here] for tensor in self._inputs]
        self._pieces.append(torch.empty_like(inputs[0]))
        apply(replace(chunk, inputs=inputs), operation, self._pieces[-1])
        with torch.no_grad():
            return apply(chunk, operation, output)
