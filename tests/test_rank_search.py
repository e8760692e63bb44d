"""A histogram that is asked for known ranks only answers them as the full one does, whatever the data."""

from __future__ import annotations

import pytest
import torch
from adversarial import DTYPES, extreme_models, generator, quantised_models
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conformance import chunk_of
from under_test import INSTRUCTION_SETS

from merge_engine.backends.cpu import CpuBackend
from merge_engine.backends.operations import Column, Found, Rank
from merge_engine.backends.statistics import level_bins, levels

BACKENDS = [CpuBackend(threads=3, instruction_set=name) for name in INSTRUCTION_SETS]
WORTH_SEARCHING = 4 * 65536
SIZE = WORTH_SEARCHING + 12_345
RUN, SHARE = 32, 64  # of the sample: see csrc/cpu/search.h


def find(backend, base: torch.Tensor, models: list[torch.Tensor], ranks: list[tuple[int, ...]], known: bool):
    """What ``select`` finds for the ranks of each model, with or without having known them."""
    chunk = chunk_of(backend, base, models)
    asked = [(model, rank) for model, of_model in enumerate(ranks) for rank in of_model]
    histograms = backend.new_histograms(0, len(models))
    columns = [Column(m, m, ranks=of_model if known else ()) for m, of_model in enumerate(ranks)]
    backend.histogram(chunk, 0, columns, histograms)
    found = backend.select(histograms, 0, [Rank(*query) for query in asked])
    for level in range(1, levels(chunk.working)):
        histograms = backend.new_histograms(level, len(asked))
        columns = [Column(slot, asked[slot][0], within) for slot, within in enumerate(found)]
        backend.histogram(chunk, level, columns, histograms)
        found = backend.select(
            histograms, level, [Rank(slot, asked[slot][1], within) for slot, within in enumerate(found)]
        )
    return [Found(*backend.fetch(answer)) for answer in found]


def agree(base: torch.Tensor, models: list[torch.Tensor], ranks: list[tuple[int, ...]]) -> None:
    for backend in BACKENDS:
        assert find(backend, base, models, ranks, True) == find(backend, base, models, ranks, False)


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


@pytest.mark.parametrize("backend", BACKENDS, ids=INSTRUCTION_SETS)
def test_nothing_is_counted_outside_the_slot(backend: CpuBackend) -> None:
    """The largest key has no edge above it, and a histogram ends there."""
    base, models = extreme_models(SIZE, 1, torch.bfloat16)
    bins = level_bins(0)
    histograms = backend.new_histograms(0, 3)
    for place in range(3 * bins):
        histograms[place] = 7
    backend.histogram(chunk_of(backend, base, models), 0, [Column(1, 0, ranks=(1, SIZE))], histograms)
    assert set(histograms[:bins]) == set(histograms[2 * bins :]) == {7}
    assert sum(histograms[bins : 2 * bins]) == SIZE + 7 * bins


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
