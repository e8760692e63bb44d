"""Histograms of magnitude keys: bin of RN(|x - b|) -> count, 2^15 bins at level 0 and 2^16 below it.

Steps 1 and 2 of docs/arithmetic.md. Integers are added to memory with relaxed atomics, in any order, one for each
element. That takes many times as long as reading it, so ranks in a large tensor are found in another way (search.py).
The differences of 16-bit weights take few distinct values, so many programs meet at the same bins; each histogram is
held in several copies to part them, and bin 0, where all zeros are, is counted apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from merge_engine.kernels.launching import COLUMNS, INTERPRETED, constants, over_tiles
from merge_engine.kernels.numbers import load_bits, magnitude_key, value_of

COPIES = 2 if INTERPRETED else 8
MANY_STEPS = 1 << 20
"""Of a program: it adds to memory for every element anyway, and where nothing is missing few programs end sooner."""


@triton.jit(do_not_specialize=["spacing", "first_tile", "steps", "count"])
def histogram_kernel(
    base,
    models,
    slots,
    found,
    missing,
    histograms,
    spacing,
    first_tile,
    steps,
    count,
    CODES,
    WORKING: tl.constexpr,
    SHIFT: tl.constexpr,
    BINS: tl.constexpr,
    COPIES: tl.constexpr,
    BELOW: tl.constexpr,
    ONLY_MISSING: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Some tiles, ``spacing`` tiles apart.

    ``BELOW`` says that only keys count whose upper bits are those of the key found before, ``ONLY_MISSING`` that a
    model counts only where ``missing`` is not 0.
    """
    if ONLY_MISSING:
        wanted = 0
        for i in tl.static_range(N):
            wanted += tl.load(missing + i)
        if wanted == 0:
            return
    tile = first_tile + tl.program_id(0) * steps
    places = (tl.arange(0, ROWS) * COLUMNS)[:, None] + tl.arange(0, COLUMNS)[None, :]
    copy = tl.program_id(0) % COPIES
    zeros = ()
    for _ in tl.static_range(N):
        zeros = zeros + (tl.zeros((ROWS,), tl.int32),)
    step = steps * 0
    while step < steps:
        first = (tile + step).to(tl.int64) * spacing * (ROWS * COLUMNS)
        inside = first + places < count
        base_bits = load_bits(base + first, places, inside, MASKED)
        bits = ()
        for i in tl.static_range(N):
            bits = bits + (load_bits(models[i] + first, places, inside, MASKED),)
        b = value_of(base_bits, CODES[0], WORKING)
        counted_zeros = ()
        for i in tl.static_range(N):
            key = magnitude_key(value_of(bits[i], CODES[i + 1], WORKING) - b, WORKING) >> SHIFT
            counted = key >= 0
            if ONLY_MISSING:
                counted = counted & (tl.load(missing + i) != 0)
            if BELOW:
                counted = counted & ((key // BINS) == tl.load(found + 3 * i))
                key = key & (BINS - 1)
            if MASKED:
                counted = counted & inside
            own = histograms + (tl.load(slots + i) * COPIES + copy) * BINS
            tl.atomic_add(own + key, 1, mask=counted & (key != 0), sem="relaxed")
            counted_zeros = counted_zeros + (zeros[i] + tl.sum((counted & (key == 0)).to(tl.int32), 1),)
        zeros = counted_zeros
        step += 1
    for i in tl.static_range(N):
        total = tl.sum(zeros[i], 0)
        own = histograms + (tl.load(slots + i) * COPIES + copy) * BINS
        tl.atomic_add(own, total.to(tl.int64), mask=total > 0, sem="relaxed")


def histogram(
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    codes: Sequence[str],
    working: str,
    shift: int,
    slots: torch.Tensor,
    found: torch.Tensor | None,
    histograms: torch.Tensor,
    *,
    missing: torch.Tensor | None = None,
    count: int | None = None,
    spacing: int = 1,
) -> None:
    """Count the keys of ``models`` (one may come more than once), shifted right by ``shift``.

    Inputs are unsigned bits, their types in ``codes`` (base, models). ``histograms``: [slots, copies, bins] int64,
    added to; ``slots``: [n] int64, where each model is counted; ``found``: [n, 3] int64, for each what ``select``
    found one level above, None at level 0. With ``missing``, [n] int64, only models count for which it is not 0.
    With ``count`` only so many elements count, in tiles that are ``spacing`` tiles apart.
    """
    over_tiles(
        histogram_kernel,
        base.numel() if count is None else count,
        base,
        tuple(models),
        slots,
        slots if found is None else found,
        slots if missing is None else missing,
        histograms,
        spacing,
        most_steps=MANY_STEPS,
        CODES=constants(codes),
        WORKING=working,
        SHIFT=shift,
        BINS=histograms.shape[2],
        COPIES=histograms.shape[1],
        BELOW=found is not None,
        ONLY_MISSING=missing is not None,
        N=len(models),
    )
