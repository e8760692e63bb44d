"""Statistics are data: those of pieces, merged in any order and sent to other processes, equal those of the whole."""

from __future__ import annotations

import pickle
import random
from array import array
from functools import reduce
from itertools import pairwise

import pytest
import torch
from adversarial import DTYPES, generator
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conformance import REFERENCE, chunk_of, dtype_of, found_at_once, found_by_counting
from under_test import INSTRUCTION_SETS

from merge_engine.backends.cpu import CpuBackend
from merge_engine.backends.operations import Found, KeyColumn
from merge_engine.backends.reference import add_in_order, keys_of
from merge_engine.backends.statistics import SUM_BLOCK, BlockSums, KeyTable, level_bins, levels

BACKENDS = [REFERENCE, *(CpuBackend(threads=2, instruction_set=name) for name in INSTRUCTION_SETS)]


def sent(value):
    """What arrives when it is sent to another process."""
    return pickle.loads(pickle.dumps(value))


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
    merged = reduce(BlockSums.merge, map(sent, pieces))
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


def tensors(seed: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A base of zeros, and a model of few and many magnitudes, ties and zeros among them."""
    g = generator(seed, size)
    spread = torch.exp2(torch.rand(size, generator=g) * 30 - 20)
    few = torch.tensor([0.0, 2.0**-9, -(2.0**-9), 1.0])[torch.randint(0, 4, (size,), generator=g)]
    model = torch.where(torch.rand(size, generator=g) < 0.5, spread, few)
    return torch.zeros(size, dtype=dtype), model.to(dtype)


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    cuts=st.sets(st.integers(1, 700), max_size=5),
    ranks=st.lists(st.integers(1, 700), min_size=1, max_size=3),
    order=st.randoms(use_true_random=False),
)
def test_key_tables(
    seed: int, dtype: torch.dtype, cuts: set[int], ranks: list[int], order: random.Random
) -> None:
    """Level by level: those of pieces, and a backend's answer when it is asked for the whole at once."""
    base, model = tensors(seed, 700, dtype)
    ends = sorted({0, 700} | cuts)
    keys = keys_of(model.to(torch.float64 if dtype == torch.float64 else torch.float32), dtype_of(base))
    exact = [int(keys.sort(descending=True).values[rank - 1]) for rank in ranks]
    for backend in BACKENDS:
        pieces = [chunk_of(backend, base[a:b], [model[a:b]], start=a) for a, b in pairwise(ends)]
        order.shuffle(pieces)
        whole = chunk_of(backend, base, [model])
        found: list[Found | None] = [None] * len(ranks)
        columns = [KeyColumn(slot, 0) for slot in range(len(ranks))]

        def tables(chunk, level: int, backend=backend, found=found, columns=columns) -> list[KeyTable]:
            counts = backend.new_counts(level, found)
            backend.count(chunk, columns, counts)
            return sent(backend.fetch(counts))

        for level in range(levels(whole.working)):
            parts = [tables(piece, level, found=found) for piece in pieces]
            merged = [reduce(KeyTable.merge, of_pieces) for of_pieces in zip(*parts, strict=True)]
            assert merged == tables(whole, level, found=found)
            assert all(len(table.counts) == level_bins(level) for table in merged)
            found = [table.find(rank, one) for table, rank, one in zip(merged, ranks, found, strict=True)]
        assert [one.key for one in found] == exact
        assert [(one.above, one.equal) for one in found] == [
            (int((keys > key).sum()), int((keys == key).sum())) for key in exact
        ]
        asked = [(0, rank) for rank in ranks]
        assert [backend.fetch(one) for one in found_at_once(backend, whole, asked)] == found
        assert [backend.fetch(one) for one in found_by_counting(backend, pieces, asked)] == found


def test_key_tables_that_do_not_fit_are_refused() -> None:
    first = KeyTable(0, None, array("Q", [0, 2, 1]) + array("Q", bytes(8 * (level_bins(0) - 3))))
    below = KeyTable(1, 2, array("Q", bytes(8 * level_bins(1))))
    with pytest.raises(ValueError, match="tables of different keys cannot be merged"):
        first.merge(below)
    with pytest.raises(ValueError, match="tables of different keys cannot be merged"):
        below.merge(KeyTable(1, 1, below.counts))
    assert first.find(1) == Found(2, 0, 1) and first.find(3) == Found(1, 1, 2)
    with pytest.raises(ValueError, match="counts other keys"):
        below.find(1, first.find(2))
    with pytest.raises(ValueError, match="counts other keys"):
        first.find(1, first.find(2))
    with pytest.raises(IndexError, match="no key of this rank"):
        first.find(4)


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**31),
    cuts=st.sets(st.integers(1, 700), max_size=5),
    nth=st.integers(0, 700),
)
def test_places_of_keys(seed: int, cuts: set[int], nth: int) -> None:
    """The n-th element with a key, counted on from piece to piece, is that of the whole."""
    base, model = tensors(seed, 700, torch.bfloat16)
    key = int(keys_of(torch.tensor([2.0**-9]), dtype_of(base)))
    ends = sorted({0, 700} | cuts)
    for backend in BACKENDS:
        total, offset = backend.locate(chunk_of(backend, base, [model]), 0, key, nth)
        ahead, found = nth, None
        for a, b in pairwise(ends):
            count, in_piece = backend.locate(
                chunk_of(backend, base[a:b], [model[a:b]], start=a), 0, key, max(ahead, 0)
            )
            if ahead >= 0 and in_piece is not None:
                found = a + in_piece
            ahead -= count
        assert (nth - ahead, found) == (total, offset)
