"""Scores, overlaps and nearswap: every backend gives the reference's bytes and counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from adversarial import DTYPES, extreme_models, generator, quantised_models
from test_conformance import (
    BACKENDS,
    REFERENCE,
    agree,
    bits,
    chunk_of,
    dtype_of,
    each_backend,
    found_by_counting,
)
from under_test import INTERPRETED, on, thinned

from merge_engine.backends.base import Backend
from merge_engine.backends.operations import (
    Band,
    Consensus,
    Dense,
    Divergence,
    Entry,
    FoundBand,
    Mask,
    Nearswap,
    RankMask,
    Score,
    Scored,
    Sought,
    Variance,
    key_dtype,
)
from merge_engine.backends.reference import keys_of
from merge_engine.backends.statistics import SUM_BLOCK, levels

SIZES = thinned((1, 0, 600, 63), 2)
TYPES = thinned(DTYPES, 3)
EVERY = 2**63 - 1


def spoilt(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same with a NaN or an infinity in each."""
    values = (float("nan"), float("inf"), -float("inf"))
    results = [tensor.clone() for tensor in tensors]
    for i, tensor in enumerate(results):
        if tensor.numel():
            tensor[(7 * i) % tensor.numel()] = values[i % 3]
    return results


def inputs_of(size: int, models: int, dtype: torch.dtype) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    """Ordinary, extreme, equal and spoilt ones."""
    base, tuned = quantised_models(size, models, dtype)
    extreme, others = extreme_models(size, models, dtype)
    first, *rest = spoilt([base, *tuned])
    return [(base, tuned), (extreme, others), (base, [tuned[0]] * models), (first, rest)]


def scores_of(models: int, size: int) -> list[Score]:
    found: list[Score] = [Variance(), Variance(storage_rounding=True)]
    if models == 1:
        lengths = {max(size, 1)} if INTERPRETED else {max(size, 1), 1, 7, 60}
        found += [Divergence(length) for length in lengths if size % length == 0]
    return found


def found_for(backend: Backend, chunk, score: Score, rank: int, at_once: bool):
    """A handle to what was found for a rank among the keys of a score."""
    if not at_once:
        return found_by_counting(backend, [chunk], [(score, rank)])[0]
    within = None
    for level in range(levels(key_dtype(score, chunk.working))):
        within = backend.find_all(chunk, level, [Sought(score, (rank,), within)])[0][0]
    return within


def measured(
    backend: Backend, base: torch.Tensor, tuned: list[torch.Tensor], score: Score
) -> tuple[object, ...]:
    """What a backend finds, keeps and merges by the keys of a score: located, found, and by masks of ranks."""
    size = base.numel()
    chunk = chunk_of(backend, base, tuned, start=SUM_BLOCK)
    zeros = backend.locate(chunk, score, 0, EVERY)
    if not size:
        return (zeros,)
    rank = max(size // 3, 1)
    found = found_for(backend, chunk, score, rank, at_once=len(tuned) != 2)
    key = backend.fetch(found).key
    real = key_dtype(score, chunk.working)
    masks = [
        backend.bands([FoundBand(RankMask(1, rank, ties=ties, random_key=5), found)], real)[0].mask
        for ties in ("spread", "all")
    ]
    masks.append(Band(max(key, 1), low_positions=(0, SUM_BLOCK + size // 2)))
    results: list[object] = [zeros, backend.fetch(found), backend.locate(chunk, score, key, 1)]
    for mask in masks:
        kept = [Scored(score, mask)] * len(tuned)
        operation = Consensus(tuple(Entry(one, 0.5) for one in kept), "deltas", True)
        output = torch.full_like(base, 7.0)
        if backend is not REFERENCE:
            output = on(backend, output)
        outcome = backend.fetch(backend.consensus(chunk, operation, backend.tensor(output)))
        squares = backend.fetch(backend.squares(chunk, kept, score == Variance(True)))
        sums = [str(total) for total in squares.totals()]  # NaN is not equal to itself
        results += [bits(output), outcome, sums]
    return tuple(results)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("models", (1, 2, 3))
def test_keys_of_scores(models: int, dtype: torch.dtype) -> None:
    """Found by rank, located, and kept by a mask that was solved from a rank."""
    for size in SIZES:
        for base, tuned in inputs_of(size, models, dtype)[: 4 if size > 1 else 2]:
            for score in scores_of(models, size):
                expected = measured(REFERENCE, base, tuned, score)
                for name, backend in BACKENDS.items():
                    assert measured(backend, base, tuned, score) == expected, (name, score)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("length", thinned((1, 100, 4_200), 2))
@each_backend
def test_importance_of_lines(backend: Backend, length: int, dtype: torch.dtype) -> None:
    """Lines of any length, of small weights only, and with values that differ much; and of another dtype than the
    working one.
    """
    lines = max(3, 200 // length)
    g = generator(length)
    place = torch.arange(lines * length)
    small_lines = place // length % 3 == 0
    scales = torch.tensor([0.02, 3.0, 300.0])[torch.where(small_lines, 0, place % 3)]
    base = torch.randn(lines * length, generator=g) * scales
    model = base + torch.randn(lines * length, generator=g) * 0.01
    for inputs in ((base.to(dtype), model.to(dtype)), (base.to(dtype), model)):
        keys = []
        for b in (REFERENCE, backend):
            chunk = chunk_of(b, inputs[0], [inputs[1]], working=dtype_of(inputs[0]))
            score = Divergence(length)
            ranks = (1, lines * length // 2 + 1)
            keys.append([b.fetch(found_for(b, chunk, score, rank, at_once=True)) for rank in ranks])
        assert keys[0] == keys[1]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("election", ("deltas", "overlap"))
@pytest.mark.parametrize("models", thinned((1, 2, 3, 4, 6), 2))
def test_votes_without_weights_and_overlaps(dtype: torch.dtype, election, models: int) -> None:
    for size in SIZES:
        for base, tuned in inputs_of(size, models, dtype):
            low = int(keys_of(torch.tensor([2.0**-10], dtype=torch.float64), dtype_of(base))[0])
            for storage, wide in ((False, False), (True, False), (True, True)):
                if (dtype == torch.float64 and storage) or (wide and election == "deltas"):
                    continue
                weights = (0.7, 0.3, 0.0, 1.5)
                for mask, scale in ((Dense(), 1.0), (Band(low), -0.4)):
                    entries = tuple(Entry(mask, weights[i % 4]) for i in range(models))
                    operation = Consensus(entries, election, election == "deltas", scale, storage, wide=wide)
                    agree(operation, base, tuned, out=torch.float32 if wide else None)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("models", (1, 2, 5))
@each_backend
def test_overlaps(backend: Backend, models: int, dtype: torch.dtype) -> None:
    for size in SIZES:
        for base, tuned in inputs_of(size, models, dtype):
            low = int(keys_of(torch.tensor([2.0**-10], dtype=torch.float64), dtype_of(base))[0])
            masks: list[Mask] = [Band(low + i) for i in range(models)]
            expected = REFERENCE.overlaps(chunk_of(REFERENCE, base, tuned), masks)
            assert backend.fetch(backend.overlaps(chunk_of(backend, base, tuned), masks)) == expected
            assert len(expected) == models


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("storage", (False, True))
def test_nearswap(dtype: torch.dtype, storage: bool) -> None:
    for size in SIZES:
        for base, tuned in inputs_of(size, 1, dtype):
            for threshold in (0.0, 1e-7, 2.0**-11, 1e-3, 5.0):
                agree(Nearswap(threshold, storage), base, tuned)
    base, tuned = quantised_models(5_003, 1, torch.bfloat16)
    agree(Nearswap(1e-3), base, [tuned[0].float()], working=dtype_of(base), out=torch.float32)


@each_backend
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_squares_do_not_depend_on_chunks(backend: Backend, dtype: torch.dtype) -> None:
    size, cut = 2 * SUM_BLOCK + 77, SUM_BLOCK
    base, models = quantised_models(size, 2, dtype)
    keep: list[Mask] = [Dense(), Band(5)]
    for storage in (False, True):
        whole = REFERENCE.squares(chunk_of(REFERENCE, base, models), keep, storage)
        parts = [
            backend.fetch(
                backend.squares(
                    chunk_of(backend, base[first:last], [m[first:last] for m in models], start=first),
                    keep,
                    storage,
                )
            )
            for first, last in ((cut, size), (0, cut))
        ]
        assert parts[0].merge(parts[1]) == whole
    delta = (models[0].double() - base.double()).square().sum()
    assert whole.totals()[0] == pytest.approx(float(delta), rel=1e-2 if dtype.itemsize == 2 else 1e-6)


@each_backend
def test_scores_of_a_part_of_a_chunk(backend: Backend) -> None:
    """What was noted of a whole chunk holds for its parts."""
    if INTERPRETED:
        pytest.skip("no backend with a device measures whole what it merges in parts")
    length, size = 512, 4 * SUM_BLOCK
    base, models = quantised_models(size, 1, torch.bfloat16)
    operation = Consensus((Entry(Scored(Divergence(length), Band(3)), 1.0),))
    whole = chunk_of(backend, base, models)
    backend.fetch(backend.squares(whole, [operation.entries[0].mask], False))
    outputs = []
    for first in range(0, size, SUM_BLOCK):
        last = first + SUM_BLOCK
        chunk = chunk_of(backend, base[first:last], [models[0][first:last]], start=first)
        if isinstance(backend.name, str) and backend.name == "cpu":
            chunk = replace(chunk, part_of=whole)
        output = on(backend, torch.empty(SUM_BLOCK, dtype=base.dtype))
        backend.fetch(backend.consensus(chunk, operation, backend.tensor(output)))
        outputs.append(output.cpu())
    expected = torch.empty_like(base)
    REFERENCE.consensus(chunk_of(REFERENCE, base, models), operation, REFERENCE.tensor(expected))
    assert torch.equal(torch.cat(outputs), expected)
