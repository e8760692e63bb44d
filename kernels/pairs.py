"""Element by element: how near a model is to the base, and how many models changed an element.

Steps 20 and 21 of docs/arithmetic.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from merge_engine.kernels.counting import FIELDS, add_tallies, count_non_finite, tally
from merge_engine.kernels.launching import COLUMNS, constants, over_tiles
from merge_engine.kernels.masks import ROW, keeps
from merge_engine.kernels.numbers import (
    load,
    magnitude,
    rounded,
    stains,
    store,
)


@triton.jit
def quotient(x, y):
    """x / y, rounded once: that of two float32 may be rounded to float64 before."""
    if y.dtype == tl.float64:
        result = x / y
    else:
        result = (x.to(tl.float64) / y.to(tl.float64)).to(tl.float32)
    return result


@triton.jit(do_not_specialize=["first_tile", "steps", "count"])
def nearswap_kernel(
    base,
    model,
    numbers,
    output,
    counts,
    first_tile,
    steps,
    count,
    BASE: tl.constexpr,
    MODEL: tl.constexpr,
    OUT: tl.constexpr,
    WORKING: tl.constexpr,
    STORED: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Some tiles. ``numbers`` are threshold, least distance and 1; ``counts`` has rows for base, model and output."""
    REAL: tl.constexpr = tl.float64 if WORKING == "F64" else tl.float32
    tile = first_tile + tl.program_id(0) * steps
    places = (tl.arange(0, ROWS) * COLUMNS)[:, None] + tl.arange(0, COLUMNS)[None, :]
    threshold = tl.load(numbers)
    nearest = rounded(tl.load(numbers + 1), WORKING, STORED)
    one = tl.load(numbers + 2)
    stained = tl.zeros((ROWS,), REAL)
    step = steps * 0
    while step < steps:
        first = (tile + step).to(tl.int64) * (ROWS * COLUMNS)
        inside = first + places < count
        b = load(base + first, places, inside, BASE, WORKING, MASKED)
        x = load(model + first, places, inside, MODEL, WORKING, MASKED)
        stained += stains(b) + stains(x)
        distance = rounded(tl.abs(x - b), WORKING, STORED)
        divisor = tl.where(distance < nearest, nearest, distance)
        if STORED:
            weight = rounded(rounded(quotient(one, divisor), WORKING, True) * threshold, WORKING, True)
        else:
            weight = quotient(threshold, divisor)
        weight = tl.where(weight > 1.0, one, weight)
        rest = rounded(one - weight, WORKING, STORED)
        mixed = rounded(weight * x, WORKING, STORED) + rounded(rest * b, WORKING, STORED)
        merged = tl.where(x == b, b, rounded(mixed, WORKING, STORED))
        stained += stains(store(output + first, places, inside, merged, OUT, MASKED).to(REAL))
        step += 1

    if tl.max((stained != 0).to(tl.int32), 0) != 0:
        tl.debug_barrier()  # the output may be read by other threads than those that wrote it
        count_non_finite(base, counts, tile, steps, count, BASE, WORKING, ROWS, MASKED)
        count_non_finite(model, counts + FIELDS, tile, steps, count, MODEL, WORKING, ROWS, MASKED)
        count_non_finite(output, counts + 2 * FIELDS, tile, steps, count, OUT, OUT, ROWS, MASKED)


@triton.jit(do_not_specialize=["start", "first_tile", "steps", "count"])
def overlap_kernel(
    base,
    models,
    masks,
    counts,
    start,
    first_tile,
    steps,
    count,
    CODES,
    WORKING: tl.constexpr,
    KINDS,
    ALIGNED: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Some tiles. ``counts`` has two numbers of each model: what it keeps alone, and what others keep too."""
    tile = first_tile + tl.program_id(0) * steps
    columns = tl.arange(0, COLUMNS)[None, :]
    rows = (tl.arange(0, ROWS) * COLUMNS)[:, None]
    places = rows + columns
    tallies = ()
    for _ in tl.static_range(N):
        tallies = tallies + (tl.zeros((ROWS,), tl.int32),)
    step = steps * 0
    while step < steps:
        first = (tile + step).to(tl.int64) * (ROWS * COLUMNS)
        inside = first + places < count
        b = load(base + first, places, inside, CODES[0], WORKING, MASKED)
        keeping = tl.zeros((ROWS, COLUMNS), tl.int32)
        kept = ()
        for i in tl.static_range(N):
            delta = load(models[i] + first, places, inside, CODES[i + 1], WORKING, MASKED) - b
            index = start + first + rows
            below = places.to(tl.uint32)  # no mask has thresholds
            own = keeps(masks + i * ROW, below, magnitude(delta), index, columns, KINDS[i], ALIGNED)
            kept = kept + (own,)
            keeping += own.to(tl.int32)
        added = ()
        for i in tl.static_range(N):
            alone, shared = tally(kept[i] & (keeping == 1)), tally(kept[i] & (keeping > 1))
            added = added + (tallies[i] + alone + (shared << 16),)
        tallies = added
        step += 1
    for i in tl.static_range(N):
        add_tallies(counts + 2 * i, tallies[i])


def nearswap(
    base: torch.Tensor,
    model: torch.Tensor,
    output: torch.Tensor,
    codes: Sequence[str],
    working: str,
    numbers: torch.Tensor,
    counts: torch.Tensor,
    *,
    storage_rounding: bool,
) -> None:
    """Move the base to the model where the two are near.

    Inputs and ``output`` are unsigned bits, their types in ``codes`` (base, model, output). ``numbers``: threshold,
    least distance and 1 as float32, or float64 for that working dtype. ``counts``: [3, 4] int64, to whose last column
    non-finite values are added.
    """
    over_tiles(
        nearswap_kernel,
        output.numel(),
        base,
        model,
        numbers,
        output,
        counts,
        BASE=codes[0],
        MODEL=codes[1],
        OUT=codes[2],
        WORKING=working,
        STORED=storage_rounding,
    )


def overlaps(
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    codes: Sequence[str],
    working: str,
    start: int,
    kinds: Sequence[int],
    masks: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Add to ``counts``, [n, 2] int64, how many elements each mask keeps alone, and how many others keep too.

    Inputs are unsigned bits, their types in ``codes`` (base, models). ``masks``: [n, ROW] int64, of ``kinds`` in
    masks.py; they are bands above 0, so that what pads a tile is not kept.
    """
    over_tiles(
        overlap_kernel,
        base.numel(),
        base,
        tuple(models),
        masks,
        counts,
        start,
        CODES=constants(codes),
        WORKING=working,
        KINDS=constants(kinds),
        ALIGNED=start % COLUMNS.value == 0,
        N=len(models),
    )
