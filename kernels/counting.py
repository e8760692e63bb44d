"""Counts of what becomes of elements: summed in registers, added to memory once for a program.

A count of each model has four fields in memory. Two of them share an int32 on the way, the second 16 bits higher: a
program has fewer than 2^15 elements.
"""

import triton
import triton.language as tl

from merge_engine.kernels.launching import COLUMNS
from merge_engine.kernels.numbers import load, non_finite

KEPT = tl.constexpr(0)
LOST = tl.constexpr(1)
SAVED = tl.constexpr(2)
NON_FINITE = tl.constexpr(3)
FIELDS = tl.constexpr(4)


@triton.jit
def tally(marked):
    """[rows] of int32: how many elements of each row are marked."""
    return tl.sum(marked.to(tl.int32), 1)


@triton.jit
def add_tallies(counts, tallies):
    """Add the tallies of all rows to two neighbouring int64 in memory."""
    total = tl.sum(tallies, 0)
    field = tl.arange(0, 2)
    amounts = (total >> (16 * field)) & 0xFFFF
    tl.atomic_add(counts + field, amounts.to(tl.int64), mask=amounts != 0, sem="relaxed")


@triton.jit
def count_non_finite(
    array,
    counts,
    first_tile,
    steps,
    count,
    CODE: tl.constexpr,
    WORKING: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add how many elements of a program's tiles are NaN or infinite to the count of one array.

    Few programs have any; so the others do not count them, and these read the array once more.
    """
    places = (tl.arange(0, ROWS) * COLUMNS)[:, None] + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((ROWS,), tl.int32)
    step = steps * 0
    while step < steps:
        first = (first_tile + step).to(tl.int64) * (ROWS * COLUMNS)
        values = load(array + first, places, first + places < count, CODE, WORKING, MASKED)
        total += tl.sum(non_finite(values).to(tl.int32), 1)
        step += 1
    tl.atomic_add(counts + NON_FINITE, tl.sum(total, 0).to(tl.int64), sem="relaxed")
