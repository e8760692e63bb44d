"""Scores of positions in plain torch, one line for one line of the formulas (docs/arithmetic.md, steps 22 to 25).

Exponentials and logarithms are made of operations that IEEE defines, so that every backend gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from merge_engine.backends.statistics import SUM_BLOCK, SUM_LANES

SOFTENED = 1e-8
"""Added to every probability, as in mergekit."""

LOWEST_EXPONENT = -700.0
"""exp of what is below counts as 0."""

LOG2_E = 1.4426950408889634
LN2_HIGH = 0.6931471803691238  # 32 bits, so that the product with a small whole number is exact
LN2_LOW = 1.9082149292705877e-10
TO_NEAREST = 6755399441055744.0
"""1.5 * 2^52: added to a small number, it leaves its nearest whole number in the last bits."""

EXP_TERMS = tuple(1.0 / math.factorial(k) for k in range(14))
LOG_TERMS = tuple(1.0 / (2 * k + 1) for k in range(11))
SQRT_HALF_BITS = 0x3FE6A09E667F3BCD


def exponential(x: torch.Tensor) -> torch.Tensor:
    """exp of float64 that is at most 0, within 2 ulp; 0 below ``LOWEST_EXPONENT``, NaN of NaN."""
    shifted = x * LOG2_E + TO_NEAREST
    whole = shifted - TO_NEAREST
    rest = (x - whole * LN2_HIGH) - whole * LN2_LOW
    total = torch.full_like(x, EXP_TERMS[-1])
    for term in reversed(EXP_TERMS[:-1]):
        total = total * rest + term
    scaled = (total.view(torch.int64) + (shifted.view(torch.int64) << 52)).view(torch.float64)
    return torch.where(x.isnan(), x, torch.where(x < LOWEST_EXPONENT, 0.0, scaled))


def logarithm(x: torch.Tensor) -> torch.Tensor:
    """log of positive normal float64, within 3 ulp; NaN of NaN."""
    bits = x.view(torch.int64)
    exponent = (bits - SQRT_HALF_BITS) >> 52  # x = 2^exponent * m with m from sqrt(1/2) to sqrt(2)
    above_one = (bits - (exponent << 52)).view(torch.float64) - 1.0
    ratio = above_one / (above_one + 2.0)
    square = ratio * ratio
    total = torch.full_like(x, LOG_TERMS[-1])
    for term in reversed(LOG_TERMS[:-1]):
        total = total * square + term
    whole = exponent.double()
    result = whole * LN2_HIGH + (whole * LN2_LOW + 2.0 * ratio * total)
    return torch.where(x.isnan(), x, result)


def line_sums(values: torch.Tensor) -> torch.Tensor:
    """[lines] sums of [lines, length] float64: of each line as of a tensor of its own (step 11)."""
    total = torch.zeros(len(values), dtype=torch.float64, device=values.device)
    for block in torch.split(values, SUM_BLOCK, dim=1):
        rows = torch.nn.functional.pad(block, (0, -block.shape[1] % SUM_LANES))
        lanes = torch.zeros((len(values), SUM_LANES), dtype=torch.float64, device=values.device)
        for row in torch.split(rows, SUM_LANES, dim=1):
            lanes = lanes + row
        while lanes.shape[1] > 1:
            half = lanes.shape[1] // 2
            lanes = lanes[:, :half] + lanes[:, half:]
        total = total + lanes[:, 0]
    return total


def probabilities(lines: torch.Tensor) -> torch.Tensor:
    """The softmax of each line of [lines, length] float64, ``SOFTENED``."""
    powers = exponential(lines - lines.amax(1, keepdim=True))
    return powers / line_sums(powers)[:, None] + SOFTENED


def divergences(model: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """[lines]: the divergence of each line of [lines, length] float64. At least 0, and 0 where it is NaN."""
    p, q = probabilities(model), probabilities(base)
    found = line_sums(p * logarithm(p / q))
    return torch.where(found > 0, found, 0.0)


def variances(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """The variance of the task vectors at each position (Welford). 0 where it is NaN."""
    mean = squares = torch.zeros_like(deltas[0])
    for number, delta in enumerate(deltas, 1):
        distance = delta - mean
        mean = mean + distance / number
        squares = squares + distance * (delta - mean)
    found = squares / len(deltas)
    return torch.where(found.isnan(), 0.0, found)
