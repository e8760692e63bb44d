"""Which elements of a task vector a mask keeps, as in csrc/cpu/tile.h.

Every mask is a row of ten int64 numbers, so that a device can write the row of a band that it solved itself. What
kind of mask a row is, is known when the kernel is launched. Keys are looked for in the bits of the difference before it
is rounded: those of a key are a range, so no difference has to be rounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from merge_engine.kernels.draws import draws, top_bytes
from merge_engine.kernels.launching import OPTIONS
from merge_engine.kernels.numbers import first_magnitude

DENSE = tl.constexpr(0)
BAND_BY_INDEX = tl.constexpr(1)
BAND_BY_DRAW = tl.constexpr(2)
BAND_WITH_TOP_BY_INDEX = tl.constexpr(3)  # those of the two that have an upper bound as well
BAND_WITH_TOP_BY_DRAW = tl.constexpr(4)
DRAW = tl.constexpr(5)  # its draws are the row's low positions
RANKED = tl.constexpr(6)
RANKED_INVERSE = tl.constexpr(7)  # kept elements are divided by their probability
NOTHING = tl.constexpr(8)
NOTED = tl.constexpr(9)  # kept where the number in place of a threshold is not 0

# A band keeps magnitudes from LOW to HIGH_END, of those below LOW_END and from HIGH on only some positions.
LOW = tl.constexpr(0)
LOW_END = tl.constexpr(1)
HIGH = tl.constexpr(2)
HIGH_END = tl.constexpr(3)
LOW_FIRST = tl.constexpr(4)
LOW_LAST = tl.constexpr(5)
HIGH_FIRST = tl.constexpr(6)
HIGH_LAST = tl.constexpr(7)
RANDOM_KEY = tl.constexpr(8)
KEPT_WITHOUT_SLACK = tl.constexpr(9)  # no part of the mask, but solved with it
ROW = tl.constexpr(10)


@triton.jit
def store_thresholds(row, low, high, low_first, high_first, by_draw, WORKING: tl.constexpr):
    """Write the magnitudes of a band whose lowest and highest keys are given.

    An empty range of draws does not begin with 0. A threshold whose ties all go is moved past them.
    """
    low_end = first_magnitude(low + 1, WORKING)
    low_start = tl.where(by_draw & (low_first != 0), low_end, first_magnitude(low, WORKING))
    high_start = first_magnitude(high, WORKING)
    high_end = tl.where(by_draw & (high_first != 0), high_start, first_magnitude(high + 1, WORKING))
    tl.store(row + LOW, low_start.to(tl.int64))
    tl.store(row + LOW_END, low_end.to(tl.int64))
    tl.store(row + HIGH, high_start.to(tl.int64))
    tl.store(row + HIGH_END, high_end.to(tl.int64))


@triton.jit
def resolve_kernel(rows, by_draw, WORKING: tl.constexpr):
    """The magnitudes of one row that has keys instead, lowest and highest."""
    row = rows + tl.program_id(0) * ROW
    low_first = tl.load(row + LOW_FIRST)
    high_first = tl.load(row + HIGH_FIRST)
    drawn = tl.load(by_draw + tl.program_id(0)) != 0
    store_thresholds(row, tl.load(row + LOW), tl.load(row + HIGH), low_first, high_first, drawn, WORKING)


def resolve(rows: torch.Tensor, by_draw: torch.Tensor, working: str) -> None:
    """Turn ``rows``, [m, ROW] int64, which have the lowest and the highest key of a band, into masks.

    ``by_draw``: [m] int64, whether draws decide the ties of each.
    """
    resolve_kernel[(len(rows),)](rows, by_draw, WORKING=working, **OPTIONS)


@triton.jit
def placed_within(first, last, index, columns):
    """Whether ``index + columns`` lies in a range of flat indices. Columns are small, the others 64 bits wide."""
    begin = tl.minimum(tl.maximum(first - index, 0), 0x7FFFFFFF).to(tl.int32)
    end = tl.minimum(tl.maximum(last - index, -1), 0x7FFFFFFF).to(tl.int32)
    return (columns >= begin) & (columns <= end)


@triton.jit
def stays(row, FIRST: tl.constexpr, tied, tops, index, columns, BY_DRAW: tl.constexpr, ALIGNED: tl.constexpr):
    """Which of the ``tied`` elements are in the range of positions at ``FIRST`` of a row; others may be wrong.

    A range of draws begins with 0.
    """
    last = tl.load(row + FIRST + 1)
    if BY_DRAW:
        last = last.to(tl.uint32)
        among = tied & ((last & 0xFFFFFF) != 0xFFFFFF)
        result = draws(tops, last, among, tl.load(row + RANDOM_KEY), index, columns, ALIGNED) <= last
    else:
        result = placed_within(tl.load(row + FIRST), last, index, columns)
    return result


@triton.jit
def between(magnitude, first, end):
    """Whether magnitudes lie in [first, end), by a subtraction.

    What is compared again behind a branch must not be the same comparison as before it: compilers would keep its
    result for every element meanwhile, which takes more instructions than comparing again.
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
    ALIGNED: tl.constexpr,
):
    """Whether each element stays, [rows, 8].

    ``magnitude`` are the bits of the differences without their signs (see ``numbers.magnitude``), ``index`` and
    ``columns`` the elements' places (see draws.py). ``thresholds`` are those of the elements, for ``RANKED``.
    """
    BY_INDEX: tl.constexpr = (KIND == BAND_BY_INDEX) | (KIND == BAND_WITH_TOP_BY_INDEX)
    BY_DRAW: tl.constexpr = (BY_INDEX | (KIND == DENSE) | (KIND == NOTHING) | (KIND == NOTED)) == 0
    tops = columns.to(tl.uint32)  # stands in for draws where there are none
    if BY_DRAW:
        tops = top_bytes(tl.load(row + RANDOM_KEY), index, columns, ALIGNED)
    every = magnitude + 1 != 0
    if KIND == DENSE:
        kept = every
    elif KIND == NOTHING:
        kept = every == 0
    elif KIND == NOTED:
        kept = thresholds != 0
    elif KIND == DRAW:
        kept = stays(row, LOW_FIRST, every, tops, index, columns, BY_DRAW, ALIGNED)
    elif (KIND == RANKED) | (KIND == RANKED_INVERSE):
        key = tl.load(row + RANDOM_KEY)
        kept = draws(tops, thresholds, every, key, index, columns, ALIGNED) < thresholds
    else:
        low = tl.load(row + LOW).to(magnitude.dtype)
        low_end = tl.load(row + LOW_END).to(magnitude.dtype)
        tied = between(magnitude, low, low_end)
        stay = stays(row, LOW_FIRST, tied, tops, index, columns, BY_DRAW, ALIGNED)
        kept = (magnitude >= low_end) | ((magnitude >= low) & stay)
        if (KIND == BAND_WITH_TOP_BY_INDEX) | (KIND == BAND_WITH_TOP_BY_DRAW):
            high = tl.load(row + HIGH).to(magnitude.dtype)
            high_end = tl.load(row + HIGH_END).to(magnitude.dtype)
            tied = between(magnitude, high, high_end)
            stay = stays(row, HIGH_FIRST, tied, tops, index, columns, BY_DRAW, ALIGNED)
            kept = kept & ((magnitude < high) | ((magnitude < high_end) & stay))
    return kept
