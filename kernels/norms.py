"""L1 norms and inner products: exact products, summed in float64 in an order that is fixed.

    block of 4096 elements -> 64 running sums, element j to sum j % 64 -> added pairwise -> the sum of the block

Step 11 of docs/arithmetic.md. A program takes several blocks abreast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from merge_engine.kernels.launching import over_tiles
from merge_engine.kernels.masks import RANKED, RANKED_INVERSE, keeps
from merge_engine.kernels.numbers import load, load_bits, rounded_to

LANES = tl.constexpr(64)
SUM_BLOCK = tl.constexpr(4096)
ABREAST = 32  # blocks of a program


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


@triton.jit(do_not_specialize=["start", "first_tile", "count"])
def l1_kernel(
    base,
    model,
    mask,
    thresholds,
    sums,
    width,
    start,
    first_tile,
    count,
    BASE: tl.constexpr,
    MODEL: tl.constexpr,
    WORKING: tl.constexpr,
    KIND: tl.constexpr,
    STORAGE_ROUNDING: tl.constexpr,
    ABREAST: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The norms of one task vector over some blocks, whole and masked."""
    first_block = (first_tile + tl.program_id(0)).to(tl.int64) * ABREAST
    first = first_block * SUM_BLOCK
    block = tl.arange(0, ABREAST)
    lane = tl.arange(0, LANES)
    whole = tl.zeros((ABREAST, LANES), tl.float64)
    masked = tl.zeros((ABREAST, LANES), tl.float64)
    for line in range(SUM_BLOCK // LANES):
        groups = (block * SUM_BLOCK + line * LANES)[:, None]
        place = groups + lane[None, :]
        offsets = first + place
        inside = offsets < count
        b = load(base, offsets, inside, BASE, WORKING, MASKED)
        x = load(model, offsets, inside, MODEL, WORKING, MASKED)
        delta = x - b
        if STORAGE_ROUNDING:
            delta = rounded_to(delta, WORKING)
        below = place.to(tl.uint32)
        if (KIND == RANKED) | (KIND == RANKED_INVERSE):
            below = load_bits(thresholds, offsets, inside, MASKED)
        kept = keeps(mask, below, delta, start + first, place, groups, KIND, WORKING)
        magnitude = tl.abs(delta).to(tl.float64)
        whole += magnitude
        masked += tl.where(kept, magnitude, 0.0)
    rows = sums + (first_block + block) * width
    tl.store(rows, added_pairwise(whole))
    tl.store(rows + 1, added_pairwise(masked))


@triton.jit(do_not_specialize=["first_tile", "count"])
def product_kernel(
    left,
    right,
    sums,
    width,
    first_tile,
    count,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    WORKING: tl.constexpr,
    ABREAST: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The inner product of two inputs over some blocks."""
    first_block = (first_tile + tl.program_id(0)).to(tl.int64) * ABREAST
    block = tl.arange(0, ABREAST)
    lane = tl.arange(0, LANES)
    lanes = tl.zeros((ABREAST, LANES), tl.float64)
    for line in range(SUM_BLOCK // LANES):
        offsets = first_block * SUM_BLOCK + (block * SUM_BLOCK + line * LANES)[:, None] + lane[None, :]
        inside = offsets < count
        x = load(left, offsets, inside, LEFT, WORKING, MASKED)
        y = load(right, offsets, inside, RIGHT, WORKING, MASKED)
        lanes += x.to(tl.float64) * y.to(tl.float64)
    tl.store(sums + (first_block + block) * width, added_pairwise(lanes))


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
    over_tiles(
        l1_kernel,
        base.numel(),
        ABREAST * SUM_BLOCK.value,
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
        ABREAST=ABREAST,
    )


def product(
    left: torch.Tensor, right: torch.Tensor, codes: Sequence[str], working: str, sums: torch.Tensor
) -> None:
    """The inner product of two inputs (unsigned bits of types ``codes``) into the first column of ``sums``."""
    over_tiles(
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
    )
