"""From ranks to masks: which keys a trim keeps, and what becomes of the ties at its thresholds.

Integers throughout, as in csrc/bands.h; steps 3 and 4 of docs/arithmetic.md. One program solves one band, and writes
its row of a table of masks (masks.py) in device memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from merge_engine.kernels.launching import OPTIONS
from merge_engine.kernels.masks import (
    HIGH_FIRST,
    HIGH_LAST,
    KEPT_WITHOUT_SLACK,
    LOW_FIRST,
    LOW_LAST,
    RANDOM_KEY,
    ROW,
    store_thresholds,
)
from merge_engine.kernels.numbers import magnitude_key, widen

# Columns of a row that describes a band; what was found for its two ranks follows, three numbers each.
FIRST = tl.constexpr(0)
LAST = tl.constexpr(1)
HAS_SLACK = tl.constexpr(2)
HAS_HIGH = tl.constexpr(3)
SPREAD = tl.constexpr(4)
EVERY_TIE = tl.constexpr(5)
LOW_PLACES = tl.constexpr(6)
HIGH_PLACES = tl.constexpr(8)
KEY = tl.constexpr(10)
LOW_FOUND = tl.constexpr(11)
HIGH_FOUND = tl.constexpr(14)
COLUMNS = tl.constexpr(17)

EVERYWHERE = tl.constexpr(0x7FFFFFFFFFFFFFFF)  # its lower 32 bits are the last of all draws


@triton.jit
def last_draw(kept, equal):
    """The last of the draws below floor(2^32 * kept / equal), by long division; -1 when there is none."""
    below = kept * 0
    remainder = kept
    for _ in tl.static_range(32):
        remainder = remainder << 1
        fits = remainder >= equal
        remainder = tl.where(fits, remainder - equal, remainder)
        below = (below << 1) | fits.to(tl.int64)
    return tl.where(kept >= equal, 0xFFFFFFFF, below - 1)


@triton.jit
def relaxed_key(key, factor, WORKING: tl.constexpr):
    """The key of RN(factor * magnitude(key)), one multiplication."""
    if WORKING == "F64":
        magnitude = widen(key.to(tl.uint64, bitcast=True), WORKING, tl.float64)
        relaxed = magnitude_key(factor * magnitude, WORKING)
    else:
        magnitude = widen(key.to(tl.uint32), WORKING, tl.float32)
        relaxed = magnitude_key(factor.to(tl.float32) * magnitude, WORKING)
    return relaxed.to(tl.int64)


@triton.jit
def bands_kernel(bands, factors, masks, WORKING: tl.constexpr):
    """One band. ``factors`` are 1 - slack."""
    band = bands + tl.program_id(0) * COLUMNS
    first = tl.load(band + FIRST)
    last = tl.load(band + LAST)
    has_slack = tl.load(band + HAS_SLACK) != 0
    has_high = tl.load(band + HAS_HIGH) != 0
    spread = tl.load(band + SPREAD) != 0
    every_tie = tl.load(band + EVERY_TIE) != 0
    low = tl.load(band + LOW_FOUND)
    low_above = tl.load(band + LOW_FOUND + 1)
    low_equal = tl.load(band + LOW_FOUND + 2)
    high = tl.load(band + HIGH_FOUND)
    high_above = tl.load(band + HIGH_FOUND + 1)
    high_equal = tl.load(band + HIGH_FOUND + 2)

    one_key = has_high & (high == low) & (has_slack == 0)
    whole = last - first + 1
    low_kept = tl.where(one_key, whole, last - low_above)
    high_kept = tl.where(one_key, whole, high_equal - (first - 1 - high_above))
    low_draws = last_draw(low_kept, low_equal)
    high_draws = last_draw(high_kept, high_equal)

    relaxed = relaxed_key(low, tl.load(factors + tl.program_id(0)), WORKING)
    bound = tl.where(has_slack, relaxed, low)
    # With slack every tie stays; zeros carry nothing, and are never kept.
    all_ties = has_slack | (bound == 0)
    bound = tl.maximum(bound, 1)

    top = tl.where(has_high & every_tie, high_above, first - 1)
    bottom = tl.where(low == 0, low_above, tl.where(every_tie, low_above + low_equal, last))

    low_first = tl.load(band + LOW_PLACES)
    low_last = tl.load(band + LOW_PLACES + 1)
    low_first = tl.where(spread, tl.where(low_draws < 0, 1, 0).to(tl.int64), low_first)
    low_last = tl.where(spread, tl.maximum(low_draws, 0), low_last)
    high_first = tl.load(band + HIGH_PLACES)
    high_last = tl.load(band + HIGH_PLACES + 1)
    high_first = tl.where(spread, tl.where(high_draws < 0, 1, 0).to(tl.int64), high_first)
    high_last = tl.where(spread, tl.maximum(high_draws, 0), high_last)

    row = masks + tl.program_id(0) * ROW
    low_first = tl.where(all_ties, 0, low_first)
    store_thresholds(row, bound, tl.where(has_high, high, 0), low_first, high_first, spread, WORKING)
    tl.store(row + LOW_FIRST, low_first)
    tl.store(row + LOW_LAST, tl.where(all_ties, EVERYWHERE, low_last))
    tl.store(row + HIGH_FIRST, high_first)
    tl.store(row + HIGH_LAST, high_last)
    tl.store(row + RANDOM_KEY, tl.load(band + KEY))
    tl.store(row + KEPT_WITHOUT_SLACK, tl.maximum(bottom - top, 0))  # 0: the band lies among the zeros


def bands(described: torch.Tensor, factors: torch.Tensor, masks: torch.Tensor, working: str) -> None:
    """Solve ``described``, [m, COLUMNS] int64, into ``masks``, [m, ROW] int64. ``factors``: [m] float64, 1 - slack."""
    bands_kernel[(len(described),)](described, factors, masks, WORKING=working, **OPTIONS)
