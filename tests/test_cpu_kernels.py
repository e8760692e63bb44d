"""The CPU's fast paths at their limits.

Shares of ties, odd widths and starts, numbers of models, and values that a fast path leaves to the general one.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from adversarial import DTYPES, extreme_models, generator, quantised_models
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conformance import REFERENCE, apply, chunk_of, dtype_of, same_bytes
from under_test import INSTRUCTION_SETS

import merge_engine._native as native
from merge_engine.backends.cpu import CpuBackend
from merge_engine.backends.operations import Band, Combine, Consensus, Dense, Draw, Entry, Line, Mask, Ranked
from merge_engine.backends.reference import keys_of
from merge_engine.backends.structures import Structures

BACKENDS = [CpuBackend(threads=2, instruction_set=name) for name in INSTRUCTION_SETS]
TILE = 1024
STEP = 2.0**-11
SHARES = (0.0, 0.01, 0.1, 0.125, 0.2, 0.5, 1.0)
SIZES = (1, 15, 17, 63, 64, 65, TILE - 1, TILE, TILE + 1, 3 * TILE + 100)
STARTS = (0, 64, 7, 4096 + 33, 2**34 - 200)


def agree(
    operation: Consensus | Combine, base: torch.Tensor | None, models: list[torch.Tensor], **chunk
) -> None:
    """Demands the reference's bytes and counts of every instruction set."""
    expected = apply(REFERENCE, operation, base, models, **chunk)
    for backend in BACKENDS:
        merged, outcome = apply(backend, operation, base, models, **chunk)
        assert same_bytes(merged, expected[0]), backend.instruction_set
        assert outcome == expected[1], backend.instruction_set


def tied(size: int, share: float, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A base of zeros of both signs, and a model with a ``share`` of its entries STEP from the base, others not."""
    g = generator(seed, size)
    signs = torch.randint(0, 2, (size,), generator=g) * 2.0 - 1
    distances = torch.tensor([0.0, STEP / 2, 2 * STEP, 3 * STEP])[torch.randint(0, 4, (size,), generator=g)]
    distances[torch.rand(size, generator=g) < share] = STEP
    return (0 * signs).to(dtype), (signs * distances).to(dtype)


def key(value: float, dtype: torch.dtype) -> int:
    """The magnitude key of one number."""
    number = torch.tensor([value], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return int(keys_of(number, dtype_of(torch.empty(0, dtype=dtype))))


def mask_of(kind: str, dtype: torch.dtype, size: int, start: int, random_key: int) -> Mask:
    low, high = key(STEP, dtype), key(3 * STEP, dtype)
    return {
        "dense": Dense(),
        "draw": Draw(below=2**30, random_key=random_key),
        "ranked": Ranked(0.4, 0.2, inverse_probability=False, random_key=random_key),
        "inverse": Ranked(0.4, 0.2, inverse_probability=True, random_key=random_key),
        "all": Band(low),
        "spread": Band(low, low_positions=(0, 2**31 + 7), by_draw=True, random_key=random_key),
        "none": Band(low, low_positions=(1, 0), by_draw=True, random_key=random_key),
        "index": Band(low, low_positions=(0, start + size // 3)),
        "two": Band(low, high, (0, 2**31), (0, 2**30), by_draw=True, random_key=random_key),
        "two_by_index": Band(low, high, (start + size // 2, 2**64 - 1), (0, start + size // 4)),
        "one_key": Band(low, low, (0, 2**31), (0, 2**29 + 5), by_draw=True, random_key=random_key),
    }[kind]


KINDS = (
    "dense",
    "draw",
    "ranked",
    "inverse",
    "all",
    "spread",
    "none",
    "index",
    "two",
    "two_by_index",
    "one_key",
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", SHARES)
def test_ties_of_any_share(dtype: torch.dtype, share: float) -> None:
    for size, start in ((TILE, 0), (3 * TILE + 100, 4096 + 33)):
        base, model = tied(size, share, dtype, seed=1)
        for kind in ("spread", "none", "index", "two", "two_by_index", "one_key"):
            mask = mask_of(kind, dtype, size, start, random_key=2**63 + 9)
            agree(Consensus((Entry(mask, 0.7),), "sum", True), base, [model], start=start)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from(SIZES),
    start=st.sampled_from(STARTS),
    entries=st.lists(
        st.tuples(
            st.sampled_from(KINDS), st.sampled_from((1.0, 0.5, -0.3, 0.0)), st.sampled_from((1.0, 1.7))
        ),
        min_size=1,
        max_size=6,
    ),
    share=st.sampled_from(SHARES),
    election=st.sampled_from(("none", "sum", "count", "deltas", "overlap")),
    normalize=st.booleans(),
    scale=st.sampled_from((1.0, -0.4)),
    rounding=st.booleans(),
    wide=st.booleans(),
    out=st.sampled_from(DTYPES),
)
def test_any_merge(
    seed: int,
    dtype: torch.dtype,
    size: int,
    start: int,
    entries,
    share: float,
    election,
    normalize,
    scale,
    rounding: bool,
    wide: bool,
    out: torch.dtype,
) -> None:
    base, _ = tied(size, share, dtype, seed)
    models = [tied(size, share, dtype, seed + 1 + i)[1] for i in range(len(entries))]
    operation = Consensus(
        tuple(
            Entry(mask_of(kind, dtype, size, start, seed + i), weight, 1.0 if kind == "inverse" else rescale)
            for i, (kind, weight, rescale) in enumerate(entries)
        ),
        election,
        normalize,
        scale,
        storage_rounding=rounding,
        divisor=0.8,
        wide=rounding and wide and election in ("none", "overlap"),
    )
    agree(operation, base, models, start=start, out=out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("models", (*range(1, 7), 32, 33))
@pytest.mark.parametrize("election", ("none", "sum", "count", "deltas"))
def test_extreme_and_non_finite_values(dtype: torch.dtype, models: int, election) -> None:
    """Denormals, overflows, and NaN and infinity where they do and do not reach the output."""
    size = 3 * TILE + 9
    base, tuned = extreme_models(size, models, dtype)
    spoilt = [base.clone(), *(model.clone() for model in tuned)]
    for i, values in enumerate(spoilt):
        values[[TILE + 3 * i, 3 * TILE + i % 9]] = (float("nan"), float("inf"), -float("inf"))[i % 3]
    for inputs in ([base, *tuned], spoilt):
        for mask in (Dense(), Band(key(1.0, dtype)), Draw(below=2**31, random_key=3)):
            operation = Consensus(tuple(Entry(mask, 0.9) for _ in tuned), election, True, 0.5, divisor=-2.0)
            agree(operation, inputs[0], inputs[1:])


# Votes that cancel, that count for nothing or are rounded to nothing, sums of weights that are 0, and overflows.
FACTORS = (
    ((0.5, 1.0), (0.5, 1.0)),
    ((0.5, 1.0), (-0.5, 1.0)),
    ((0.7, 1.3), (0.0, 1.3)),
    ((0.0, 1.0), (0.0, 1.0)),
    ((0.5, 0.0), (0.5, 1.0)),
    ((1e-30, 1e-12), (0.5, 1e-40)),
    ((1e30, 1e8), (-1e30, 1e8)),
    ((1e-40, 1.0), (1.0, 1.0)),
)


def changed(values: torch.Tensor, places: list[int], to: float) -> torch.Tensor:
    values = values.clone()
    values[places] = to
    return values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize("scale", (1.0, -0.0, -0.4))
def test_votes_that_vanish_cancel_or_overflow(dtype: torch.dtype, factors, scale: float) -> None:
    """Of ordinary, denormal and huge task vectors, with and without NaN and infinity somewhere in an input."""
    size = 2 * TILE + 70
    base, tuned = extreme_models(size, 2, dtype)
    near, _ = tied(size, 0.2, dtype, seed=3)
    close = [tied(size, 0.2, dtype, seed)[1] for seed in (4, 5)]
    nan, infinity = float("nan"), float("inf")
    cases = [
        (base, tuned),
        (near, close),
        (near, [changed(close[0], [TILE + 1], nan), changed(close[1], [5, TILE + 1], -infinity)]),
        (changed(near, [size - 1], infinity), [changed(close[0], [TILE + 9], infinity), close[1]]),
    ]
    for kind in ("dense", "draw", "all", "spread", "two"):
        for election in ("none", "sum"):
            entries = tuple(
                Entry(mask_of(kind, dtype, size, 0, seed), weight, rescale)
                for seed, (weight, rescale) in enumerate(factors)
            )
            operation = Consensus(entries, election, True, scale, divisor=0.9)
            for inputs, models in cases:
                agree(operation, inputs, models)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", (64, 3 * TILE + 64, 3 * TILE + 100))
def test_inputs_at_any_element(dtype: torch.dtype, size: int) -> None:
    """No address need be a multiple of more than the size of an element."""
    for skipped in (1, 3, 17):
        base, *models = (
            changed(tied(size + skipped, 0.2, dtype, seed)[1], [0], float("nan"))[skipped:]
            for seed in range(3)
        )
        for kind in ("spread", "draw", "ranked", "inverse"):
            operation = Consensus(
                tuple(Entry(mask_of(kind, dtype, size, 0, i), 0.5) for i in range(2)), "sum", True
            )
            agree(operation, base, models)
        agree(Combine((0.3, 0.6), divisor=0.9), None, models)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_linear_combinations(dtype: torch.dtype, size: int) -> None:
    """Of finite values, of values that overflow, and of NaN and infinity that a coefficient of 0 does not hide."""
    base, extreme = extreme_models(size, 3, dtype)
    ordinary = [tied(size, 0.2, dtype, seed)[1] for seed in range(3)]
    spoilt = [
        changed(ordinary[0], [size // 2], float("inf")),
        changed(ordinary[1], [0], float("nan")),
        ordinary[2],
    ]
    for coefficients in ((0.5, 0.3, 0.2), (1.0, -1.0, 0.0), (0.0, 0.0, -0.0), (1e-30, 1e30, 1.0)):
        for divisor in (None, 0.7, float(2**100)):
            for models in (ordinary, extreme, spoilt):
                agree(Combine(coefficients, divisor=divisor), None, models)
                agree(Combine((0.25, *coefficients), divisor=divisor), base, models)
    for number in (1, 32, 33):
        agree(Combine((1.0,) * number), None, [extreme[i % 3] for i in range(number)])


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("length", (1, 2, 7, 64, 777, TILE, 3 * TILE + 64, 4099, 70001))
@pytest.mark.parametrize("inverse", (False, True))
def test_ranks_of_few_and_of_many_keys(dtype: torch.dtype, length: int, inverse: bool) -> None:
    lines = 5
    size = lines * length
    g = generator(length)
    spread_out = torch.exp2(torch.rand(size, generator=g) * 24 - 14)
    few = torch.tensor([0.0, -STEP, STEP, 1.0])[torch.randint(0, 4, (size,), generator=g)]
    not_finite = torch.where(torch.rand(size, generator=g) < 0.01, torch.tensor(torch.nan), few)
    not_finite[-1] = -torch.inf
    base = torch.zeros(size, dtype=dtype)
    operation = Consensus((Entry(Ranked(0.5, 0.3, inverse, 11), 1.0),), "sum", True)
    for values in (spread_out, few, not_finite, torch.zeros(size), torch.full((size,), 65504.0)):
        model = values.to(dtype)
        for line in (Line(length, 1), Line(length, lines), Line(size, 1)):
            agree(operation, base, [model], line=line)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("start", STARTS)
def test_ranks_of_many_lines_that_begin_anywhere(dtype: torch.dtype, start: int) -> None:
    """Lines of odd lengths meet within a word of notes, whichever threads rank them."""
    base, model = tied(131 * 1037, 0.15, dtype, seed=6)
    operation = Consensus((Entry(Ranked(0.2, 0.1, False, 3), 0.5),), "sum", True)
    for line in (Line(1037, 1), Line(131, 1), Line(131, 1037), Line(1037, 131)):
        agree(operation, base, [model], line=line, start=start)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("start", STARTS)
def test_norms_of_masked_task_vectors(dtype: torch.dtype, start: int) -> None:
    size = 2 * 4096 + 3
    base, model = tied(size, 0.15, dtype, seed=4)
    start -= start % 4096
    for kind in KINDS:
        mask = mask_of(kind, dtype, size, start, random_key=5)
        expected = REFERENCE.l1_norms(chunk_of(REFERENCE, base, [model], start=start), [mask], False)
        for backend in BACKENDS:
            chunk = chunk_of(backend, base, [model], start=start)
            assert backend.l1_norms(chunk, [mask], False) == expected, (kind, backend.instruction_set)


def test_a_chunk_is_ranked_once() -> None:
    """When its norms are summed: what was kept then is merged, whatever the ranks are now. Another is ranked anew."""
    masks = [mask_of("ranked", torch.bfloat16, TILE, 0, model) for model in range(2)]
    operation = Consensus((Entry(masks[0], 1.0), Entry(masks[1], 2.0)), election="none")
    backend = CpuBackend(threads=1)
    for seed in range(2):
        g = generator(seed, TILE)
        base = torch.zeros(TILE, dtype=torch.bfloat16)
        models = [torch.randn(TILE, generator=g).to(torch.bfloat16) for _ in range(2)]
        each = [
            apply(REFERENCE, Consensus((Entry(mask, 1.0),)), base, [model])[0]
            for model, mask in zip(models, masks, strict=True)
        ]
        kept = [(merged != 0).to(torch.bfloat16) for merged in each]
        chunk, output = chunk_of(backend, base, models), torch.empty_like(base)
        backend.l1_norms(chunk, masks, False)
        for model in models:
            model.fill_(1.0)  # the chunk's own memory
        backend.consensus(chunk, operation, backend.tensor(output))
        assert torch.equal(output, kept[0] + 2 * kept[1])
        anew, _ = apply(backend, operation, base, models)
        assert same_bytes(anew, apply(REFERENCE, operation, base, models)[0])
        assert not torch.equal(anew, output)


def test_several_callers_at_a_time() -> None:
    """Loops of all of them share the same threads, and none waits for what another has to do."""
    inputs = [quantised_models(5 * 65536 + n, 2, torch.bfloat16, n) for n in range(8)]
    backend = CpuBackend(threads=3)
    operation = Consensus((Entry(Draw(1 << 30, 3), 0.5), Entry(Dense(), 0.5)), "sum", True)

    def merge(tensors: tuple[torch.Tensor, list[torch.Tensor]]) -> tuple[torch.Tensor, object]:
        return apply(backend, operation, *tensors)

    expected = [merge(tensors) for tensors in inputs]
    with ThreadPoolExecutor(4) as pool:
        for (merged, outcome), (alone, counted) in zip(
            pool.map(merge, 3 * inputs), 3 * expected, strict=True
        ):
            assert same_bytes(merged, alone) and outcome == counted


def every_number(dtype: torch.dtype, after: int = 0) -> torch.Tensor:
    """All numbers of a type of 16 bits in the order of their bits, from the first or one ``after`` it."""
    return (torch.arange(1 << 16) + after).to(torch.int16).view(dtype)


def around_numbers(dtype: torch.dtype) -> torch.Tensor:
    """All numbers of a type of 16 bits in float32, what lies in the middle of two, and the neighbours of both."""
    numbers, next_ones = every_number(dtype).float(), every_number(dtype, after=1).float()
    both = torch.cat([numbers, numbers / 2 + next_ones / 2, torch.tensor([3e-45, -3e-45, 3e38, -3e38])])
    up, down = (torch.nextafter(both, torch.tensor(end)) for end in (torch.inf, -torch.inf))
    return torch.cat([both, up, down])


@pytest.mark.parametrize("working", DTYPES, ids=str)
@pytest.mark.parametrize("out", DTYPES, ids=str)
def test_every_number_of_16_bits_becomes_what_torch_makes_of_it(
    working: torch.dtype, out: torch.dtype
) -> None:
    inputs = [numbers(dtype) for numbers in (every_number, around_numbers) for dtype in DTYPES[:2]]
    for values in inputs:
        expected = values.to(working).to(out)
        expected[expected.isnan()] = torch.nan
        not_finite = tuple(int((~x.isfinite()).sum()) for x in (values.to(working), expected))
        for backend in BACKENDS:
            merged, outcome = apply(
                backend,
                Combine((1.0,)),
                None,
                [values],
                working=dtype_of(torch.empty(0, dtype=working)),
                out=out,
            )
            assert same_bytes(merged, expected), (backend.instruction_set, values.dtype)
            assert (*outcome.non_finite, outcome.non_finite_output) == not_finite


@pytest.mark.parametrize("backend", BACKENDS, ids=INSTRUCTION_SETS)
def test_what_is_computed_is_no_output(backend: CpuBackend) -> None:
    base, models = quantised_models(100, 2, torch.float32)
    chunk = chunk_of(backend, base, models)
    dtype = Structures(native).dtype(chunk.working)
    computed = native.Kernels(backend.instruction_set, 1).scores(
        inputs=chunk.inputs, score=native.Score.variance(False), working=dtype, count=100
    )
    assert [array.count for array in computed] == [100, 100]
    for array in computed:
        with pytest.raises(ValueError, match="in memory"):
            backend.combine(chunk, Combine((0.5, 0.5), on_base=True), array)
        with pytest.raises(ValueError, match="in memory"):
            native.add_rows(rows=array, sums=memoryview(bytearray(80)).cast("d"))
