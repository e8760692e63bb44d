"""Keys that are sought in a chunk that holds all elements are those that sorting finds, whatever the data."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from adversarial import DTYPES, extreme_models, generator, quantised_models
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conformance import chunk_of, found_by_counting, found_together
from under_test import INSTRUCTION_SETS

from merge_engine.backends.cpu import CpuBackend
from merge_engine.backends.operations import Found, KeyColumn, Sought
from merge_engine.dtypes import of_torch

BACKENDS = [CpuBackend(threads=3, instruction_set=name) for name in INSTRUCTION_SETS]
BLOCK = 65536
SIZE = 4 * BLOCK + 12_345
FEW = 2048  # keys that are looked at one by one: see csrc/cpu/find.cpp
RUN = 32  # of the sample: see csrc/cpu/sample.h


def keys_of(base: torch.Tensor, model: torch.Tensor, working: torch.dtype) -> torch.Tensor:
    """The keys of a task vector, by torch."""
    wide = torch.float64 if working == torch.float64 else torch.float32
    delta = model.to(working).to(wide) - base.to(working).to(wide)
    rounded = delta.abs().to(working)
    integer, nan = {
        torch.bfloat16: (torch.int16, 0x7FC0),
        torch.float16: (torch.int16, 0x7E00),
        torch.float32: (torch.int32, 0x7FC00000),
        torch.float64: (torch.int64, 0x7FF8 << 48),
    }[working]
    return torch.where(delta.isnan(), nan, rounded.view(integer).long())


def by_sorting(keys: torch.Tensor, ranks: Sequence[int]) -> list[Found]:
    ordered = keys.sort(descending=True).values
    found = [int(ordered[rank - 1]) for rank in ranks]
    return [Found(key, int((keys > key).sum()), int((keys == key).sum())) for key in found]


def agree(
    base: torch.Tensor,
    models: list[torch.Tensor],
    ranks: Sequence[tuple[int, ...]],
    working: torch.dtype | None = None,
) -> None:
    """What is found for the ranks of each model is what sorting all keys finds."""
    working = working or base.dtype
    expected: list[Found] = []
    for model, of_model in zip(models, ranks, strict=True):
        expected += by_sorting(keys_of(base, model, working), of_model)
    for backend in BACKENDS:
        chunk = chunk_of(backend, base, models, of_torch(working))
        found = found_together(backend, chunk, dict(enumerate(ranks)))
        assert [backend.fetch(one) for one in found] == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", (quantised_models, extreme_models))
def test_known_ranks(dtype: torch.dtype, make) -> None:
    base, models = make(SIZE, 3, dtype)
    agree(base, models, [(1, SIZE), (SIZE // 5,), (SIZE // 100, SIZE // 2)])
    agree(base, models, [(SIZE // 3, SIZE // 3 + 1), (SIZE - 1,), (2, 3)])
    agree(base, models[:1], [tuple(range(1, SIZE, SIZE // 10))])  # more than a search is worth while for


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("zeros", (0.0, 0.2, 0.5, 0.8))
def test_ranks_beside_and_among_zeros(dtype: torch.dtype, zeros: float) -> None:
    """Deltas that are rounded with their weights, as those of models are: few magnitudes, and many zeros."""
    g = generator(7)
    base = (torch.randn(SIZE, generator=g) * 0.02).to(dtype)
    delta = torch.randn(SIZE, generator=g) * 2e-4
    delta[torch.rand(SIZE, generator=g) < zeros] = 0
    model = (base.float() + delta).to(dtype)
    nonzero = int((model.float() - base.float()).count_nonzero())
    beside = [rank for rank in (nonzero - 1, nonzero, nonzero + 1) if rank <= SIZE]
    agree(base, [model] * 2, [(SIZE // 10, 6 * SIZE // 10), tuple(beside)])
    agree(base, [model] * 2, [(3 * SIZE // 10,), (9 * SIZE // 10,)])


@pytest.mark.parametrize("size", (FEW - 1, FEW, FEW + 1, 2 * FEW, BLOCK, BLOCK + 1, SIZE))
def test_zeros_and_a_lonely_value(size: int) -> None:
    for dtype in DTYPES:
        base = torch.zeros(size, dtype=dtype)
        lonely = base.clone()
        lonely[size // 2 + 1] = -3.0
        agree(base, [base.clone(), lonely], [(1, size), (1, 2)])


def sampled(size: int) -> torch.Tensor:
    """Where the sample looks."""
    runs = max(8, int(size ** (2 / 3)) // RUN)
    stride = size // runs
    places = torch.zeros(size, dtype=torch.bool)
    for run in range(runs):
        offset = (run * 0x9E3779B9 & 0xFFFFFFFF) * (stride - RUN) >> 32
        first = (run * stride + offset) // RUN * RUN
        places[first : first + RUN] = True
    return places


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("size", (FEW + 1, SIZE))
def test_a_sample_that_misleads(dtype: torch.dtype, size: int) -> None:
    """Wherever the sample looks are zeros, or huge values; the rest is spread over all magnitudes."""
    exponents = torch.rand(size, generator=generator(5)) * 20 - 12
    for bait in (0.0, 60_000.0):
        model = torch.exp2(exponents).to(dtype)
        model[sampled(size)] = bait
        agree(torch.zeros(size, dtype=dtype), [model], [(size // 7, size // 2, size - 5)])


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_far_more_keys_between_the_edges_than_the_sample_has(dtype: torch.dtype) -> None:
    """They would take too much memory: half of what the sample looks at is huge, the other half zero."""
    model = torch.exp2(torch.rand(SIZE, generator=generator(6)) * 20 - 12).to(dtype)
    where = sampled(SIZE)
    model[where] = torch.where(torch.arange(int(where.sum())) % 2 == 0, 60_000.0, 0.0).to(dtype)
    agree(torch.zeros(SIZE, dtype=dtype), [model], [(SIZE // 2, SIZE // 2 + 1)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", (1, 2, 63, 1024, FEW, FEW + 1, 5000))
def test_few_keys(dtype: torch.dtype, size: int) -> None:
    for make in (quantised_models, extreme_models):
        base, models = make(size, 2, dtype)
        agree(base, models, [(1, size), (size // 2 + 1, size // 3 + 1)])


@pytest.mark.parametrize("working", (torch.bfloat16, torch.float32), ids=str)
def test_inputs_of_other_dtypes(working: torch.dtype) -> None:
    base, models = quantised_models(SIZE, 3, torch.float32)
    models = [model + 1e-5 * torch.randn(SIZE, generator=generator(8)) for model in models]
    inputs = [model.to(dtype) for model, dtype in zip(models, DTYPES[1:], strict=True)]
    agree(base.bfloat16(), inputs, [(SIZE // 4,), (SIZE // 5, SIZE // 2), (SIZE // 3,)], working)


@pytest.mark.parametrize("backend", BACKENDS, ids=INSTRUCTION_SETS)
@pytest.mark.parametrize("size", (FEW, SIZE))
def test_the_largest_key(backend: CpuBackend, size: int) -> None:
    """It has no edge above it."""
    base = torch.zeros(size, dtype=torch.bfloat16)
    model = torch.full((size,), 0x7FFF, dtype=torch.int16).view(torch.bfloat16)
    [found] = backend.find_all(chunk_of(backend, base, [model]), 0, [Sought(0, (1, size))])
    assert [backend.fetch(one) for one in found] == [Found(0x7FC0, 0, size)] * 2


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_what_tables_found_is_taken_up(dtype: torch.dtype) -> None:
    """A level may go on with what was counted elsewhere, and then knows the key's upper bits only."""
    base, models = quantised_models(SIZE, 1, dtype)
    ranks = (SIZE // 10, SIZE // 2)
    expected = by_sorting(keys_of(base, models[0], dtype), ranks)
    for backend in BACKENDS:
        chunk = chunk_of(backend, base, models)
        counted = [backend.fetch(one) for one in found_by_counting(backend, [chunk], [(0, r) for r in ranks])]
        assert counted == expected
        counts = backend.new_counts(0, [None])
        backend.count(chunk, [KeyColumn(0, 0)], counts)
        [table] = backend.fetch(counts)
        if dtype == torch.float32:
            sought = [Sought(0, (rank,), table.find(rank)) for rank in ranks]
            assert [backend.fetch(one) for [one] in backend.find_all(chunk, 1, sought)] == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", (FEW, 2 * BLOCK, SIZE))
def test_places_of_a_key(dtype: torch.dtype, size: int) -> None:
    for make in (quantised_models, extreme_models):
        base, [model] = make(size, 1, dtype)
        keys = keys_of(base, model, dtype)
        for key in {0, int(keys.max()), int(keys.median())}:
            places = (keys == key).nonzero()[:, 0].tolist()
            for backend in BACKENDS:
                chunk = chunk_of(backend, base, [model])
                for nth in {0, len(places) // 2, len(places) - 1, len(places)}:
                    place = places[nth] if nth < len(places) else None
                    assert backend.locate(chunk, 0, key, nth) == (len(places), place)


@pytest.mark.parametrize("backend", BACKENDS, ids=INSTRUCTION_SETS)
def test_nothing_is_counted_outside_the_slot(backend: CpuBackend) -> None:
    base, models = extreme_models(SIZE, 1, torch.bfloat16)
    counts = backend.new_counts(0, [None] * 3)
    backend.count(chunk_of(backend, base, models), [KeyColumn(1, 0)], counts)
    assert [sum(table.counts) for table in backend.fetch(counts)] == [0, SIZE, 0]
    with pytest.raises(IndexError):
        backend.count(chunk_of(backend, base, models), [KeyColumn(3, 0)], counts)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES[:3]),
    size=st.sampled_from([FEW + 1, 10_000, BLOCK, SIZE]),
    distinct=st.sampled_from([1, 2, 3, 17, 500, 20_000]),
    skew=st.sampled_from([0.2, 1.0, 6.0]),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=6),
    ordered=st.booleans(),
)
def test_any_ranks_of_any_keys(
    seed: int, dtype: torch.dtype, size: int, distinct: int, skew: float, shares: list[float], ordered: bool
) -> None:
    """Bit patterns of a task vector, infinity and NaN included, each as often as it comes."""
    g = generator(seed, distinct)
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    values = torch.randint(0, torch.iinfo(integer).max, (distinct,), generator=g)
    drawn = (torch.rand(size, generator=g) ** skew * distinct).long().clamp(max=distinct - 1)
    bits = values[drawn]
    bits = bits.sort().values if ordered else bits
    model = bits.to(integer).view(dtype)
    agree(torch.zeros_like(model), [model], [tuple(max(1, int(share * size)) for share in shares)])
