"""Which elements of a task vector a mask keeps, as in csrc/cpu/tile.h.

Every mask is a row of eight int64 numbers, so that a device can write the row of a band that it solved itself. What
kind of mask a row is, is known when the kernel is launched. Keys are looked for in the bits of the difference before it
is rounded: those of a key are a range, so no difference has to be rounded.
"""

import triton
import triton.language as tl

from merge_engine.kernels.draws import draws, top_bytes
from merge_engine.kernels.numbers import first_magnitude

DENSE = tl.constexpr(0)
BAND_BY_INDEX = tl.constexpr(1)
BAND_BY_DRAW = tl.constexpr(2)
BAND_WITH_TOP_BY_INDEX = tl.constexpr(3)  # those of the two that have an upper bound as well
BAND_WITH_TOP_BY_DRAW = tl.constexpr(4)
DRAW = tl.constexpr(5)  # its draws are the row's low positions
RANKED = tl.constexpr(6)
RANKED_INVERSE = tl.constexpr(7)  # kept elements are divided by their probability

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
def placed_within(first, last, index, columns):
    """Whether ``index + columns`` lies in a range of flat indices. Columns are small, the others 64 bits wide."""
    begin = tl.minimum(tl.maximum(first - index, 0), 0x7FFFFFFF).to(tl.int32)
    end = tl.minimum(tl.maximum(last - index, -1), 0x7FFFFFFF).to(tl.int32)
    return (columns >= begin) & (columns <= end)


@triton.jit
def is_empty(row, FIRST: tl.constexpr, BY_DRAW: tl.constexpr):
    """Whether the range of draws at ``FIRST`` of a row is empty: if not, it begins with 0."""
    return (tl.load(row + FIRST) != 0) & BY_DRAW


@triton.jit
def stays(row, FIRST: tl.constexpr, tied, tops, index, columns, BY_DRAW: tl.constexpr, ALIGNED: tl.constexpr):
    """Which of the ``tied`` elements are in the range of positions at ``FIRST`` of a row; others may be wrong.

    All may be wrong if it is an empty range of draws.
    """
    last = tl.load(row + FIRST + 1)
    if BY_DRAW:
        last = tl.minimum(last, 0xFFFFFFFF).to(tl.uint32)
        among = tied & ((last & 0xFFFFFF) != 0xFFFFFF)
        result = draws(tops, last, among, tl.load(row + RANDOM_KEY), index, columns, ALIGNED) <= last
    else:
        result = placed_within(tl.load(row + FIRST), last, index, columns)
    return result


@triton.jit
def between(magnitude, first, end):
    """Whether magnitudes lie in [first, end), by a subtraction.

    What is compared again behind a branch must not be the same comparison as before it: compilers would keep its result for
    every element meanwhile, which takes more instructions than comparing again.
    """
    return magnitude - first < end - first


@triton.jit
def keeps(
    row,
    thresholds,
    magnitude,
    index,
    columns,
    KIND: tl.constexpr,
    WORKING: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Whether each element stays, [rows, 8].

    ``magnitude`` are the bits of the differences without their signs (see ``numbers.magnitude``), ``index`` and
    ``columns`` the elements' places (see draws.py). ``thresholds`` are those of the elements, for ``RANKED``.
    """
    BY_DRAW: tl.constexpr = (KIND != DENSE) & (KIND != BAND_BY_INDEX) & (KIND != BAND_WITH_TOP_BY_INDEX)
    tops = columns.to(tl.uint32)  # stands in for draws where there are none
    if BY_DRAW:
        tops = top_bytes(tl.load(row + RANDOM_KEY), index, columns, ALIGNED)
    every = magnitude + 1 != 0
    if KIND == DENSE:
        kept = every
    elif KIND == DRAW:
        stay = stays(row, LOW_FIRST, every, tops, index, columns, BY_DRAW, ALIGNED)
        kept = stay & (is_empty(row, LOW_FIRST, BY_DRAW) == 0)
    elif (KIND == RANKED) | (KIND == RANKED_INVERSE):
        key = tl.load(row + RANDOM_KEY)
        kept = draws(tops, thresholds, every, key, index, columns, ALIGNED) < thresholds
    else:
        key = tl.load(row + LOW)
        low_end = first_magnitude(key + 1, WORKING)
        low = tl.where(is_empty(row, LOW_FIRST, BY_DRAW), low_end, first_magnitude(key, WORKING))
        tied = between(magnitude, low, low_end)
        stay = stays(row, LOW_FIRST, tied, tops, index, columns, BY_DRAW, ALIGNED)
        kept = (magnitude >= low_end) | ((magnitude >= low) & stay)
        if (KIND == BAND_WITH_TOP_BY_INDEX) | (KIND == BAND_WITH_TOP_BY_DRAW):
            key = tl.load(row + HIGH)
            high = first_magnitude(key, WORKING)
            high_end = tl.where(is_empty(row, HIGH_FIRST, BY_DRAW), high, first_magnitude(key + 1, WORKING))
            tied = between(magnitude, high, high_end)
            stay = stays(row, HIGH_FIRST, tied, tops, index, columns, BY_DRAW, ALIGNED)
            kept = kept & ((magnitude < high) | ((magnitude < high_end) & stay))
    return kept
