"""Histograms of magnitude keys: bin of RN(|x - b|) -> count, 2^15 bins at level 0 and 2^16 below it.

Steps 1 and 2 of docs/arithmetic.md. Integers are added to memory with relaxed atomics, in any order. The differences of
16-bit weights take few distinct values, so many programs meet at the same bins; each histogram is held in several
copies to part them, and bin 0, where all zeros are, is counted apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from merge_engine.kernels.launching import TILE, constants, over_tiles
from merge_engine.kernels.numbers import load, magnitude_key

COPIES = tl.constexpr(8)


@triton.jit(do_not_specialize=["first_tile", "count"])
def histogram_kernel(
    base,
    models,
    slots,
    found,
    histograms,
    first_tile,
    count,
    CODES,
    WORKING: tl.constexpr,
    SHIFT: tl.constexpr,
    BINS: tl.constexpr,
    BELOW: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile. ``BELOW`` says that only keys count whose upper bits are those of the key found before."""
    tile = first_tile + tl.program_id(0)
    offsets = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    b = load(base, offsets, inside, CODES[0], WORKING, MASKED)
    for i in tl.static_range(N):
        x = load(models[i], offsets, inside, CODES[i + 1], WORKING, MASKED)
        bins = magnitude_key(x - b, WORKING) >> SHIFT
        counted = bins >= 0
        if BELOW:
            counted = (bins // BINS) == tl.load(found + 3 * i)
            bins = bins & (BINS - 1)
        if MASKED:
            counted = counted & inside
        own = histograms + (tl.load(slots + i) * COPIES + tile % COPIES) * BINS
        tl.atomic_add(own + bins, 1, mask=counted & (bins != 0), sem="relaxed")
        zeros = tl.sum((counted & (bins == 0)).to(tl.int32), axis=0)
        tl.atomic_add(own, zeros.to(tl.int64), mask=zeros > 0, sem="relaxed")


def histogram(
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    codes: Sequence[str],
    working: str,
    shift: int,
    slots: torch.Tensor,
    found: torch.Tensor | None,
    histograms: torch.Tensor,
) -> None:
    """Count the keys of ``models`` (one may come more than once), shifted right by ``shift``.

    Inputs are unsigned bits, their types in ``codes`` (base, models). ``histograms``: [slots, COPIES, bins] int64,
    added to; ``slots``: [n] int64, where each model is counted; ``found``: [n, 3] int64, for each what ``select``
    found one level above, None at level 0.
    """
    over_tiles(
        histogram_kernel,
        base.numel(),
        TILE,
        base,
        tuple(models),
        slots,
        slots if found is None else found,
        histograms,
        CODES=constants(codes),
        WORKING=working,
        SHIFT=shift,
        BINS=histograms.shape[2],
        BELOW=found is not None,
        N=len(models),
        BLOCK=TILE,
    )
