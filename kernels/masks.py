"""Which elements of a task vector a mask keeps, as in csrc/cpu/tile.h.

Every mask is a row of eight int64 numbers, so that a device can write the row of a band that it solved itself. What
kind of mask a row is, is known when the kernel is launched.
"""

import triton
import triton.language as tl

from merge_engine.kernels.draws import below, top_bytes
from merge_engine.kernels.numbers import magnitude_key

DENSE = tl.constexpr(0)
BAND_BY_INDEX = tl.constexpr(1)
BAND_BY_DRAW = tl.constexpr(2)
DRAW = tl.constexpr(3)  # its draws are the row's low positions
RANKED = tl.constexpr(4)
RANKED_INVERSE = tl.constexpr(5)  # kept elements are divided by their probability

LOW = tl.constexpr(0)
HIGH = tl.constexpr(1)
LOW_FIRST = tl.constexpr(2)
LOW_LAST = tl.constexpr(3)
HIGH_FIRST = tl.constexpr(4)
HIGH_LAST = tl.constexpr(5)
RANDOM_KEY = tl.constexpr(6)
KEPT_WITHOUT_SLACK = tl.constexpr(7)  # no part of the mask, but solved with it
ROW = tl.constexpr(8)


@triton.jit
def draws_below(first, last):
    """The bound that draws in a range of them, which begins with 0 or is empty, are below."""
    return tl.where(first > last, 0, tl.minimum(last, 0xFFFFFFFF) + 1)


@triton.jit
def placed_within(place, first, last, index):
    """Whether ``index + place`` lies in a range of flat indices; places are small, the others 64 bits wide."""
    begin = tl.minimum(tl.maximum(first - index, 0), 0x7FFFFFFF).to(tl.int32)
    end = tl.minimum(tl.maximum(last - index, -1), 0x7FFFFFFF).to(tl.int32)
    return (place >= begin) & (place <= end)


@triton.jit
def keeps(row, thresholds, delta, index, place, groups, KIND: tl.constexpr, WORKING: tl.constexpr):
    """Whether each element stays.

    The element at ``place`` (int32) has the flat index ``index + place``; ``groups``, [n, 1], holds the places at
    which its groups of 64 begin, in the same order. ``thresholds`` are those of the elements, for ``RANKED``.
    """
    if KIND == DENSE:
        kept = place >= 0
    elif (KIND == BAND_BY_INDEX) | (KIND == BAND_BY_DRAW):
        key = magnitude_key(delta, WORKING)
        low = tl.load(row + LOW).to(key.dtype)
        high = tl.minimum(tl.load(row + HIGH), 0x7FFFFFFF if WORKING != "F64" else 0x7FFFFFFFFFFFFFFF)
        high = high.to(key.dtype)
        if KIND == BAND_BY_DRAW:
            random_key = tl.load(row + RANDOM_KEY)
            drawn = tl.reshape(top_bytes(random_key, index + groups), place.shape)
            low_draws = draws_below(tl.load(row + LOW_FIRST), tl.load(row + LOW_LAST))
            high_draws = draws_below(tl.load(row + HIGH_FIRST), tl.load(row + HIGH_LAST))
            low_stays = below(drawn, random_key, index + groups, low_draws, key == low)
            high_stays = below(drawn, random_key, index + groups, high_draws, key == high)
        else:
            low_stays = placed_within(place, tl.load(row + LOW_FIRST), tl.load(row + LOW_LAST), index)
            high_stays = placed_within(place, tl.load(row + HIGH_FIRST), tl.load(row + HIGH_LAST), index)
        kept = (key >= low) & (key <= high) & ((key != low) | low_stays) & ((key != high) | high_stays)
    else:
        random_key = tl.load(row + RANDOM_KEY)
        drawn = tl.reshape(top_bytes(random_key, index + groups), place.shape)
        if KIND == DRAW:
            bound = draws_below(tl.load(row + LOW_FIRST), tl.load(row + LOW_LAST))
        else:
            bound = thresholds
        kept = below(drawn, random_key, index + groups, bound, place >= 0)
    return kept
