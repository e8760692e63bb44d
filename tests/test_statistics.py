"""Statistics are data: those of pieces, merged in any order and sent to other processes, are those of the whole."""

from __future__ import annotations

import pickle
import random
from array import array
from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_engine.backends.reference import add_in_order
from merge_engine.backends.statistics import SUM_BLOCK, BlockSums

# Sums of these depend on the order of adding.
numbers = st.floats(allow_nan=False, allow_infinity=False, width=64) | st.sampled_from(
    [1e16, 1.0, -1e16, 0.1]
)


@given(
    columns=st.integers(1, 4),
    first=st.integers(0, 2**40),
    rows=st.lists(st.tuples(numbers, numbers, numbers, numbers), max_size=12),
    cuts=st.sets(st.integers(0, 12)),
    seed=st.randoms(use_true_random=False),
)
def test_block_sums(columns: int, first: int, rows: list, cuts: set[int], seed: random.Random) -> None:
    values = [value for row in rows for value in row[:columns]]
    whole = BlockSums.of(first * SUM_BLOCK, columns, array("d", values))
    ends = sorted({0, len(rows)} | {cut for cut in cuts if cut < len(rows)})
    pieces = [
        BlockSums.of((first + a) * SUM_BLOCK, columns, array("d", values[a * columns : b * columns]))
        for a, b in zip(ends, [*ends[1:], len(rows)], strict=True)
    ]
    seed.shuffle(pieces)
    merged = reduce(BlockSums.merge, [pickle.loads(pickle.dumps(piece)) for piece in pieces])
    assert merged == whole
    assert list(map(repr, merged.totals())) == list(map(repr, add_in_order(values, columns)))


def test_block_sums_that_do_not_fit_are_refused() -> None:
    sums = BlockSums.of(0, 2, array("d", [1, 2, 3, 4]))
    with pytest.raises(ValueError, match="block 1 of a sum came twice"):
        sums.merge(BlockSums.of(SUM_BLOCK, 2, array("d", [1, 2])))
    with pytest.raises(ValueError, match="before block 3 are missing"):
        sums.merge(BlockSums.of(3 * SUM_BLOCK, 2, array("d", [1, 2]))).totals()
    with pytest.raises(ValueError, match="2 columns of sums cannot be merged with 1"):
        sums.merge(BlockSums.of(2 * SUM_BLOCK, 1, array("d", [1])))
    with pytest.raises(ValueError, match="inside a block of 4096"):
        BlockSums.of(17, 1, array("d", [1]))
    assert sums != BlockSums.of(0, 2, array("d", [1, 2, 3, 5]))
    assert sums != BlockSums.of(SUM_BLOCK, 2, array("d", [1, 2, 3, 4]))
