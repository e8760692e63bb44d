"""Keys found by their ranks in a large tensor, without a table of all keys.

A sample of the elements shows which key a rank probably has. Each element is then read once, and compared with six
edges at this key and its neighbours. If the key of the rank lies between two edges that are one apart, the counts prove
it. If not, ``missing`` says so, and the table is made after all. All of this is launched at once, so the host waits for
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from merge_engine.kernels.histogram import COPIES, histogram
from merge_engine.kernels.launching import (
    COLUMNS,
    INTERPRETED,
    OPTIONS,
    TILE,
    constants,
    over_tiles,
)
from merge_engine.kernels.numbers import first_magnitude, load_bits, magnitude, value_of
from merge_engine.kernels.select import select

SAMPLED_TILES = 2 if INTERPRETED else 256
SAMPLED = SAMPLED_TILES * TILE
WORTH_SEARCHING = 2 * SAMPLED if INTERPRETED else 1 << 20
"""Elements from which on the search takes less time than a table of all keys."""

BINS = tl.constexpr(1 << 15)  # of the sample's table and of the first level
EDGES = tl.constexpr(8)  # room for six edges, behind bin 0, and one that nothing reaches
UNREACHED = tl.constexpr(1 << 15)


@triton.jit
def edges_kernel(sample, queries, keys, magnitudes, SHIFT: tl.constexpr, WORKING: tl.constexpr):
    """The edges of one query: model, rank in the sample. ``keys`` and ``magnitudes``: [queries, EDGES] int64."""
    query = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.load(sample + tl.load(queries + 3 * query) * BINS + bins).to(tl.int32)
    rank = tl.load(queries + 3 * query + 1)
    at_least = tl.cumsum(counts, 0, reverse=True)
    some = counts > 0
    reaches = some & (at_least >= rank)
    exceeds = some & (at_least - counts >= rank)
    key = tl.max(tl.where(reaches & (exceeds == 0), bins, 0), 0)
    lower = tl.max(tl.where(exceeds, bins, -1), 0)
    upper = tl.min(tl.where(some & (at_least < rank), bins, BINS), 0)
    # A neighbour one apart shares an edge with the key: the spare edge goes beyond it.
    lower = tl.where(lower == key - 1, key - 2, lower)
    upper = tl.where(upper == key + 1, key + 2, upper)
    number = tl.arange(0, EDGES)
    edge = tl.where(
        number < 3, lower + number - 1, tl.where(number < 5, key + number - 3, upper + number - 5)
    )
    edge = tl.minimum(tl.maximum(edge, 0), UNREACHED)
    edge = tl.where(number < 7, edge, UNREACHED)
    tl.store(keys + query * EDGES + number, edge.to(tl.int64))
    first = first_magnitude(edge.to(tl.int64) << SHIFT, WORKING)
    # At 2^15 all bits of a key are used up; nothing reaches this magnitude.
    unreached = 0x8000000000000000 if WORKING == "F64" else 0x80000000
    first = tl.where(edge == UNREACHED, unreached, first).to(first.dtype)
    tl.store(magnitudes + query * EDGES + number, first.to(tl.int64))


@triton.jit(do_not_specialize=["first_tile", "steps", "count"])
def sides_kernel(
    base,
    models,
    magnitudes,
    counts,
    first_tile,
    steps,
    count,
    CODES,
    MODELS,
    WORKING: tl.constexpr,
    N: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Some tiles: how many elements lie between the edges of each query. ``counts``: [queries, EDGES] int64."""
    BITS: tl.constexpr = tl.uint64 if WORKING == "F64" else tl.uint32
    tile = first_tile + tl.program_id(0) * steps
    places = (tl.arange(0, ROWS) * COLUMNS)[:, None] + tl.arange(0, COLUMNS)[None, :]
    every = ()
    upper = ()
    for _ in tl.static_range(QUERIES):
        every = every + (tl.zeros((ROWS,), tl.int32),)
        upper = upper + (tl.zeros((ROWS,), tl.int32),)
    step = steps * 0
    while step < steps:
        first = (tile + step).to(tl.int64) * (ROWS * COLUMNS)
        inside = first + places < count
        base_bits = load_bits(base + first, places, inside, MASKED)
        bits = ()
        for i in tl.static_range(N):
            bits = bits + (load_bits(models[i] + first, places, inside, MASKED),)
        b = value_of(base_bits, CODES[0], WORKING)
        sizes = ()
        for i in tl.static_range(N):
            sizes = sizes + (magnitude(value_of(bits[i], CODES[i + 1], WORKING) - b),)
        now_every = ()
        now_upper = ()
        for q in tl.static_range(QUERIES):
            size = sizes[MODELS[q]]
            edge = magnitudes + q * EDGES
            e1 = tl.load(edge + 1).to(BITS)
            e2 = tl.load(edge + 2).to(BITS)
            e3 = tl.load(edge + 3).to(BITS)
            e5 = tl.load(edge + 5).to(BITS)
            e6 = tl.load(edge + 6).to(BITS)
            e7 = tl.load(edge + 7).to(BITS)
            # A binary search for the bin from 0 to 7. Bins are counted in fields of eight bits, four to a number: a
            # program has at most 31 tiles of eight elements a row.
            high = size >= tl.load(edge + 4).to(BITS)
            middle = size >= tl.where(high, e6, e2)
            low = size >= tl.where(high, tl.where(middle, e7, e5), tl.where(middle, e3, e1))
            one = tl.where(middle, tl.where(low, 1 << 24, 1 << 16), tl.where(low, 1 << 8, 1))
            if MASKED:
                one = tl.where(inside, one, 0)
            now_every = now_every + (every[q] + tl.sum(one, 1),)
            now_upper = now_upper + (upper[q] + tl.sum(tl.where(high, one, 0), 1),)
        every = now_every
        upper = now_upper
        step += 1

    number = tl.arange(0, EDGES)
    for q in tl.static_range(QUERIES):
        fields = tl.where((number < 4)[None, :], (every[q] - upper[q])[:, None], upper[q][:, None])
        in_bins = tl.sum((fields >> (8 * (number % 4))[None, :]) & 0xFF, 0)
        tl.atomic_add(counts + q * EDGES + number, in_bins.to(tl.int64), mask=in_bins > 0, sem="relaxed")


@triton.jit
def prove_kernel(queries, keys, counts, found, missing):
    """What the counts prove of one query: model, rank in the sample, rank. If nothing, its model is ``missing``."""
    query = tl.program_id(0)
    number = tl.arange(0, EDGES)
    rank = tl.load(queries + 3 * query + 2)
    edge = tl.load(keys + query * EDGES + number)
    following = tl.load(keys + query * EDGES + number + 1, mask=number < EDGES - 1, other=0)
    in_bin = tl.load(counts + query * EDGES + number)
    at_least = tl.cumsum(in_bin, 0, reverse=True)
    above = at_least - in_bin
    proves = (number > 0) & (at_least >= rank) & (above < rank) & (following == edge + 1)
    row = found + 3 * query
    tl.store(row, tl.sum(tl.where(proves, edge, 0), 0))
    tl.store(row + 1, tl.sum(tl.where(proves, above, 0), 0))
    tl.store(row + 2, tl.sum(tl.where(proves, in_bin, 0), 0))
    proven = tl.sum(proves.to(tl.int32), 0)
    tl.store(missing + tl.load(queries + 3 * query), 1, mask=proven == 0)


def sampled_rank(rank: int, count: int) -> int:
    """The rank in the sample that corresponds to a rank among ``count`` elements."""
    return min(max(round(rank / count * SAMPLED), 1), SAMPLED)


def search(
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    codes: Sequence[str],
    working: str,
    shift: int,
    queries: torch.Tensor,
    asked: Sequence[int],
    found: torch.Tensor,
) -> None:
    """Find keys by rank at the first level, among all elements of a tensor of at least ``SAMPLED`` elements.

    Inputs are unsigned bits, their types in ``codes`` (base, models). ``asked`` are the numbers of the queries' models;
    ``queries``: [m, 3] int64, the same, the rank in the sample (see ``sampled_rank``), and the rank, from 1. ``shift``
    leads from keys to bins. ``found``: [m, 3] int64, written as by ``select``.
    """
    count, n, m = base.numel(), len(models), len(asked)
    of_queries = (m, EDGES.value)
    shapes = ((n, 1, BINS.value), (n, COPIES, BINS.value), of_queries, of_queries, of_queries, (n,))
    numels = [math.prod(shape) for shape in shapes]
    rooms = torch.zeros(sum(numels), dtype=torch.int64, device=base.device).split(numels)  # in one launch
    sample, table, keys, magnitudes, counts, missing = (
        room.view(shape) for room, shape in zip(rooms, shapes, strict=True)
    )
    slots = torch.arange(n, device=base.device)

    spacing = count // SAMPLED
    histogram(base, models, codes, working, shift, slots, None, sample, count=SAMPLED, spacing=spacing)
    wide = {**OPTIONS, "num_warps": 32}
    edges_kernel[(m,)](sample, queries, keys, magnitudes, SHIFT=shift, WORKING=working, **wide)
    over_tiles(
        sides_kernel,
        count,
        base,
        tuple(models),
        magnitudes,
        counts,
        CODES=constants(codes),
        MODELS=constants(asked),
        WORKING=working,
        N=n,
        QUERIES=m,
    )
    prove_kernel[(m,)](queries, keys, counts, found, missing, **OPTIONS)
    histogram(base, models, codes, working, shift, slots, None, table, missing=missing)
    select(table, torch.nn.functional.pad(queries[:, ::2], (0, 3)), found, 0, missing)
