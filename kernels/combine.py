"""Linear combinations of inputs: c_1 * x_1 + c_2 * x_2 + ..., divided by a divisor if there is one.

Step 12 of docs/arithmetic.md. ``FUSED`` adds by fused multiply-add, as mergekit does. The interpreter has none, so it
is put together from operations that both have: the product of two float32 is exact in float64, and the error of
the sum is kept in its last bit, so that the one rounding to float32 is that of the exact result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from merge_engine.kernels.counting import FIELDS, NON_FINITE, add_tallies, tally
from merge_engine.kernels.launching import TILE, constants, over_tiles
from merge_engine.kernels.numbers import divided, load, non_finite, rounded_to, store


@triton.jit
def fused_multiply_add(x, y, z):
    """x * y + z of float32, rounded once."""
    product = x.to(tl.float64) * y.to(tl.float64)
    addend = z.to(tl.float64)
    total = product + addend
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    bits = total.to(tl.int64, bitcast=True)
    toward_zero = tl.where((error > 0) == (total > 0), bits, bits - 1)
    inexact = (error != 0) & (non_finite(total) == 0)
    return tl.where(inexact, toward_zero | 1, bits).to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit(do_not_specialize=["first_tile", "count"])
def combine_kernel(
    inputs,
    numbers,
    output,
    counts,
    first_tile,
    count,
    CODES,
    OUT: tl.constexpr,
    WORKING: tl.constexpr,
    DIVIDES: tl.constexpr,
    FUSED: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile. ``counts`` has a row for each input and one for the output."""
    REAL: tl.constexpr = tl.float64 if WORKING == "F64" else tl.float32
    offsets = (first_tile + tl.program_id(0)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    total = tl.zeros((BLOCK,), REAL)
    for i in tl.static_range(N):
        x = load(inputs[i], offsets, inside, CODES[i], WORKING, MASKED)
        add_tallies(counts + i * FIELDS, tally(non_finite(x), NON_FINITE))
        coefficient = tl.load(numbers + i).to(REAL)
        if FUSED:
            total = fused_multiply_add(x, coefficient, total)
        elif i == 0:
            total = coefficient * x  # nothing is added to the first: 0 + -0 would turn positive
        else:
            total = total + coefficient * x
    if DIVIDES:
        total = divided(total, tl.load(numbers + N).to(REAL) + tl.zeros_like(total))
    if FUSED:
        total = rounded_to(total, WORKING)
    written = store(output, offsets, inside, total, OUT, MASKED)
    add_tallies(counts + N * FIELDS, tally(written, NON_FINITE))


def combine(
    inputs: Sequence[torch.Tensor],
    output: torch.Tensor,
    codes: Sequence[str],
    working: str,
    numbers: torch.Tensor,
    counts: torch.Tensor,
    *,
    divides: bool,
    fused: bool,
) -> None:
    """Write a linear combination.

    ``inputs`` and ``output`` are unsigned bits, their types in ``codes`` (inputs, output). ``numbers``: [n + 1]
    float64, the coefficients, then the divisor. ``counts``: [n + 1, 4] int64, to whose last column non-finite values
    are added. ``fused`` is for a working dtype of at most 32 bits.
    """
    over_tiles(
        combine_kernel,
        output.numel(),
        TILE,
        tuple(inputs),
        numbers,
        output,
        counts,
        CODES=constants(codes[:-1]),
        OUT=codes[-1],
        WORKING=working,
        DIVIDES=divides,
        FUSED=fused,
        N=len(inputs),
        BLOCK=TILE,
    )
