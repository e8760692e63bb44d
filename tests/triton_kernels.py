"""The ways that only the Triton kernels go, on a GPU or interpreted (test_triton_conformance.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adversarial import DTYPES, extreme_models, generator, quantised_models
from test_conformance import agree, chunk_of, found_at_once, found_by_counting
from under_test import on

from merge_engine.backends import create_backend
from merge_engine.backends.operations import (
    Band,
    Combine,
    Consensus,
    Dense,
    Divergence,
    Draw,
    Entry,
    Found,
    FoundBand,
    Nearswap,
    RankMask,
    Scored,
    Sought,
    Variance,
)
from merge_engine.backends.reference import ReferenceBackend, draws
from merge_engine.kernels import launching, search

BACKEND = create_backend("triton")
SIZE = search.WORTH_SEARCHING + 777
STRIDE = SIZE // search.SAMPLED * launching.TILE  # from one sampled tile to the next


def found_without_a_table(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> list[Found]:
    """What a search finds of its own, without the table that is made where it fails."""
    with monkeypatch.context() as patch:
        patch.setattr(search, "select", lambda *_: None)
        return [BACKEND.fetch(found) for found in found_at_once(BACKEND, *arguments)]


def search_agrees(
    base: torch.Tensor, models: list[torch.Tensor], ranks: list[tuple[int, ...]]
) -> list[Found]:
    """What is found for several ranks of each model is what the reference finds by counting."""
    asked = [(model, rank) for model, of_model in enumerate(ranks) for rank in of_model]
    reference = ReferenceBackend()
    whole = chunk_of(reference, base, models)
    expected = [level_0 for [level_0] in reference.find_all(whole, 0, [Sought(m, (r,)) for m, r in asked])]
    sought = [Sought(model, of_model) for model, of_model in enumerate(ranks)]
    found = BACKEND.find_all(chunk_of(BACKEND, base, models), 0, sought)
    assert [BACKEND.fetch(one) for of_model in found for one in of_model] == expected
    return expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", (quantised_models, extreme_models))
def test_a_search_finds_what_counting_finds(dtype: torch.dtype, make: Any) -> None:
    base, models = make(SIZE, 3, dtype)
    search_agrees(base, models, [(1, SIZE), (SIZE // 5,), (SIZE // 100, SIZE // 2, SIZE // 2 + 1)])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_no_table_is_made_where_the_sample_is_like_the_rest(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, models = quantised_models(SIZE, 2, dtype)
    ranks = [(0, SIZE // 5), (1, SIZE // 3), (1, SIZE // 2)]
    chunk = chunk_of(BACKEND, base, models)
    counted = [BACKEND.fetch(found) for found in found_by_counting(BACKEND, [chunk], ranks)]
    assert found_without_a_table(monkeypatch, chunk, ranks) == counted


@pytest.mark.parametrize("bait", (0.0, 60_000.0, float("nan")))
def test_a_sample_that_misleads(bait: float) -> None:
    """Wherever it looks are zeros, huge values or NaN; the rest is spread over all magnitudes."""
    for dtype in DTYPES[:3]:
        model = torch.exp2(torch.rand(SIZE, generator=generator(5)) * 20 - 12).to(dtype)
        model[torch.arange(SIZE) % STRIDE < launching.TILE] = bait
        search_agrees(torch.zeros(SIZE, dtype=dtype), [model], [(SIZE // 7, SIZE // 2, SIZE - 5)])


def test_edges_at_either_end() -> None:
    """All zero, one value among zeros, all equal, all NaN, all of the largest number: some edges do not exist."""
    base = torch.zeros(SIZE, dtype=torch.bfloat16)
    lonely = base.clone()
    lonely[SIZE // 2 + 1] = -3.0
    equal = torch.full_like(base, 0.5)
    nan = torch.full_like(base, float("nan"))
    largest = torch.full_like(base, torch.finfo(torch.bfloat16).max)
    models = [base.clone(), lonely, equal, nan, largest]
    found = search_agrees(base, models, [(1, SIZE), (1, 2), (1, SIZE), (1, SIZE), (1, SIZE)])
    assert found[6] == Found(0x7FC0, 0, SIZE)


def test_neighbouring_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that are one apart share edges; one further off on either side is then found as well."""
    keys = torch.randint(0, 5, (SIZE,), generator=generator(8)) + 0x3F80
    model = keys.to(torch.int16).view(torch.bfloat16)
    base = torch.zeros_like(model)
    chunk = chunk_of(BACKEND, base, [model])
    ranks = [(0, int((keys >= 0x3F80 + step).sum())) for step in range(1, 5)]
    found = found_without_a_table(monkeypatch, chunk, ranks)
    assert [one.key - 0x3F80 for one in found] == [1, 2, 3, 4]
    assert [one.above + one.equal for one in found] == [rank for _, rank in ranks]


@pytest.mark.parametrize(("others", "share"), ((0x3F80, 0.55), (0x3F84, 0.45)))
def test_the_key_beyond_a_neighbour(others: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample has three keys in a row, and the rank in the middle one. All other elements lie one beyond them."""
    keys = torch.full((SIZE,), others)
    sampled = torch.arange(SIZE) % STRIDE < launching.TILE
    keys[sampled] = torch.randint(0x3F81, 0x3F84, (int(sampled.sum()),), generator=generator(9))
    model = keys.to(torch.int16).view(torch.bfloat16)
    chunk = chunk_of(BACKEND, torch.zeros_like(model), [model])
    [found] = found_without_a_table(monkeypatch, chunk, [(0, int(share * SIZE))])
    assert found == Found(others, int((keys > others).sum()), int((keys == others).sum()))


@pytest.mark.parametrize("divisor", (0.7, 3.0, 1 + 2.0**-23, 2 - 2.0**-23, 2.0**-149, 3e38, -1e-40))
def test_quotients_are_rounded_once(divisor: float) -> None:
    """By a reciprocal in float64, whatever the quotient: also where it is denormal, too large, or NaN."""
    bits = torch.randint(-(2**31), 2**31, (9_000,), generator=generator(3)).to(torch.int32)
    mantissas = (
        torch.arange(4_000, dtype=torch.int32) + 0x3F800000 + 0x7FF000 * (torch.arange(4_000) % 2).int()
    )
    dividends = torch.cat([bits, mantissas.int()]).view(torch.float32)
    agree(Combine((1.0,), divisor), None, [dividends])
    weights = Consensus((Entry(Dense(), divisor), Entry(Dense(), 0.3)), "sum", True)
    agree(weights, torch.zeros_like(dividends), [dividends, dividends.flip(0)])


@pytest.mark.parametrize("size", (1, 7, 4096, 4097, 12_289, 16_385))
def test_values_that_are_not_finite_anywhere(size: int) -> None:
    """In the first and the last element of the programs, of inputs and output alone, of whole and partial tiles."""
    for place in {0, size // 2, size - 1}:
        for which in range(3):
            inputs = list(torch.full((3, size), 0.25, dtype=torch.bfloat16))
            inputs[which][place] = float("inf")
            outcome = agree(Consensus((Entry(Dense(), 1.0),) * 2, "sum", True), inputs[0], inputs[1:])
            assert outcome.non_finite[which] == 1
            outcome = agree(Combine((1.0, 2.0, 3.0)), None, inputs)
            assert outcome.non_finite[which] == 1
    huge = torch.full((size,), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)
    outcome = agree(Combine((1.0, 1.0)), None, [huge, huge])
    assert outcome == ((), (0, 0), size)


@pytest.mark.parametrize("start", (16, 7, 2**33 + 5, 2**40 - 8))
def test_draws_anywhere(start: int) -> None:
    """Of chunks that begin at any index, beyond 32 bits too; with bounds that lower bits of draws decide."""
    base, models = quantised_models(3_001, 2, torch.bfloat16)
    drawn = draws(9, torch.arange(start, start + 3_001))
    for bound in (2**30 + 3, int(drawn[1_234]), int(drawn[2_999]) + 1, 0, 2**32):
        entries = (Entry(Draw(bound, 9), 1.0), Entry(Draw(2**32 - 1, 10), 0.5))
        agree(Consensus(entries, "sum", True), base, models, start=start)


def test_ties_that_all_stay_beyond_32_bits() -> None:
    """With slack they stay wherever they are, although draws would have decided without it."""
    base, models = quantised_models(3_001, 2, torch.bfloat16)
    outputs = []
    for backend in (ReferenceBackend(), BACKEND):
        chunk = chunk_of(backend, base, models, start=2**33)
        found = found_by_counting(backend, [chunk], [(0, 900)])
        [solved] = backend.bands([FoundBand(RankMask(1, 900, 0.1, random_key=5), found[0])], chunk.working)
        output = on(backend, torch.empty_like(base))
        operation = Consensus((Entry(solved.mask, 1.0), Entry(Dense(), 0.5)), "sum", True)
        backend.fetch(backend.consensus(chunk, operation, backend.tensor(output)))
        outputs.append(output.cpu())
    assert torch.equal(*outputs)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64), ids=str)
def test_scores_overlaps_and_nearswap(dtype: torch.dtype) -> None:
    """Once each: test_conformance_scores.py has more, and takes the interpreter too long."""
    size, reference = 300, ReferenceBackend()
    backend = BACKEND
    base, models = quantised_models(size, 2, dtype)
    agree(Nearswap(1e-3), base, models[:1])
    agree(Consensus((Entry(Band(5), 0.7), Entry(Band(9), 0.3)), "overlap"), base, models)
    masks = [Band(5), Band(9)]
    chunks = [chunk_of(b, base, models) for b in (reference, backend)]
    assert backend.fetch(backend.overlaps(chunks[1], masks)) == reference.overlaps(chunks[0], masks)
    for score in (Variance(), Divergence(100)):
        used = models if score == Variance() else models[:1]
        results = []
        for b in (reference, backend):
            chunk = chunk_of(b, base, used)
            key = b.fetch(found_by_counting(b, [chunk], [(score, 100)])[0]).key
            mask = Scored(score, Band(key, low_positions=(0, 2**31), by_draw=True, random_key=3))
            output = on(b, torch.empty_like(base))
            operation = Consensus(tuple(Entry(mask, 0.5) for _ in used), "deltas", True)
            outcome = b.fetch(b.consensus(chunk, operation, b.tensor(output)))
            squares = b.fetch(b.squares(chunk, [mask] * len(used), False))
            results.append((key, outcome, squares, output.tolist()))
        assert results[0] == results[1], score
