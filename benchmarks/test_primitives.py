"""The CPU backend's primitives, per instruction set and number of models, beside the memory's own speed.

``bytes_moved`` is the least number of bytes that must move: every input is read once, every output written once. Its
rate is given in GB/s and as a percentage of the rate at which all cores together copy memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import merge_engine._native as native
from merge_engine.backends.cpu import CpuBackend
from merge_engine.backends.operations import (
    Chunk,
    Combine,
    Consensus,
    Dense,
    Draw,
    Entry,
    FoundBand,
    KeyColumn,
    Line,
    Mask,
    Rank,
    Ranked,
    RankMask,
    Sought,
)
from merge_engine.bench.checkpoints import draw_base, draw_tuned
from merge_engine.bench.probe import measure_memory
from merge_engine.dtypes import BF16

INSTRUCTION_SETS = [name for name in ("baseline", "avx2", "avx512") if native.runs(name)]
MODELS = (2, 4, 8)
DENSITY = 0.2
ROUNDS = 5
LINE = 4096

Result = TypeVar("Result")
pytestmark = [pytest.mark.parametrize("isa", INSTRUCTION_SETS), pytest.mark.parametrize("n", MODELS)]


@pytest.fixture(scope="module")
def count(small: bool) -> int:
    """Elements of each input."""
    return 1 << (14 if small else 24)


@cache
def tensors(count: int, n: int) -> list[torch.Tensor]:
    """A base and ``n`` fine-tunes of it."""
    if n == 0:
        return [draw_base(count, seed=0)]
    fewer = tensors(count, n - 1)
    return [*fewer, draw_tuned(fewer[0], seed=n)]


memory_rate = cache(measure_memory)


def chunk_of(backend: CpuBackend, count: int, n: int) -> Chunk:
    """The inputs as a chunk that is a whole tensor."""
    arrays = [backend.tensor(tensor) for tensor in tensors(count, n)]
    return Chunk(arrays, True, BF16, 0, count, Line(LINE, 1))


def timed(benchmark: BenchmarkFixture, bytes_moved: int, body: Callable[[], Result]) -> Result:
    """Run ``body`` under the benchmark and note how fast it moves bytes."""
    result = benchmark.pedantic(body, rounds=ROUNDS, warmup_rounds=1)
    if benchmark.stats is not None:  # None when benchmarks are disabled
        rate = bytes_moved / benchmark.stats.stats.median
        benchmark.extra_info |= {
            "bytes_moved": bytes_moved,
            "gb_per_s": round(rate / 1e9, 2),
            "percent_of_memory_copy": round(100 * rate / memory_rate(), 1),
        }
    return result


def deltas(count: int, n: int) -> list[torch.Tensor]:
    """Task vectors in double precision."""
    base, *models = tensors(count, n)
    return [(model.float() - base.float()).double() for model in models]


def threshold(backend: CpuBackend, chunk: Chunk, model: int) -> Mask:
    """The mask that keeps the top fifth of a model's entries, ties decided by draws."""
    rank = int(DENSITY * chunk.count)
    [[found]] = backend.find_all(chunk, 0, [Sought(model, (rank,))])
    return backend.bands([FoundBand(RankMask(1, rank, random_key=model), found)], chunk.working)[0].mask


@pytest.mark.parametrize("known", [False, True], ids=["all keys", "a rank"])
def test_find(benchmark: BenchmarkFixture, known: bool, isa: str, n: int, count: int) -> None:
    """The key of a rank: by counting all keys, and by looking for that one only."""
    backend = CpuBackend(instruction_set=isa)
    chunk = chunk_of(backend, count, n)
    rank = int(DENSITY * count)

    def count_all() -> list[Any]:
        counts = backend.new_counts(0, [None] * n)
        backend.count(chunk, [KeyColumn(slot, slot) for slot in range(n)], counts)
        return backend.find(counts, [Rank(slot, rank) for slot in range(n)])

    def look_for_one() -> list[Any]:
        found = backend.find_all(chunk, 0, [Sought(model, (rank,)) for model in range(n)])
        return [one for [one] in found]

    handles = timed(benchmark, 2 * count * (1 + n), look_for_one if known else count_all)
    for found, delta in zip(map(backend.fetch, handles), deltas(count, n), strict=True):
        keys = delta.float().abs().bfloat16().view(torch.int16)
        assert (int((keys > found.key).sum()), int((keys == found.key).sum())) == found[1:]
        assert found.above < rank <= found.above + found.equal


@pytest.mark.parametrize("kind", ["dense", "band", "draw", "ranked"])
def test_consensus(benchmark: BenchmarkFixture, kind: str, isa: str, n: int, count: int) -> None:
    """Trim, election and mean; ``ranked`` includes the ranking of magnitudes along lines of 4096."""
    backend = CpuBackend(instruction_set=isa)
    chunk = chunk_of(backend, count, n)
    masks: dict[str, Callable[[int], Mask]] = {
        "dense": lambda model: Dense(),
        "band": lambda model: threshold(backend, chunk, model),
        "draw": lambda model: Draw(int(DENSITY * 2**32), random_key=model),
        "ranked": lambda model: Ranked(DENSITY, 0.1, inverse_probability=True, random_key=model),
    }
    entries = tuple(Entry(masks[kind](model), weight=0.5) for model in range(n))
    operation = Consensus(entries, election="sum", normalize=True)
    merged = torch.empty(count, dtype=torch.bfloat16)
    output = backend.tensor(merged)
    outcome = timed(benchmark, 2 * count * (2 + n), lambda: backend.consensus(chunk, operation, output))
    assert outcome.non_finite == (0,) * (1 + n)
    for counts, delta in zip(outcome.counts, deltas(count, n), strict=True):
        changed = int(delta.count_nonzero())
        expected = {"dense": changed, "band": DENSITY * count, "draw": DENSITY * changed}.get(
            kind, counts.kept
        )
        assert abs(counts.kept - expected) <= (0 if kind == "dense" else 6 * math.sqrt(count))
        assert 0 <= counts.lost <= counts.kept
    unmoved = torch.stack(deltas(count, n)).count_nonzero(0) == 0
    assert torch.equal(merged[unmoved], tensors(count, n)[0][unmoved])


def test_combine(benchmark: BenchmarkFixture, isa: str, n: int, count: int) -> None:
    backend = CpuBackend(instruction_set=isa)
    models = chunk_of(backend, count, n).models
    chunk = Chunk(models, False, BF16, 0, count)
    merged = torch.empty(count, dtype=torch.bfloat16)
    output, operation = backend.tensor(merged), Combine((0.5,) * n, divisor=0.5 * n)
    timed(benchmark, 2 * count * (1 + n), lambda: backend.combine(chunk, operation, output))
    total = torch.zeros(count)
    for model in tensors(count, n)[1:]:
        total += model.float() * 0.5
    assert torch.equal(merged, (total / (0.5 * n)).bfloat16())


def test_gram(benchmark: BenchmarkFixture, isa: str, n: int, count: int) -> None:
    backend = CpuBackend(instruction_set=isa)
    chunk = chunk_of(backend, count, n)
    sums = timed(benchmark, 2 * count * (1 + n), lambda: backend.gram(chunk)).totals()
    base, first = (tensor.double() for tensor in tensors(count, n)[:2])
    assert sums[:2] == pytest.approx([float(base @ base), float(base @ first)], rel=1e-9)


def test_l1_norms(benchmark: BenchmarkFixture, isa: str, n: int, count: int) -> None:
    backend = CpuBackend(instruction_set=isa)
    chunk = chunk_of(backend, count, n)
    masks = [threshold(backend, chunk, model) for model in range(n)]
    sums = timed(benchmark, 2 * count * (1 + n), lambda: backend.l1_norms(chunk, masks, False)).totals()
    assert sums[::2] == pytest.approx([float(delta.abs().sum()) for delta in deltas(count, n)], rel=1e-9)
    assert all(0 < kept < whole for whole, kept in zip(sums[::2], sums[1::2], strict=True))
