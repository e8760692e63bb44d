"""Linear combinations of inputs: c_1 * x_1 + c_2 * x_2 + ..., divided by a divisor if there is one.

With a base they are combinations of task vectors, and the base is added.

Step 12 of docs/arithmetic.md. ``FUSED`` adds by fused multiply-add, as mergekit does. The interpreter has none, so it
is put together from operations that both have: the product of two float32 is exact in float64, and the error of
the sum is kept in its last bit, so that the one rounding to float32 is that of the exact result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from merge_engine.kernels.counting import FIELDS, count_non_finite
from merge_engine.kernels.launching import COLUMNS, constants, over_tiles
from merge_engine.kernels.numbers import (
    divided,
    load_bits,
    non_finite,
    reciprocal,
    rounded_to,
    stains,
    store,
    value_of,
)


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


@triton.jit(do_not_specialize=["start", "line_length", "first_line", "first_tile", "steps", "count"])
def combine_kernel(
    inputs,
    numbers,
    output,
    counts,
    start,
    line_length,
    first_line,
    first_tile,
    steps,
    count,
    CODES,
    OUT: tl.constexpr,
    WORKING: tl.constexpr,
    DIVIDES: tl.constexpr,
    FUSED: tl.constexpr,
    ROUNDED: tl.constexpr,
    STEPWISE: tl.constexpr,
    ON_BASE: tl.constexpr,
    LINES: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Some tiles. ``counts`` has a row for each input and one for the output.

    ``LINES``: 0 where all elements have the same coefficients, 1 for lines along the last dimension, 2 for those along
    the first. Lines along the last have ``line_length`` elements and are numbered from ``first_line`` on; along the
    first there are ``line_length`` of them.
    """
    REAL: tl.constexpr = tl.float64 if WORKING == "F64" else tl.float32
    FIRST: tl.constexpr = 1 if ON_BASE else 0  # input with a coefficient
    TERMS: tl.constexpr = N - FIRST
    tile = first_tile + tl.program_id(0) * steps
    places = (tl.arange(0, ROWS) * COLUMNS)[:, None] + tl.arange(0, COLUMNS)[None, :]
    divisor = tl.load(numbers + (TERMS if DIVIDES else 0))
    inverse = reciprocal(divisor)
    stained = tl.zeros((ROWS,), REAL)
    step = steps * 0
    while step < steps:
        first = (tile + step).to(tl.int64) * (ROWS * COLUMNS)
        inside = first + places < count
        bits = ()
        for i in tl.static_range(N):
            bits = bits + (load_bits(inputs[i] + first, places, inside, MASKED),)
        base = value_of(bits[0], CODES[0], WORKING)
        if ON_BASE:
            stained += stains(base)
        if LINES == 0:
            row = places * 0
        elif LINES == 1:
            row = ((start + first + places) // line_length - first_line) * TERMS
        else:
            row = (start + first + places) % line_length * TERMS
        total = tl.zeros((ROWS, COLUMNS), REAL)
        for i in tl.static_range(FIRST, N):
            x = value_of(bits[i], CODES[i], WORKING)
            stained += stains(x)
            if ON_BASE:
                x = x - base
                if STEPWISE:
                    x = rounded_to(x, WORKING)
            if LINES == 0:
                coefficient = tl.load(numbers + i - FIRST)
            else:
                coefficient = tl.load(numbers + row + i - FIRST, mask=inside, other=0.0)
            if FUSED:
                total = fused_multiply_add(x, coefficient, total)
            elif STEPWISE:
                part = rounded_to(coefficient * x, WORKING)
                if i == FIRST:
                    total = part
                else:
                    total = rounded_to(total + part, WORKING)
            elif i == FIRST:
                total = coefficient * x  # nothing is added to the first: 0 + -0 would turn positive
            else:
                total = total + coefficient * x
        if DIVIDES:
            total = divided(total, divisor, inverse)
            if STEPWISE:
                total = rounded_to(total, WORKING)
        if ON_BASE:
            total = base + total
        if FUSED | ROUNDED | STEPWISE:
            total = rounded_to(total, WORKING)
        stained += stains(store(output + first, places, inside, total, OUT, MASKED).to(REAL))
        step += 1

    if tl.max((stained != 0).to(tl.int32), 0) != 0:
        tl.debug_barrier()  # the output may be read by other threads than those that wrote it
        for i in tl.static_range(N):
            row = counts + i * FIELDS
            count_non_finite(inputs[i], row, tile, steps, count, CODES[i], WORKING, ROWS, MASKED)
        count_non_finite(output, counts + N * FIELDS, tile, steps, count, OUT, OUT, ROWS, MASKED)


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
    rounded: bool,
    stepwise: bool,
    on_base: bool,
    start: int = 0,
    line: tuple[int, int] | None = None,
) -> None:
    """Write a linear combination.

    ``inputs`` and ``output`` are unsigned bits, their types in ``codes`` (inputs, output). ``numbers``: [n + 1]
    float32, or float64 for that working dtype, the coefficients, then the divisor. With ``line`` (length, stride) they
    are [lines, n] coefficients of the lines that the chunk has elements of; it begins at element ``start``. ``counts``:
    [inputs + 1, 4] int64, to whose last column non-finite values are added. ``fused`` is for a working dtype of at
    most 32 bits.
    """
    length, stride = line or (1, 1)
    over_tiles(
        combine_kernel,
        output.numel(),
        tuple(inputs),
        numbers,
        output,
        counts,
        start,
        length if stride == 1 else stride,
        start // length,
        CODES=constants(codes[:-1]),
        OUT=codes[-1],
        WORKING=working,
        DIVIDES=divides,
        FUSED=fused,
        ROUNDED=rounded,
        STEPWISE=stepwise,
        ON_BASE=on_base,
        LINES=0 if line is None else 1 if stride == 1 else 2,
        N=len(inputs),
    )
