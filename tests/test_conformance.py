"""Every primitive of every backend gives the reference's bytes and counts."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, reduce
from typing import Any, Literal

import pytest
import torch
from adversarial import DTYPES, extreme_models, generator, quantised_models
from under_test import INTERPRETED, backends, on, thinned

from merge_engine.backends.base import Backend
from merge_engine.backends.cpu import CpuBackend
from merge_engine.backends.operations import (
    NOTHING,
    Band,
    Chunk,
    Combine,
    Consensus,
    Dense,
    Draw,
    Entry,
    Found,
    FoundBand,
    KeyColumn,
    Line,
    LineCoefficients,
    Mask,
    Nearswap,
    Outcome,
    Rank,
    Ranked,
    RankMask,
    Sought,
    Subject,
    key_dtype,
)
from merge_engine.backends.reference import ReferenceBackend, add_in_order, draws, keys_of
from merge_engine.backends.statistics import (
    SUM_BLOCK,
    BlockSums,
    KeyTable,
    LineTotals,
    level_shift,
    levels,
    lines_of_block,
    sum_block,
)
from merge_engine.dtypes import BY_NAME, DType

Make = Callable[[int, int, torch.dtype], tuple[torch.Tensor, list[torch.Tensor]]]
REFERENCE = ReferenceBackend()
SIZES = thinned((0, 1, 7, 511, 64, 513, 9_001, 70_001, 4096), 3)  # 0, 511, 9001


BACKENDS = backends()
each_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)


def dtype_of(tensor: torch.Tensor) -> DType:
    return BY_NAME[str(tensor.dtype).removeprefix("torch.")]


def chunk_of(
    backend: Backend,
    base: torch.Tensor | None,
    models: list[torch.Tensor],
    working: DType | None = None,
    start: int = 0,
    line: Line | None = None,
) -> Chunk:
    inputs = models if base is None else [base, *models]
    return Chunk(
        [backend.tensor(on(backend, tensor)) for tensor in inputs],
        base is not None,
        working or dtype_of(inputs[0]),
        start,
        inputs[0].numel(),
        line or Line(max(inputs[0].numel(), 1), 1),
    )


def bits(tensor: torch.Tensor) -> list[int]:
    """The bits of each element as a number: equal for a NaN and itself, not for 0.0 and -0.0."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.cpu().view(integer).tolist()


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.view(integer), b.view(integer))


def apply(
    backend: Backend,
    operation: Consensus | Combine | Nearswap,
    base: torch.Tensor | None,
    models: list[torch.Tensor],
    **chunk,
) -> tuple[torch.Tensor, Outcome]:
    like = models[0] if base is None else base
    output = on(backend, torch.full((like.numel(),), 7.0, dtype=chunk.pop("out", None) or like.dtype))
    run = {Consensus: backend.consensus, Combine: backend.combine, Nearswap: backend.nearswap}[
        type(operation)
    ]
    outcome = backend.fetch(run(chunk_of(backend, base, models, **chunk), operation, backend.tensor(output)))
    return output.cpu(), outcome


def agree(
    operation: Consensus | Combine | Nearswap,
    base: torch.Tensor | None,
    models: list[torch.Tensor],
    **chunk,
) -> Outcome:
    """Applies the operation with every backend, and demands the reference's bytes and counts of each."""
    expected, outcome = apply(REFERENCE, operation, base, models, **chunk)
    for name, backend in BACKENDS.items():
        merged, counted = apply(backend, operation, base, models, **chunk)
        assert same_bytes(merged, expected), name
        assert counted == outcome, name
    return outcome


def median_key(base: torch.Tensor, model: torch.Tensor) -> int:
    keys = (
        keys_of(model.to(base.dtype).double() - base.double(), dtype_of(base))
        if base.numel()
        else torch.zeros(1)
    )
    return int(keys.long().median())


def masks(base: torch.Tensor, model: torch.Tensor) -> list[Mask]:
    middle = median_key(base, model)
    n = base.numel()
    return [
        Dense(),
        NOTHING,
        Draw(below=2**31, random_key=2**63 + 5),
        Band(low=middle),
        Band(low=middle, low_positions=(0, 2**30), by_draw=True, random_key=77),
        Band(low=middle, low_positions=(0, n // 2)),
        Band(low=max(middle - 3, 0), high=middle, low_positions=(n // 3, 2**64 - 1), high_positions=(1, 0)),
        Band(low=middle, high=middle, low_positions=(n // 4, 2**64 - 1), high_positions=(0, n // 2)),
        Band(low=1, high=middle, high_positions=(0, 2**31), by_draw=True, random_key=3),
        Ranked(density=0.4, epsilon=0.2, inverse_probability=False, random_key=9),
        Ranked(density=0.4, epsilon=0.2, inverse_probability=True, random_key=9),
    ]


WEIGHTS = (0.5, 1.0, -0.3, 0.0, 1e-30, 3e5, 0.125, 0.7)
SLACKS = ((0.5, 0.0), (0.0, 0.3), (2.0, 0.4), (0.0, 1.0))
"""Of votes, and of what is retained."""


def fast_masks(base: torch.Tensor, model: torch.Tensor, key: int) -> list[Mask]:
    """Masks of most merges, whose ties any number of draws lets stay."""
    middle, by_draw = median_key(base, model), {"by_draw": True, "random_key": key}
    return [
        Band(low=middle, low_positions=(0, 2**30 + 12_345), **by_draw),
        Band(low=middle, low_positions=(1, 0), **by_draw),
        Band(low=middle, high=middle + 2, low_positions=(0, 3), high_positions=(0, 2**31 + 1), **by_draw),
        Band(low=middle, high=middle, low_positions=(0, 2**31), high_positions=(0, 2**30), **by_draw),
        Band(low=middle, low_positions=(0, base.numel() // 2)),
        Band(low=0),
        Band(low=2**15 + 7),
        Draw(2**31 + 99, key),
        Dense(),
    ]


@pytest.mark.parametrize("dtype", thinned(DTYPES, 3), ids=str)
@pytest.mark.parametrize("n", range(2, 10, 3 if INTERPRETED else 1))
def test_many_models(dtype: torch.dtype, n: int) -> None:
    """What most merges are: backends may have faster ways for it."""
    size = 1_500 if INTERPRETED else 3_100
    base, models = quantised_models(size, n, dtype, seed=n)
    choices = [fast_masks(base, model, 2**63 + i) for i, model in enumerate(models)]
    for turn in thinned(range(len(choices[0])), 4):
        entries = tuple(
            Entry(
                of_model[(turn + 2 * i) % len(of_model)],
                weight=WEIGHTS[(turn + i) % len(WEIGHTS)] if turn % 2 else 0.5,  # equal ones cancel exactly
                rescale=1 + 0.3 * (i % 2) * (turn % 4 == 1),
            )
            for i, of_model in enumerate(choices)
        )
        options = [*itertools.product(("sum", "none"), (True, False))]
        for number, (election, normalize) in enumerate(thinned(options, 3)):
            operation = Consensus(entries, election, normalize, 1.0 + turn % 2, divisor=0.3)
            agree(operation, base, models, start=(16, 7)[(number + turn // 2) % 2])
        with_slack = tuple(
            entry._replace(vote_slack=votes, retain_slack=retained)
            for entry, (votes, retained) in zip(
                entries, itertools.cycle(SLACKS[turn % 4 :] + SLACKS[:1]), strict=False
            )
        )
        agree(Consensus(with_slack, "sum", True, 0.7), base, models)


@pytest.mark.parametrize("dtype", thinned(DTYPES, 3), ids=str)
@pytest.mark.parametrize("n", (2, 5))
def test_strange_values_among_others(dtype: torch.dtype, n: int) -> None:
    """Packs of neighbours with values that are not finite, overflow, or have tiny quotients, and packs without."""
    base, models = quantised_models(3_000, n, dtype)
    strange = (
        float("nan"),
        float("inf"),
        -float("inf"),
        torch.finfo(dtype).max,
        -torch.finfo(dtype).max,
        1e-36,
    )
    for i, value in enumerate(strange):
        for tensor in (base, models[0], models[-1]):
            tensor[97 * i :: 701] = value
    for election, weight in itertools.product(("sum", "none"), (0.5, 1e-38, 1e30, 1e39)):
        entries = tuple(Entry(fast_masks(base, model, i)[i], weight) for i, model in enumerate(models))
        agree(Consensus(entries, election, True, divisor=0.7), base, models)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_thresholds_at_the_ends(dtype: torch.dtype) -> None:
    """Thresholds that are denormal, the largest number, infinity, NaN, and beyond; differences that round to each."""
    info, working = torch.finfo(dtype), BY_NAME[str(dtype).removeprefix("torch.")]
    least = info.tiny * info.eps
    ends = [0.0, -0.0, least, 2 * least, 3 * least, info.tiny, info.tiny - least, 1.0, 1 + info.eps, info.max]
    ends += [-info.max, info.max * (1 - info.eps), float("inf"), -float("inf"), float("nan")]
    pairs = torch.tensor(list(itertools.product(ends, ends)), dtype=torch.float64).to(dtype)
    halves = torch.tensor([0.0, 1.0, 1.5, 0.5, 0.75], dtype=dtype) * info.eps  # rounded up, down, and to even
    base = torch.cat(
        [pairs[:, 0], -halves.repeat(40), torch.full((40,), -info.max * info.eps / 4, dtype=dtype)]
    )
    model = torch.cat([pairs[:, 1], torch.ones(200, dtype=dtype), torch.full((40,), info.max, dtype=dtype)])
    keys = [int(key) for key in keys_of(torch.tensor(ends).to(dtype).double(), working).unique()]
    for key in {*keys, *(key + 1 for key in keys), *(max(key - 1, 0) for key in keys)}:
        by_draw = {"by_draw": True, "random_key": 7}
        for mask in (
            Band(low=key),
            Band(low=key, high=key, low_positions=(0, 2**31), high_positions=(0, 2**31 + 5), **by_draw),
            Band(low=1, high=key, high_positions=(1, 0), **by_draw),
        ):
            agree(Consensus((Entry(mask, 0.5), Entry(Dense(), 0.25)), "sum", True), base, [model, base])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_consensus_masks(dtype: torch.dtype, size: int) -> None:
    base, models = quantised_models(size, 2, dtype)
    for mask, start in itertools.product(masks(base, models[0]), (0, 7 * SUM_BLOCK)):
        operation = Consensus((Entry(mask, 0.7), Entry(Dense(), -0.3, rescale=1.5)), "sum", True, 1.0)
        agree(operation, base, models, start=start)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("models", thinned((1, 2, 3, 4, 5, 20), 2))
@pytest.mark.parametrize("election", ("none", "sum", "count"))
def test_consensus_options(dtype: torch.dtype, models: int, election: str) -> None:
    for make, size, scales in ((quantised_models, 3001, (1.0, 0.3, -2.0)), (extreme_models, 1500, (0.3,))):
        base, tuned = make(size, models, dtype)
        low = median_key(base, tuned[0])
        options = itertools.product((False, True), (False, True), scales, ("", "vote", "retain"))
        for normalize, storage, scale, slack in thinned(list(options), 5 + 2 * models):
            if slack and election == "none":
                continue
            entries = tuple(
                Entry(
                    Band(low) if i % 2 else Dense(),
                    weight=(0.6, -0.25, 1.0)[i % 3],
                    vote_slack=0.75 if slack == "vote" and i == 0 else 0.0,
                    retain_slack=0.4 if slack == "retain" and i != 1 else 0.0,
                )
                for i in range(models)
            )
            agree(Consensus(entries, election, normalize, scale, storage, divisor=-0.3), base, tuned)


@pytest.mark.parametrize("working", DTYPES, ids=str)
@pytest.mark.parametrize("out", DTYPES, ids=str)
def test_mixed_dtypes(working: torch.dtype, out: torch.dtype) -> None:
    """Inputs of any type are rounded once to the working type, results once to the output type."""
    base, models = quantised_models(5000, 4, torch.float64)
    inputs = [model.to(dtype) for model, dtype in zip(models, DTYPES, strict=True)]
    inputs[3] = inputs[3] * (1 + 2.0**-9 + 2.0**-40)  # would be rounded twice on a detour through float32
    entries = tuple(Entry(Dense(), 0.5) for _ in inputs)
    kwargs = {"working": BY_NAME[str(working).removeprefix("torch.")], "out": out}
    agree(Consensus(entries, "sum", True), base, inputs, **kwargs)
    agree(Combine((0.3, 0.3, 0.3, 1 / 3), 1.7), None, inputs, **kwargs)
    agree(Combine((-0.7, 0.3, 0.3, 0.3, 1 / 3)), base, inputs, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("make", (quantised_models, extreme_models))
def test_combine(dtype: torch.dtype, make) -> None:
    for models, divisor, fused in itertools.product((1, 2, 4, 8), (None, 0.7), (False, True)):
        base, tuned = make(2777, models, dtype)
        coefficients = tuple((0.6, -0.2, 1.1)[i % 3] for i in range(models))
        agree(Combine(coefficients, divisor, fused), None, tuned)
        agree(Combine((-1.7, *coefficients), divisor, fused), base, tuned)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", (quantised_models, extreme_models))
def test_combinations_of_task_vectors(dtype: torch.dtype, make) -> None:
    """Also where the result is rounded twice, and where some values are not finite."""
    for models, rounded in itertools.product((1, 2, 3, 8), (False, True)):
        base, tuned = make(1301, models, dtype)
        tuned[-1][[5, 700]] = float("inf")
        coefficients = tuple((0.6, -0.2, 1.1)[i % 3] for i in range(models))
        for divisor in (None, 0.7):
            operation = Combine(coefficients, divisor, rounded=rounded, on_base=True)
            agree(operation, base, tuned)
            if rounded:
                agree(operation._replace(stepwise=True, rounded=False), base, tuned, out=torch.float32)
                agree(Combine(coefficients, divisor, stepwise=True), None, tuned)
        agree(Combine((0.25, *coefficients), rounded=rounded), base, tuned, out=torch.float32)


LINES = (
    (Line(1, 1), 130),
    (Line(7, 1), 301 if INTERPRETED else 4277),
    (Line(512, 1), 2048),
    (Line(5000, 1), 10_000),
)
MANY_BLOCKS = (Line(3, 140_001), 420_003)  # along the first dimension
LINES += ((Line(12, 100), 1200), (Line(2, 9_001), 18_002), (Line(1, 64), 64))


@pytest.mark.parametrize("dtype", thinned(DTYPES, 2), ids=str)
@pytest.mark.parametrize(("line", "size"), thinned(LINES, 2), ids=str)
def test_combinations_by_line(dtype: torch.dtype, line: Line, size: int) -> None:
    """Each line has its own coefficients, wherever a chunk begins."""
    base, models = quantised_models(size, 2, dtype)
    for on_base, start in itertools.product((False, True), (0, 3 * line.stride + 1)):
        first = min(start, size - 1)
        lines = size // line.length
        values = torch.randn(lines * (2 + (not on_base)), generator=generator(lines), dtype=torch.float64)
        operation = Combine((), on_base=on_base, lines=LineCoefficients(line, array("d", values.tolist())))
        agree(operation, base[first:], [model[first:] for model in models], start=first)


@each_backend
def test_a_combination_has_a_coefficient_for_every_input(backend: Backend) -> None:
    base, models = quantised_models(10, 2, torch.bfloat16)
    few = LineCoefficients(Line(5, 1), array("d", [1.0] * 5))
    for operation in (Combine((1.0, 1.0)), Combine((1.0,) * 3, on_base=True), Combine((), lines=few)):
        with pytest.raises(ValueError):
            apply(backend, operation, base, models)


def found_by_counting(backend: Backend, chunks: list[Chunk], ranks: list[tuple[Subject, int]]) -> list[Any]:
    """Handles to the keys of (model or score, rank), level by level, from chunks that are counted together."""
    found: list[Any] = [None] * len(ranks)
    for level in range(levels(key_dtype(ranks[0][0], chunks[0].working))):
        counts = backend.new_counts(level, found)
        columns = [KeyColumn(slot, model) for slot, (model, _) in enumerate(ranks)]
        for chunk in chunks:
            backend.count(chunk, columns, counts)
        found = backend.find(counts, [Rank(slot, rank) for slot, (_, rank) in enumerate(ranks)])
    return found


def found_at_once(backend: Backend, chunk: Chunk, ranks: list[tuple[int, int]]) -> list[Any]:
    """The same from a chunk that holds all elements."""
    found: list[Any] = [None] * len(ranks)
    for level in range(levels(chunk.working)):
        sought = [Sought(model, (rank,), within) for (model, rank), within in zip(ranks, found, strict=True)]
        found = [handle for [handle] in backend.find_all(chunk, level, sought)]
    return found


def found_together(backend: Backend, chunk: Chunk, ranks: Mapping[int, Sequence[int]]) -> list[Any]:
    """The same for several ranks of each model, of one after the other."""
    found = backend.find_all(chunk, 0, [Sought(model, tuple(of_model)) for model, of_model in ranks.items()])
    flat = [handle for of_model in found for handle in of_model]
    asked = [(model, rank) for model, of_model in ranks.items() for rank in of_model]
    for level in range(1, levels(chunk.working)):
        sought = [Sought(model, (rank,), within) for (model, rank), within in zip(asked, flat, strict=True)]
        flat = [handle for [handle] in backend.find_all(chunk, level, sought)]
    return flat


@cache
def by_reference(make: Make, size: int, dtype: torch.dtype, rank: int) -> tuple[list[Found], list[int]]:
    """The keys of this rank and their places in the reference, once for all backends."""
    base, models = make(size, 3, dtype)
    chunk = chunk_of(REFERENCE, base, models)
    answers = found_by_counting(REFERENCE, [chunk], [(model, rank) for model in range(3)])
    assert list(found_at_once(REFERENCE, chunk, [(model, rank) for model in range(3)])) == answers
    return answers, [
        REFERENCE.locate(chunk, m, answers[m].key, rank - answers[m].above - 1) for m in range(3)
    ]


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_find_and_locate(backend: Backend, dtype: torch.dtype, size: int) -> None:
    """Refining keys level by level leads both backends to the same key, and to the same occurrence of it."""
    size = min(size, 9_001) if "emulated" in backend.name else size  # several tiles, and not minutes
    for make in (quantised_models, extreme_models):
        base, models = make(size, 3, dtype)
        working = dtype_of(base)
        for rank in {1, size // 5, size // 2, size} - {0}:
            if size == 0:
                continue
            asked = [(model, rank) for model in range(3)]
            chunk = chunk_of(backend, base, models)
            answers = [backend.fetch(key) for key in found_by_counting(backend, [chunk], asked)]
            assert level_shift(working, levels(working) - 1) == 0
            places = [backend.locate(chunk, m, answers[m].key, rank - answers[m].above - 1) for m in range(3)]
            assert [backend.fetch(key) for key in found_at_once(backend, chunk, asked)] == answers
            assert (answers, places) == by_reference(make, size, dtype, rank)
            keys = keys_of(
                models[0].to(torch.float64 if dtype == torch.float64 else torch.float32)
                - base.to(torch.float64 if dtype == torch.float64 else torch.float32),
                working,
            )
            assert answers[0].key == int(keys.sort(descending=True).values[rank - 1])


def misleading_differences(size: int) -> dict[str, torch.Tensor]:
    """Differences of which a few say nothing about the others."""
    g = generator(size)
    plain = torch.randn(size, generator=g) * 0.01
    place = torch.arange(size)
    return {
        "others where one looks": torch.where(place // 8 % 15 == 0, 0.0, plain),
        "larger ones where one looks": torch.where(place // 8 % 15 == 0, 1e3 * plain, plain),
        "a huge one": torch.where(place == 5, 60_000.0, plain),
        "many huge ones": torch.where(place % 3 == 0, 60_000.0, plain),
        "two numbers": torch.where(place % 2 == 0, 0.25, -0.5),
        "all equal": torch.full((size,), 0.25),
        "all zero": torch.zeros(size),
        "mostly zero": torch.where(place % 37 == 0, plain, 0.0),
        "many orders of magnitude": plain.sign() * torch.exp2(-20 * torch.rand(size, generator=g)),
        "tiny": plain * 2.0**-120,
    }


@each_backend
@pytest.mark.parametrize("dtype", thinned(DTYPES[:3], 2), ids=str)
def test_ranks_among_misleading_differences(backend: Backend, dtype: torch.dtype) -> None:
    """Backends guess where a rank may lie; what they find does not depend on it."""
    size = 9_001 if INTERPRETED or "emulated" in backend.name else 300_001
    for name, differences in misleading_differences(size).items():
        base = torch.zeros(size, dtype=dtype)
        models = [differences.to(dtype), (3 * differences).to(dtype)]
        ranks = (1, 2, size // 50, size // 3, size // 2, size - 40, size)
        found = []
        for b in (REFERENCE, backend):
            handles = found_together(b, chunk_of(b, base, models), {1: ranks, 0: ranks[2:4]})
            found.append([b.fetch(handle) for handle in handles])
        assert found[0] == found[1], name


@each_backend
@pytest.mark.parametrize("dtype", thinned(DTYPES, 2), ids=str)
def test_what_is_counted_can_be_taken_elsewhere(backend: Backend, dtype: torch.dtype) -> None:
    """Tables of pieces, merged, answer as a backend that saw all; it goes on with what was found in them."""
    size, cut = 5000, SUM_BLOCK
    base, models = quantised_models(size, 2, dtype)
    asked = [(0, 1), (1, size // 3), (1, size - 7)]
    for b in (REFERENCE, backend):
        pieces = [
            chunk_of(b, base[first:last], [m[first:last] for m in models], start=first)
            for first, last in ((cut, size), (0, cut))
        ]
        found: list[Any] = [None] * len(asked)
        for level in range(levels(pieces[0].working)):
            tables: list[list[KeyTable]] = []
            for chunk in pieces:
                counts = b.new_counts(level, found)
                b.count(chunk, [KeyColumn(slot, model) for slot, (model, _) in enumerate(asked)], counts)
                tables.append(b.fetch(counts))
            merged = [one.merge(other) for one, other in zip(*tables, strict=True)]
            found = [
                table.find(rank, within)
                for table, (_, rank), within in zip(merged, asked, found, strict=True)
            ]
        whole = chunk_of(REFERENCE, base, models)
        assert found == found_by_counting(REFERENCE, [whole], asked)
        bands = [
            FoundBand(RankMask(1, rank, random_key=3), low)
            for (_, rank), low in zip(asked, found, strict=True)
        ]
        for solved, expected in zip(
            b.bands(bands, whole.working), REFERENCE.bands(bands, whole.working), strict=True
        ):
            outputs = []
            for on_backend, mask in ((b, solved.mask), (REFERENCE, expected.mask)):
                output = on(on_backend, torch.empty_like(base))
                operation = Consensus((Entry(mask, 1.0), Entry(Dense(), 0.5)), "sum", True)
                chunk = chunk_of(on_backend, base, models)
                on_backend.fetch(on_backend.consensus(chunk, operation, on_backend.tensor(output)))
                outputs.append(output.cpu())
            assert same_bytes(*outputs)


@each_backend
@pytest.mark.parametrize("size", (100, 20_000) if INTERPRETED else (100, 5000, 300_000))
def test_ranks_that_no_key_has(backend: Backend, size: int) -> None:
    """Every backend says so, whichever way it would look for them."""
    size = min(size, 9_001) if "emulated" in backend.name else size
    for b in (REFERENCE, backend):
        chunk = chunk_of(b, *quantised_models(size, 1, torch.float32))
        found = b.fetch(found_by_counting(b, [chunk], [(0, 5)])[0])
        for rank in (size + 1, 2**40, 0):
            with pytest.raises(IndexError, match="no key of this rank was counted"):
                b.fetch(b.find_all(chunk, 0, [Sought(0, (1, rank))])[0][1])
            counts = b.new_counts(0, [None])
            b.count(chunk, [KeyColumn(0, 0)], counts)
            with pytest.raises(IndexError, match="no key of this rank was counted"):
                b.fetch(b.find(counts, [Rank(0, rank)])[0])
            with pytest.raises(IndexError, match="no key of this rank was counted"):
                b.fetch(counts)[0].find(rank)
        upper = Found(found.key >> 16, found.above, found.equal)
        with pytest.raises(IndexError, match="no key of this rank was counted"):
            b.fetch(b.find_all(chunk, 1, [Sought(0, (size,), upper)])[0][0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ties", ("spread", "all", "index"))
def test_bands(dtype: torch.dtype, ties: Literal["spread", "all", "index"]) -> None:
    """Ranks lead every backend to the same kept entries, whatever the ties, the slack and the upper cut."""
    size = 4500
    for make in (quantised_models, extreme_models):
        base, models = make(size, 2, dtype)
        working = dtype_of(base)
        ranks = ((1, 1), (1, 900), (1, size), (400, 2000), (1200, 1300), (size, size))
        for (first, last), slack in thinned(list(itertools.product(ranks, (0.0, 0.1, 0.999))), 4):
            results = []
            for b in (REFERENCE, *BACKENDS.values()):
                chunk = chunk_of(b, base, models)
                found = found_by_counting(b, [chunk], [(0, last), (0, first)])
                high = found[1] if first > 1 else None
                positions = ((0, size // 2), (size // 3, 2**64 - 1))
                band = FoundBand(
                    RankMask(first, last, slack, ties, random_key=41), found[0], high, *positions
                )
                [(mask, plain)] = b.bands([band], working)
                output = on(b, torch.empty_like(base))
                operation = Consensus((Entry(mask, 1.0), Entry(Dense(), 0.5)), "sum", True)
                outcome = b.consensus(chunk, operation, b.tensor(output))
                results.append((output.cpu(), b.fetch(outcome), b.fetch(plain)))
            for output, outcome, plain in results[1:]:
                assert same_bytes(output, results[0][0])
                assert (outcome, plain) == results[0][1:]


def test_shares_of_draws_are_exact() -> None:
    """floor(2^32 * kept / equal), also where the product needs more than 64 bits."""
    for kept, equal in ((1, 3), (2**33 + 1, 2**34 + 5), (2**40 - 1, 2**40), (5, 5), (0, 9), (1, 2**40)):
        low = Found(7, 3, equal)
        band = FoundBand(RankMask(1, kept + 3), low)
        expected = REFERENCE.bands([band], BY_NAME["bfloat16"])[0].mask
        mask = CpuBackend().bands([band], BY_NAME["bfloat16"])[0].mask
        assert mask.low_positions == expected.low_positions


@each_backend
@pytest.mark.parametrize("dtype", thinned(DTYPES, 3), ids=str)
def test_sums_do_not_depend_on_chunks(backend: Backend, dtype: torch.dtype) -> None:
    size, cut = 3 * SUM_BLOCK + 77, 2 * SUM_BLOCK
    base, models = quantised_models(size, 3, dtype)
    keep = [Dense(), Draw(2**31, 5), Band(median_key(base, models[2]))]
    whole_chunk = chunk_of(REFERENCE, base, models)
    wholes = {storage: REFERENCE.l1_norms(whole_chunk, keep, storage) for storage in (False, True)}
    inner = REFERENCE.gram(whole_chunk)
    for b in (REFERENCE, backend):
        parts = [
            chunk_of(b, base[first:last], [m[first:last] for m in models], start=first)
            for first, last in ((cut, size), (0, cut))
        ]
        for storage, whole in wholes.items():
            last, first = (b.fetch(b.l1_norms(part, keep, storage)) for part in parts)
            assert last.merge(first) == whole
            assert last.merge(first).totals() == whole.totals() == totals_in_order(whole)
        last, first = (b.fetch(b.gram(part)) for part in parts)
        assert last.merge(first) == inner
        assert last.merge(first).totals() == inner.totals() == totals_in_order(inner)
    stacked = torch.stack([base, *models]).double()
    products = (stacked @ stacked.T)[tuple(torch.triu_indices(4, 4))]
    assert torch.allclose(torch.tensor(inner.totals(), dtype=torch.float64), products, rtol=1e-12)


def totals_in_order(sums: BlockSums) -> list[float]:
    """The totals, from the reference's own addition."""
    return add_in_order([value for run in sums.runs for value in run.sums], sums.columns)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("models", (1, 2, 6))
def test_inner_products(backend: Backend, dtype: torch.dtype, models: int) -> None:
    """Of any number of inputs with and without a base, of inputs of other types than the working one."""
    for size in thinned((0, 1, 63, SUM_BLOCK, 2 * SUM_BLOCK + 5), 2):
        base, tuned = quantised_models(size, models, dtype)
        tuned[0] = (tuned[0].double() * (1 + 2.0**-9 + 2.0**-40)).to(torch.float64)
        for first in (base, None):
            sums = [b.gram(chunk_of(b, first, tuned, working=dtype_of(base))) for b in (REFERENCE, backend)]
            assert backend.fetch(sums[1]) == sums[0]
            n = models + (first is not None)
            assert sums[0].columns == n * (n + 1) // 2


@pytest.mark.parametrize("dtype", thinned(DTYPES, 2), ids=str)
@pytest.mark.parametrize(("line", "size"), thinned(((None, SUM_BLOCK + 70), *LINES, MANY_BLOCKS), 2), ids=str)
def test_inner_products_of_lines(dtype: torch.dtype, line: Line | None, size: int) -> None:
    """Of task vectors and inputs, of lines of any length along either dimension, of pieces in order."""
    base, models = quantised_models(size, 2, dtype)
    models[1], working = models[1].to(torch.float32), dtype_of(base)
    cut = min(sum_block(line), size)
    for of_deltas in (False, True):
        if line == MANY_BLOCKS[0] and (dtype, of_deltas, INTERPRETED) != (torch.bfloat16, True, False):
            continue  # one of its kind is enough: it takes a second
        expected = REFERENCE.gram(chunk_of(REFERENCE, base, models, working), of_deltas, line)
        assert expected.columns == lines_of_block(line) * (3 if of_deltas else 6)
        for name, backend in BACKENDS.items():
            parts = [
                backend.gram(
                    chunk_of(backend, base[first:last], [m[first:last] for m in models], working, first),
                    of_deltas,
                    line,
                )
                for first, last in ((0, cut), (cut, size))
                if first < last
            ]
            assert reduce(BlockSums.merge, [backend.fetch(part) for part in parts]) == expected, name
        if line is not None:
            totals = LineTotals(line, size, 3 if of_deltas else 6)
            totals.add(expected)
            exact = products_of_lines(torch.stack([base, *models]).double(), of_deltas, line)
            assert torch.allclose(
                torch.tensor(totals.values, dtype=torch.float64), exact, rtol=1e-6, atol=1e-9
            )


def products_of_lines(stacked: torch.Tensor, of_deltas: bool, line: Line) -> torch.Tensor:
    """[lines * pairs], from [inputs, elements] in float64."""
    vectors = stacked[1:] - stacked[:1] if of_deltas else stacked
    lines = (
        vectors.view(len(vectors), -1, line.length)
        if line.stride == 1
        else vectors.view(len(vectors), line.length, -1).transpose(1, 2)
    )
    upper = tuple(torch.triu_indices(len(vectors), len(vectors)))
    return torch.einsum("ile,kle->lik", lines, lines)[:, upper[0], upper[1]].reshape(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((24, 96), (3, 40, 7), (2, 1, 3), (5, 17, 2, 2), (3, 1030), (2, 1100, 2)))
def test_ranked_masks_in_chunks_of_slabs(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    count = torch.Size(shape).numel()
    base, models = quantised_models(count, 2, dtype)
    mask = Ranked(0.5, 0.3, True, 11)
    operation = Consensus((Entry(mask, 1.0), Entry(mask, 0.5)), "sum", True)
    agree(operation, base, models, line=Line.of(shape))


def test_non_finite_values_are_counted_per_input() -> None:
    base, models = quantised_models(1000, 2, torch.bfloat16)
    base[3] = float("nan")
    models[1][[5, 900]] = float("inf")
    operation = Consensus((Entry(Dense(), 1.0), Entry(Dense(), 1.0)), "sum", True)
    assert agree(operation, base, models).non_finite == (1, 0, 2)
    assert agree(Combine((1.0, 1.0)), None, models).non_finite == (0, 2)
    assert agree(Combine((1.0, 1.0, 1.0)), base, models).non_finite == (1, 0, 2)


@each_backend
def test_the_lower_bits_of_draws_decide_where_top_bytes_are_equal(backend: Backend) -> None:
    """Bounds that are the draw of some element, or the next number: it stays in the second case only."""
    count, start, key = 3_000, 2 * SUM_BLOCK, 2**63 + 11
    drawn = draws(key, torch.arange(start, start + count))
    base, models = torch.zeros(count), [torch.ones(count)]
    for place in (0, 1, 15, 16, 63, 64, 1023, 1024, 2047, 2048, 2999):
        for bound in (int(drawn[place]), int(drawn[place]) + 1):
            by_draw = Band(low=int(keys_of(models[0], dtype_of(base))[0]), low_positions=(0, bound - 1))
            for mask in (Draw(bound, key), replace(by_draw, by_draw=True, random_key=key)):
                operation = Consensus((Entry(mask, 1.0),), "none", False)
                merged, _ = apply(backend, operation, base, models, start=start)
                assert torch.equal(merged.bool(), drawn < bound), (place, bound)


@each_backend
def test_draws_do_not_depend_on_the_start(backend: Backend) -> None:
    base, models = quantised_models(10_000, 1, torch.bfloat16)
    operation = Consensus((Entry(Draw(2**31, 123), 1.0),), "none", False)
    whole = on(backend, torch.empty_like(base))
    backend.fetch(backend.consensus(chunk_of(backend, base, models), operation, backend.tensor(whole)))
    part = on(backend, torch.empty(10_000 - SUM_BLOCK, dtype=base.dtype))
    tail = chunk_of(backend, base[SUM_BLOCK:], [models[0][SUM_BLOCK:]], start=SUM_BLOCK)
    backend.fetch(backend.consensus(tail, operation, backend.tensor(part)))
    assert same_bytes(whole[SUM_BLOCK:], part)


@each_backend
def test_a_chunk_with_arrays_of_another_length_is_refused(backend: Backend) -> None:
    base, models = quantised_models(100, 1, torch.bfloat16)
    chunk = replace(chunk_of(backend, base, models), count=101)
    with pytest.raises(ValueError, match="a chunk of 101 elements got an array of 100"):
        backend.count(chunk, [KeyColumn(0, 0)], backend.new_counts(0, [None]))
    with pytest.raises(ValueError, match="a chunk of 101 elements got an array of 100"):
        backend.find_all(chunk, 0, [Sought(0, (1,))])
