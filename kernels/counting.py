"""Counts of a tile, four to a number, so that a program sums and adds to memory once for all four.

The sums of 16-bit fields stay exact because a tile has fewer than 2^16 elements.
"""

import triton
import triton.language as tl

KEPT = tl.constexpr(0)
LOST = tl.constexpr(1)
SAVED = tl.constexpr(2)
NON_FINITE = tl.constexpr(3)
FIELDS = tl.constexpr(4)


@triton.jit
def tally(which, FIELD: tl.constexpr):
    """How many elements of every eight (those of one thread) are marked, in one field of an int64."""
    eights = tl.reshape(which.to(tl.int32), (which.shape[0] // 8, 8))
    return tl.sum(eights, axis=1).to(tl.int64) << (16 * FIELD)


@triton.jit
def add_tallies(counts, tallies):
    """Add tallies to four int64 counts in memory."""
    field = tl.arange(0, FIELDS)
    amounts = (tl.sum(tallies, axis=0) >> (16 * field)) & 0xFFFF
    tl.atomic_add(counts + field, amounts, mask=amounts > 0, sem="relaxed")
