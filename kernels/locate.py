"""Find the n-th element whose magnitude key is a given one: count by tiles, then look into one of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from merge_engine.kernels.launching import BLOCK, OPTIONS, over_blocks
from merge_engine.kernels.numbers import load, magnitude_key


@triton.jit
def has_key(
    base,
    model,
    key,
    offsets,
    inside,
    BASE: tl.constexpr,
    MODEL: tl.constexpr,
    WORKING: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Which elements have the key."""
    b = load(base, offsets, inside, BASE, WORKING, MASKED)
    x = load(model, offsets, inside, MODEL, WORKING, MASKED)
    return (magnitude_key(x - b, WORKING) == key) & inside


@triton.jit(do_not_specialize=["key", "first_tile", "count"])
def count_kernel(
    base,
    model,
    totals,
    key,
    first_tile,
    count,
    BASE: tl.constexpr,
    MODEL: tl.constexpr,
    WORKING: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """How many elements of a tile have the key."""
    tile = first_tile + tl.program_id(0)
    offsets = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    matches = has_key(base, model, key, offsets, offsets < count, BASE, MODEL, WORKING, MASKED)
    tl.store(totals + tile, tl.sum(matches.to(tl.int32), axis=0).to(tl.int64))


@triton.jit(do_not_specialize=["key", "nth", "tile", "count"])
def place_kernel(
    base,
    model,
    place,
    key,
    nth,
    tile,
    count,
    BASE: tl.constexpr,
    MODEL: tl.constexpr,
    WORKING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where in a tile the ``nth`` element with the key is, from 0."""
    lane = tl.arange(0, BLOCK)
    offsets = tile.to(tl.int64) * BLOCK + lane
    matches = has_key(base, model, key, offsets, offsets < count, BASE, MODEL, WORKING, True)
    so_far = tl.cumsum(matches.to(tl.int32), axis=0)
    here = tl.sum(tl.where(matches & (so_far == nth + 1), lane, 0), axis=0)
    tl.store(place, tile.to(tl.int64) * BLOCK + here)


def locate(
    base: torch.Tensor, model: torch.Tensor, codes: Sequence[str], working: str, key: int, nth: int
) -> tuple[int, int | None]:
    """How many elements have the key, and the offset of the ``nth`` of them, None if there are not so many.

    Inputs are unsigned bits, their types in ``codes`` (base, model). Waits for the answer.
    """
    count = base.numel()
    totals = torch.zeros(triton.cdiv(count, BLOCK), dtype=torch.int64, device=base.device)
    types = {"BASE": codes[0], "MODEL": codes[1], "WORKING": working, "BLOCK": BLOCK}
    over_blocks(count_kernel, count, BLOCK, base, model, totals, key, **types)
    ends = totals.cumsum(0)
    found = int(ends[-1]) if count else 0
    if nth >= found:
        return found, None
    tile = int((ends <= nth).sum())
    place = torch.empty(1, dtype=torch.int64, device=base.device)
    before = int(ends[tile] - totals[tile])
    place_kernel[(1,)](base, model, place, key, nth - before, tile, count, **types, **OPTIONS)
    return found, int(place)
