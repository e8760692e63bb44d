"""L1 norms and inner products: exact products, summed in float64 in an order that is fixed.

    block of 4096 elements -> 64 running sums, element j to sum j % 64 -> added pairwise -> the sum of the block

Step 11 of docs/arithmetic.md. A program takes several blocks abreast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from merge_engine.kernels.launching import COLUMNS, INTERPRETED, ONE_WARP, OPTIONS, over_blocks
from merge_engine.kernels.masks import RANKED, RANKED_INVERSE, keeps
from merge_engine.kernels.numbers import load, load_bits, magnitude, rounded_to

LANES = tl.constexpr(64)
SUM_BLOCK = tl.constexpr(4096)
ABREAST = 32  # blocks of a program
ABREAST_OF_A_WARP = 32 if INTERPRETED else 4


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
    ALIGNED: tl.constexpr,
    ABREAST: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The norms of one task vector over some blocks, whole and masked. A line of a block is eight rows of neighbours."""
    block = (first_block + tl.program_id(0)).to(tl.int64) * ABREAST
    first = block * SUM_BLOCK
    row = tl.arange(0, ABREAST * 8)
    rows = (row // 8 * SUM_BLOCK + row % 8 * COLUMNS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    whole = tl.zeros((ABREAST * 8, COLUMNS), tl.float64)
    masked = tl.zeros((ABREAST * 8, COLUMNS), tl.float64)
    for line in range(SUM_BLOCK // LANES):
        here = first + line * LANES
        places = rows + columns
        inside = here + places < count
        b = load(base + here, places, inside, BASE, WORKING, MASKED)
        x = load(model + here, places, inside, MODEL, WORKING, MASKED)
        delta = x - b
        if STORAGE_ROUNDING:
            delta = rounded_to(delta, WORKING)
        below = places.to(tl.uint32)
        if (KIND == RANKED) | (KIND == RANKED_INVERSE):
            below = load_bits(thresholds + here, places, inside, MASKED)
        index = start + here + rows
        kept = keeps(mask, below, magnitude(delta), index, columns, KIND, WORKING, ALIGNED)
        size = tl.abs(delta)
        whole += size.to(tl.float64)
        masked += tl.where(kept, size, 0.0).to(tl.float64)
    of_block = sums + (block + tl.arange(0, ABREAST)) * width
    tl.store(of_block, added_pairwise(lanes_of(whole)))
    tl.store(of_block + 1, added_pairwise(lanes_of(masked)))


@triton.jit(do_not_specialize=["first_block", "count"])
def product_kernel(
    left,
    right,
    sums,
    width,
    first_block,
    count,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    WORKING: tl.constexpr,
    ABREAST: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The inner product of two inputs over some blocks."""
    block = (first_block + tl.program_id(0)).to(tl.int64) * ABREAST
    of_program = tl.arange(0, ABREAST)
    lane = tl.arange(0, LANES)
    lanes = tl.zeros((ABREAST, LANES), tl.float64)
    for line in range(SUM_BLOCK // LANES):
        offsets = block * SUM_BLOCK + (of_program * SUM_BLOCK + line * LANES)[:, None] + lane[None, :]
        inside = offsets < count
        x = load(left, offsets, inside, LEFT, WORKING, MASKED)
        y = load(right, offsets, inside, RIGHT, WORKING, MASKED)
        lanes += x.to(tl.float64) * y.to(tl.float64)
    tl.store(sums + (block + of_program) * width, added_pairwise(lanes))


def block_sums(count: int, width: int, device: torch.device) -> torch.Tensor:
    """Room for ``width`` sums of every block of ``count`` elements, and of what else the last program writes."""
    blocks = triton.cdiv(count, SUM_BLOCK.value * ABREAST) * ABREAST
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
    sums: torch.Tensor,
) -> None:
    """The L1 norms of a task vector, whole and masked, into the first two columns of ``sums`` (see ``block_sums``).

    Inputs are unsigned bits, their types in ``codes`` (base, model). ``mask``: [8] int64, of a kind in masks.py;
    ``thresholds``: see ``consensus``.
    """
    over_blocks(
        l1_kernel,
        base.numel(),
        ABREAST_OF_A_WARP * SUM_BLOCK.value,
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
        ALIGNED=start % COLUMNS.value == 0,
        ABREAST=ABREAST_OF_A_WARP,
        **ONE_WARP,
    )


def product(
    left: torch.Tensor, right: torch.Tensor, codes: Sequence[str], working: str, sums: torch.Tensor
) -> None:
    """The inner product of two inputs (unsigned bits of types ``codes``) into the first column of ``sums``."""
    over_blocks(
        product_kernel,
        left.numel(),
        ABREAST * SUM_BLOCK.value,
        left,
        right,
        sums,
        sums.stride(0),
        LEFT=codes[0],
        RIGHT=codes[1],
        WORKING=working,
        ABREAST=ABREAST,
        **OPTIONS,
    )
