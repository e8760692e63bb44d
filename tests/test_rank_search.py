"""Keys that are sought in a chunk that holds all elements are those that counting finds, whatever the data."""

from __future__ import annotations

import pytest
import torch
from adversarial import DTYPES, extreme_models, generator, quantised_models
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conformance import chunk_of, found_by_counting
from under_test import INSTRUCTION_SETS

from merge_engine.backends.cpu import CpuBackend
from merge_engine.backends.operations import Found, KeyColumn, Sought
from merge_engine.backends.statistics import levels

BACKENDS = [CpuBackend(threads=3, instruction_set=name) for name in INSTRUCTION_SETS]
WORTH_SEARCHING = 4 * 65536
SIZE = WORTH_SEARCHING + 12_345
RUN, SHARE = 32, 64  # of the sample: see csrc/cpu/search.h


def agree(base: torch.Tensor, models: list[torch.Tensor], ranks: list[tuple[int, ...]]) -> None:
    """What is found for the ranks of each model is what counting all keys finds, level by level."""
    asked = [(model, rank) for model, of_model in enumerate(ranks) for rank in of_model]
    for backend in BACKENDS:
        chunk = chunk_of(backend, base, models)
        counted = [backend.fetch(found) for found in found_by_counting(backend, [chunk], asked)]
        found = backend.find_all(chunk, 0, [Sought(model, of_model) for model, of_model in enumerate(ranks)])
        flat = [one for of_model in found for one in of_model]
        for level in range(1, levels(chunk.working)):
            sought = [Sought(model, (rank,), one) for (model, rank), one in zip(asked, flat, strict=True)]
            flat = [one for [one] in backend.find_all(chunk, level, sought)]
        assert [backend.fetch(one) for one in flat] == counted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", (quantised_models, extreme_models))
def test_known_ranks(dtype: torch.dtype, make) -> None:
    base, models = make(SIZE, 3, dtype)
    agree(base, models, [(1, SIZE), (SIZE // 5,), (SIZE // 100, SIZE // 2)])
    agree(base, models, [(SIZE // 3, SIZE // 3 + 1), (SIZE - 1,), (2, 3)])


@pytest.mark.parametrize("size", (WORTH_SEARCHING - 1, WORTH_SEARCHING, SIZE))
def test_zeros_and_a_lonely_value(size: int) -> None:
    base = torch.zeros(size, dtype=torch.bfloat16)
    lonely = base.clone()
    lonely[size // 2 + 1] = -3.0
    agree(base, [base.clone(), lonely], [(1, size), (1, 2)])


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_sample_that_misleads(dtype: torch.dtype) -> None:
    """Wherever the sample looks are zeros, or huge values; the rest is spread over all magnitudes."""
    stride = SIZE // (SIZE // SHARE // RUN)
    for bait in (0.0, 60_000.0):
        exponents = torch.rand(SIZE, generator=generator(5)) * 20 - 12
        model = torch.exp2(exponents).to(dtype)
        model[torch.arange(SIZE) % stride < RUN] = bait
        agree(torch.zeros(SIZE, dtype=dtype), [model], [(SIZE // 7, SIZE // 2, SIZE - 5)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", (1, 2, 63, 1024, 4 * 1024, 4 * 1024 + 1))
def test_few_keys(dtype: torch.dtype, size: int) -> None:
    for make in (quantised_models, extreme_models):
        base, models = make(size, 2, dtype)
        agree(base, models, [(1, size), (size // 2 + 1, size // 3 + 1)])


@pytest.mark.parametrize("backend", BACKENDS, ids=INSTRUCTION_SETS)
def test_the_largest_key(backend: CpuBackend) -> None:
    """It has no edge above it."""
    base = torch.zeros(SIZE, dtype=torch.bfloat16)
    model = torch.full((SIZE,), 0x7FFF, dtype=torch.int16).view(torch.bfloat16)
    [found] = backend.find_all(chunk_of(backend, base, [model]), 0, [Sought(0, (1, SIZE))])
    assert [backend.fetch(one) for one in found] == [Found(0x7FC0, 0, SIZE)] * 2


@pytest.mark.parametrize("backend", BACKENDS, ids=INSTRUCTION_SETS)
def test_nothing_is_counted_outside_the_slot(backend: CpuBackend) -> None:
    base, models = extreme_models(SIZE, 1, torch.bfloat16)
    counts = backend.new_counts(0, [None] * 3)
    backend.count(chunk_of(backend, base, models), [KeyColumn(1, 0)], counts)
    assert [sum(table.counts) for table in backend.fetch(counts)] == [0, SIZE, 0]
    with pytest.raises(IndexError):
        backend.count(chunk_of(backend, base, models), [KeyColumn(3, 0)], counts)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    distinct=st.sampled_from([1, 2, 3, 17, 500, 20_000]),
    skew=st.sampled_from([0.2, 1.0, 6.0]),
    ranks=st.lists(st.integers(1, SIZE), min_size=1, max_size=3),
    ordered=st.booleans(),
)
def test_any_ranks_of_any_keys(
    seed: int, distinct: int, skew: float, ranks: list[int], ordered: bool
) -> None:
    g = generator(seed, distinct)
    values = torch.randint(0, 0x7F80, (distinct,), generator=g)
    drawn = (torch.rand(SIZE, generator=g) ** skew * distinct).long().clamp(max=distinct - 1)
    keys = values[drawn]
    keys = keys.sort().values if ordered else keys
    model = keys.to(torch.int16).view(torch.bfloat16)
    agree(torch.zeros_like(model), [model], [tuple(ranks)])
