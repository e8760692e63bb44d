"""L1 norms: magnitudes, summed in float64 in an order that is fixed.

    block of 4096 elements -> 64 running sums, element j to sum j % 64 -> added pairwise -> the sum of the block

Step 11 of docs/arithmetic.md. A program takes several blocks abreast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from merge_engine.kernels.launching import COLUMNS, ONE_WARP, over_blocks
from merge_engine.kernels.masks import NOTED, RANKED, RANKED_INVERSE, keeps
from merge_engine.kernels.numbers import load, load_bits, magnitude, rounded_to

LANES = tl.constexpr(64)
SUM_BLOCK = tl.constexpr(4096)
MOST_ABREAST = 4  # blocks of a program


@triton.jit
def added_pairwise(lanes):
    """[blocks, 64] running sums to [blocks]: lane l and l + 32, then l and l + 16, ..."""
    blocks: tl.constexpr = lanes.shape[0]
    sums = tl.sum(tl.reshape(lanes, (blocks, 2, 32)), axis=1)
    sums = tl.sum(tl.reshape(sums, (blocks, 2, 16)), axis=1)
    sums = tl.sum(tl.reshape(sums, (blocks, 2, 8)), axis=1)
    sums = tl.sum(tl.reshape(sums, (blocks, 2, 4)), axis=1)
    sums = tl.sum(tl.reshape(sums, (blocks, 2, 2)), axis=1)
    return tl.sum(sums, axis=1)


@triton.jit
def lines_from(first, count):
    """How many lines of 64 the blocks have that begin at ``first``: the last block of a tensor may have fewer."""
    return tl.minimum(tl.cdiv(count - first, LANES), SUM_BLOCK // LANES)


@triton.jit
def lanes_of(rows):
    """[blocks * 8, 8] to [blocks, 64]."""
    return tl.reshape(rows, (rows.shape[0] // 8, LANES))


@triton.jit(do_not_specialize=["start", "first_block", "count"])
def l1_kernel(
    base,
    model,
    mask,
    thresholds,
    sums,
    width,
    start,
    first_block,
    count,
    BASE: tl.constexpr,
    MODEL: tl.constexpr,
    WORKING: tl.constexpr,
    KIND: tl.constexpr,
    STORAGE_ROUNDING: tl.constexpr,
    SQUARED: tl.constexpr,
    ALIGNED: tl.constexpr,
    ABREAST: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The norms of one task vector over some blocks, or its sums of squares, whole and masked.

    A line of a block is eight rows.
    """
    block = (first_block + tl.program_id(0)).to(tl.int64) * ABREAST
    first = block * SUM_BLOCK
    row = tl.arange(0, ABREAST * 8)
    rows = (row // 8 * SUM_BLOCK + row % 8 * COLUMNS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    whole = tl.zeros((ABREAST * 8, COLUMNS), tl.float64)
    masked = tl.zeros((ABREAST * 8, COLUMNS), tl.float64)
    places = rows + columns
    lines = lines_from(first, count)
    line = lines * 0
    while line < lines:
        here = first + line * LANES
        inside = here + places < count
        b = load(base + here, places, inside, BASE, WORKING, MASKED)
        x = load(model + here, places, inside, MODEL, WORKING, MASKED)
        delta = x - b
        if STORAGE_ROUNDING:
            delta = rounded_to(delta, WORKING)
        below = places.to(tl.uint32)
        if (KIND == RANKED) | (KIND == RANKED_INVERSE) | (KIND == NOTED):
            below = load_bits(thresholds + here, places, inside, MASKED)
        index = start + here + rows
        kept = keeps(mask, below, magnitude(delta), index, columns, KIND, ALIGNED)
        if SQUARED and STORAGE_ROUNDING:
            size = rounded_to(delta * delta, WORKING).to(tl.float64)
        elif SQUARED:
            size = delta.to(tl.float64) * delta.to(tl.float64)
        else:
            size = tl.abs(delta).to(tl.float64)
        whole += size
        masked += tl.where(kept, size, 0.0)
        line += 1
    of_block = sums + (block + tl.arange(0, ABREAST)) * width
    tl.store(of_block, added_pairwise(lanes_of(whole)))
    tl.store(of_block + 1, added_pairwise(lanes_of(masked)))


def block_sums(count: int, width: int, device: torch.device) -> torch.Tensor:
    """Room for ``width`` sums of every block of ``count`` elements, and of what else the last program writes."""
    blocks = triton.cdiv(count, SUM_BLOCK.value * MOST_ABREAST) * MOST_ABREAST
    return torch.empty((blocks, width), dtype=torch.float64, device=device)


def l1_norms(
    base: torch.Tensor,
    model: torch.Tensor,
    codes: Sequence[str],
    working: str,
    start: int,
    kind: int,
    mask: torch.Tensor,
    thresholds: torch.Tensor,
    storage_rounding: bool,
    squared: bool,
    sums: torch.Tensor,
) -> None:
    """The L1 norms of a task vector, whole and masked, into the first two columns of ``sums`` (see ``block_sums``).

    With ``squared`` they are sums of squares.

    Inputs are unsigned bits, their types in ``codes`` (base, model). ``mask``: [ROW] int64, of a kind in masks.py;
    ``thresholds``: see ``consensus``.
    """
    over_blocks(
        l1_kernel,
        base.numel(),
        MOST_ABREAST * SUM_BLOCK.value,
        base,
        model,
        mask,
        thresholds,
        sums,
        sums.stride(0),
        start,
        BASE=codes[0],
        MODEL=codes[1],
        WORKING=working,
        KIND=kind,
        STORAGE_ROUNDING=storage_rounding,
        SQUARED=squared,
        ALIGNED=start % COLUMNS.value == 0,
        ABREAST=MOST_ABREAST,
        options=ONE_WARP,
    )
