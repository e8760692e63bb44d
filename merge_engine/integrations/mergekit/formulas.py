"""Methods whose coefficients depend on the inputs, as torch expressions that autograd can differentiate.

They are the formulas of docs/arithmetic.md, without its order of summation: their derivatives are used, and their
values never. Every function takes the base (None without one), the models, and the parameters by name; tensors have
one shape and the type of the arithmetic. Where a branch is taken (nearly parallel vectors, norms near zero), the
derivative is that of the branch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, TypeAlias

import torch

Formula: TypeAlias = Callable[[torch.Tensor | None, Sequence[torch.Tensor], Mapping[str, Any]], torch.Tensor]


def slerp(
    base: torch.Tensor | None, models: Sequence[torch.Tensor], given: Mapping[str, Any]
) -> torch.Tensor:
    """From the base a part t of the arc to the model; a straight line where the cosine exceeds 0.9995."""
    assert base is not None
    [model] = models
    units = [vector / _where_above(_norm(vector), 1e-8) for vector in (base, model)]
    cosine = (units[0] * units[1]).sum().clamp(-1, 1)
    first, second = _arc(cosine, given["t"], cosine.abs() > 0.9995)
    return first * base + second * model


def nuslerp(
    base: torch.Tensor | None, models: Sequence[torch.Tensor], given: Mapping[str, Any]
) -> torch.Tensor:
    """The arc between two models, or two task vectors: whole tensors, rows, or columns."""
    total = sum(given["weight"])
    t = given["weight"][1] / total if abs(total) >= 1e-6 else 0.5
    a, b = models if base is None else (model - base for model in models)
    if given["nuslerp_flatten"]:
        lines: tuple[int, ...] = tuple(range(a.ndim))
    else:
        lines = (0,) if given["nuslerp_row_wise"] else (-1,)
    if not a.ndim:
        lines = ()
    cosine = (_unit(a, lines) * _unit(b, lines)).sum(lines, keepdim=True).clamp(-1, 1)
    first, second = _arc(cosine, t, 1 - cosine.square() <= 1e-16)
    merged = first * a + second * b
    return merged if base is None else base + merged


def multislerp(
    base: torch.Tensor | None, models: Sequence[torch.Tensor], given: Mapping[str, Any]
) -> torch.Tensor:
    """The weighted mean of directions, one step of the exponential map from their normalised sum."""
    if len(models) == 1:
        return models[0]
    vectors = list(models) if base is None else [model - base for model in models]
    total = sum(given["weight"]) if given["normalize_weights"] else 1.0
    weights = [weight / total for weight in given["weight"]]
    eps = given["eps"]
    norms = [_norm(vector) for vector in vectors]
    units = [vector / (norm + eps) for vector, norm in zip(vectors, norms, strict=True)]
    mean = _sum(weights, units)
    if float(_norm(mean)) < eps:  # of two opposite vectors
        merged = _sum(weights, vectors)
    else:
        mean = mean / _norm(mean)
        tangent = _sum(weights, [unit - (unit * mean).sum() * mean for unit in units])
        length = _norm(tangent) + eps
        direction = mean * torch.cos(length) + tangent * (torch.sin(length) / length)
        merged = direction * _sum(weights, norms)
    return merged if base is None else base + merged


def karcher(
    base: torch.Tensor | None, models: Sequence[torch.Tensor], given: Mapping[str, Any]
) -> torch.Tensor:
    """The mean on the sphere of the directions, found step by step, times the mean norm."""
    if len(models) == 1:
        return models[0]
    tol = given["tol"]
    norms = [_norm(model) for model in models]
    units = [model / norm for model, norm in zip(models, norms, strict=True) if float(norm) > tol]
    if not units:
        return _sum([0.0] * len(models), models)
    shares = [1 / len(units)] * len(units)
    mean = _sum(shares, units)
    mean = mean / _norm(mean) if float(_norm(mean)) >= tol else units[0]
    for _ in range(given["max_iter"]):
        steps = []
        for unit in units:
            cosine = (mean * unit).sum().clamp(-1, 1)
            if float(torch.acos(cosine.detach())) >= tol:
                angle = torch.acos(cosine)
                steps.append(angle / torch.sin(angle) * (unit - cosine * mean))
        tangent = _sum([1 / len(units)] * len(steps), steps) if steps else torch.zeros_like(mean)
        if float(tangent.detach().norm()) < tol:
            break
        length = _norm(tangent)
        mean = torch.cos(length) * mean + torch.sin(length) * tangent / length
        mean = mean / _norm(mean)
    return _sum([1 / len(models)] * len(models), norms) * mean


def model_stock(
    base: torch.Tensor | None, models: Sequence[torch.Tensor], given: Mapping[str, Any]
) -> torch.Tensor:
    """Between base and mean, by the mean cosine of the task vectors: of whole tensors, or of rows."""
    assert base is not None
    deltas = [model - base for model in models]
    lines = (-1,) if given["filter_wise"] and base.ndim else tuple(range(base.ndim))
    cosines = [
        ((a * b).sum(lines, keepdim=True) / (_norm(a, lines) * _norm(b, lines)).clamp(min=1e-6)).clamp(-1, 1)
        for a, b in combinations(deltas, 2)
    ]
    cosine = _sum([1 / len(cosines)] * len(cosines), cosines)
    divisor = 1 + (len(models) - 1) * cosine
    singular = divisor.abs() < 1e-6
    share = torch.where(singular, 0.0, len(models) * cosine / torch.where(singular, 1.0, divisor))
    return base + share * (_sum([1 / len(models)] * len(models), models) - base)


FORMULAS: Mapping[str, Formula] = {
    "slerp": slerp,
    "nuslerp": nuslerp,
    "multislerp": multislerp,
    "karcher": karcher,
    "model_stock": model_stock,
}


def _norm(vector: torch.Tensor, lines: tuple[int, ...] | None = None) -> torch.Tensor:
    """The length of a vector, or of each line. At zero its derivative is 0."""
    if not vector.ndim:
        return vector.abs()
    length: torch.Tensor = torch.linalg.vector_norm(vector, dim=lines, keepdim=lines is not None)
    return length


def _unit(vector: torch.Tensor, lines: tuple[int, ...]) -> torch.Tensor:
    return vector / _norm(vector, lines).clamp(min=1e-7)


def _where_above(values: torch.Tensor, least: float) -> torch.Tensor:
    return torch.where(values > least, values, 1.0)


def _arc(cosine: torch.Tensor, t: float, straight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The shares of both ends at the part t of an arc. The branch that is not taken stays finite."""
    angle = torch.acos(torch.where(straight, 0.0, cosine))
    first = torch.where(straight, 1 - t, torch.sin((1 - t) * angle) / torch.sin(angle))
    second = torch.where(straight, t, torch.sin(t * angle) / torch.sin(angle))
    return first, second


def _sum(weights: Sequence[float], values: Sequence[torch.Tensor]) -> torch.Tensor:
    total = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total = total + weight * value
    return total
