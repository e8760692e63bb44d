"""Task vectors, mask, election of signs and disjoint mean in one read of every input.

    d_i = x_i - b                              v_i = w_i * (r_i * d_i) where the mask keeps it, else 0
    S = sum of v_i * (1 + s_i)                 the elected sign is + where S >= 0
    m = sum of the retained v_i / sum of their w_i        merged = b + scale * m

Steps 1 to 10 and 13 of docs/arithmetic.md; csrc/cpu/consensus.cpp is the same in C++. Models are added in their
order, in registers: the kernel is compiled for each number of models. A sum of weights takes one of 2^n values, so for
few models their reciprocals come in a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

from merge_engine.kernels.counting import FIELDS, KEPT, SAVED, add_tallies, count_non_finite, tally
from merge_engine.kernels.launching import COLUMNS, constants, over_tiles
from merge_engine.kernels.masks import NOTED, RANKED, RANKED_INVERSE, ROW, keeps
from merge_engine.kernels.numbers import (
    divided,
    load_bits,
    magnitude,
    reciprocal,
    rounded,
    stains,
    store,
    value_of,
)

IN_A_TABLE = 8
"""Models of which a table of reciprocals has all subsets; with more, every element's divisor is summed and inverted."""

REGISTERS_OF_MANY = 168
"""Of a thread, for more than four models: twelve warps fit a multiprocessor. Left to itself, the compiler takes 255."""

NUMBERS = tl.constexpr(4)  # of an entry: rescale, weight, 1 + vote slack, retain slack
SCALE = tl.constexpr(0)  # what follows the entries' numbers
DIVISOR = tl.constexpr(1)


@triton.jit(do_not_specialize=["start", "first_tile", "steps", "count"])
def consensus_kernel(
    base,
    models,
    masks,
    thresholds,
    numbers,
    reciprocals,
    output,
    counts,
    start,
    first_tile,
    steps,
    count,
    CODES,
    OUT: tl.constexpr,
    WORKING: tl.constexpr,
    KINDS,
    ELECTION: tl.constexpr,
    NORMALIZE: tl.constexpr,
    STORAGE_ROUNDING: tl.constexpr,
    WIDE: tl.constexpr,
    VOTE_SLACK: tl.constexpr,
    RETAIN_SLACK: tl.constexpr,
    ALIGNED: tl.constexpr,
    TABLE: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Some tiles of a chunk. ``counts`` has rows for the base, the models and the output."""
    REAL: tl.constexpr = tl.float64 if WORKING == "F64" else tl.float32
    COUNTS_SAVED: tl.constexpr = VOTE_SLACK or RETAIN_SLACK
    WEIGHS_LAST: tl.constexpr = (ELECTION == "deltas") | (ELECTION == "overlap")
    SUMS_ROUNDED: tl.constexpr = STORAGE_ROUNDING and not WIDE
    tile = first_tile + tl.program_id(0) * steps
    columns = tl.arange(0, COLUMNS)[None, :]
    rows = (tl.arange(0, ROWS) * COLUMNS)[:, None]
    places = rows + columns
    others = numbers + N * NUMBERS
    kept_and_lost = ()
    saved = ()
    for _ in tl.static_range(N):
        kept_and_lost = kept_and_lost + (tl.zeros((ROWS,), tl.int32),)
        saved = saved + (tl.zeros((ROWS,), tl.int32),)
    stained = tl.zeros((ROWS,), REAL)
    step = steps * 0
    while step < steps:
        first = (tile + step).to(tl.int64) * (ROWS * COLUMNS)
        inside = first + places < count
        index = start + first + rows
        base_bits = load_bits(base + first, places, inside, MASKED)
        bits = ()
        for i in tl.static_range(N):
            bits = bits + (load_bits(models[i] + first, places, inside, MASKED),)
        b = value_of(base_bits, CODES[0], WORKING)
        zeros = tl.zeros((ROWS, COLUMNS), REAL)
        values = ()
        counted = ()
        for i in tl.static_range(N):
            delta = rounded(value_of(bits[i], CODES[i + 1], WORKING) - b, WORKING, STORAGE_ROUNDING)
            stained += stains(delta)
            below = places.to(tl.uint32)  # stands in for thresholds where a mask has none
            if (KINDS[i] == RANKED) | (KINDS[i] == RANKED_INVERSE) | (KINDS[i] == NOTED):
                below = load_bits(thresholds[i] + first, places, inside, MASKED)
            kept = keeps(masks + i * ROW, below, magnitude(delta), index, columns, KINDS[i], ALIGNED)
            if KINDS[i] == RANKED_INVERSE:
                factor = (4294967296.0 / tl.maximum(below, 1).to(tl.float64)).to(REAL)
                delta = tl.where(kept, rounded(delta * factor, WORKING, STORAGE_ROUNDING), 0.0)
            else:
                rescale = rounded(tl.load(numbers + i * NUMBERS), WORKING, STORAGE_ROUNDING)
                delta = rounded(delta * rescale, WORKING, STORAGE_ROUNDING)
            weight = rounded(tl.load(numbers + i * NUMBERS + 1), WORKING, SUMS_ROUNDED)
            if WEIGHS_LAST:
                value = tl.where(kept, delta, 0.0)
            else:
                value = tl.where(kept, rounded(delta * weight, WORKING, STORAGE_ROUNDING), 0.0)
            values = values + (value,)
            counted = counted + (kept_and_lost[i] + tally(kept & (delta != 0)),)

        mean = zeros
        divisor = zeros
        now_saved = saved
        if ELECTION == "none":
            for i in tl.static_range(N):
                mean += values[i]
            kept_and_lost = counted
            divisor += tl.load(others + DIVISOR)
            inverse = reciprocal(tl.load(others + DIVISOR))
        elif ELECTION == "overlap":
            keeping = zeros
            for i in tl.static_range(N):
                keeping += (values[i] != 0).to(REAL)
            keeping = tl.maximum(keeping, 1.0)
            shares = reciprocal(keeping)
            for i in tl.static_range(N):
                weight = rounded(tl.load(numbers + i * NUMBERS + 1), WORKING, SUMS_ROUNDED)
                alone = rounded(values[i] * weight, WORKING, SUMS_ROUNDED)
                shared = rounded(divided(values[i], keeping, shares), WORKING, STORAGE_ROUNDING)
                mean += tl.where(values[i] != 0, tl.where(keeping > 1, shared, alone), 0.0)
            kept_and_lost = counted
        else:
            plain = zeros
            slackened = zeros
            spread = zeros
            for i in tl.static_range(N):
                vote = values[i]
                if ELECTION == "count":
                    vote = (values[i] > 0).to(REAL) - (values[i] < 0).to(REAL)
                plain += vote
                if VOTE_SLACK:
                    slackened += vote * tl.load(numbers + i * NUMBERS + 2)
                if RETAIN_SLACK:
                    spread += tl.abs(vote)
            plain = rounded(plain, WORKING, STORAGE_ROUNDING)
            elected = plain
            if VOTE_SLACK:
                elected = rounded(slackened, WORKING, STORAGE_ROUNDING)
            sign = tl.where(elected >= 0, 1.0, -1.0).to(REAL)
            subset = tl.zeros((ROWS, COLUMNS), tl.int32)
            kept_and_lost = ()
            if COUNTS_SAVED:
                now_saved = ()
            for i in tl.static_range(N):
                if ELECTION != "count" and not RETAIN_SLACK:
                    # NaN agrees: it makes the sum NaN, whose sign counts as -, and is not positive itself.
                    agrees = values[i] * sign
                    retained = (agrees <= 0) == 0
                    lost = agrees < 0
                else:
                    voted = values[i] != 0
                    retained = voted & ((values[i] > 0) == (sign > 0))
                    if RETAIN_SLACK:
                        slack = tl.load(numbers + i * NUMBERS + 3) + zeros
                        narrow_margin = (tl.abs(elected) < slack * spread) | (slack >= 1)
                        retained = retained | (voted & narrow_margin)
                    lost = voted & (retained == 0)
                if WEIGHS_LAST:
                    weight = rounded(tl.load(numbers + i * NUMBERS + 1), WORKING, STORAGE_ROUNDING)
                    weighted = rounded(values[i] * weight, WORKING, STORAGE_ROUNDING)
                    mean += tl.where(retained, weighted, 0.0)
                else:
                    mean += tl.where(retained, values[i], 0.0)
                if TABLE:
                    subset += tl.where(retained, 1 << i, 0)
                else:
                    weight = rounded(tl.load(numbers + i * NUMBERS + 1), WORKING, STORAGE_ROUNDING)
                    divisor += tl.where(retained, weight, 0.0)
                kept_and_lost = kept_and_lost + (counted[i] + (tally(lost) << 16),)
                if COUNTS_SAVED:
                    spared = retained & ((values[i] > 0) != (plain >= 0))
                    now_saved = now_saved + (saved[i] + tally(spared),)
            divisor = rounded(divisor, WORKING, STORAGE_ROUNDING)
            divisor = tl.where(divisor == 0, 1.0, divisor)
            if TABLE:
                inverse = tl.load(reciprocals + subset)
            else:
                inverse = reciprocal(divisor)
        saved = now_saved

        mean = rounded(mean, WORKING, SUMS_ROUNDED)
        if NORMALIZE and ELECTION != "overlap":
            mean = rounded(divided(mean, divisor, inverse), WORKING, SUMS_ROUNDED)
        mean = rounded(mean * tl.load(others + SCALE), WORKING, SUMS_ROUNDED)
        merged = rounded(b + mean, WORKING, SUMS_ROUNDED)
        stained += stains(store(output + first, places, inside, merged, OUT, MASKED).to(REAL))
        step += 1

    for i in tl.static_range(N):
        add_tallies(counts + (i + 1) * FIELDS + KEPT, kept_and_lost[i])
        if COUNTS_SAVED:
            total = tl.sum(saved[i], 0)
            tl.atomic_add(counts + (i + 1) * FIELDS + SAVED, total.to(tl.int64), sem="relaxed")
    if tl.max((stained != 0).to(tl.int32), 0) != 0:
        tl.debug_barrier()  # the output may be read by other threads than those that wrote it
        count_non_finite(base, counts, tile, steps, count, CODES[0], WORKING, ROWS, MASKED)
        for i in tl.static_range(N):
            row = counts + (i + 1) * FIELDS
            count_non_finite(models[i], row, tile, steps, count, CODES[i + 1], WORKING, ROWS, MASKED)
        count_non_finite(output, counts + (N + 1) * FIELDS, tile, steps, count, OUT, OUT, ROWS, MASKED)


@lru_cache(maxsize=256)
def reciprocals_of(weights: tuple[float, ...], working: str, storage_rounding: bool) -> tuple[float, ...]:
    """1 / the sum of the weights of every subset of the models, where 0 counts as 1. Bit i of its place is model i's.

    Where the kernel has no use for them, for float64 and for many models, only that of no model.
    """
    if working == "F64" or len(weights) > IN_A_TABLE:
        return (1.0,)

    def rounded_sums(sums: torch.Tensor) -> torch.Tensor:
        dtype = {"BF16": torch.bfloat16, "F16": torch.float16}.get(working, torch.float32)
        return sums.to(dtype).float() if storage_rounding else sums

    sums = torch.zeros(1)
    for weight in rounded_sums(torch.tensor(weights, dtype=torch.float64).float()):
        sums = torch.cat([sums, sums + weight])
    sums = rounded_sums(sums)
    inverse: list[float] = (1.0 / torch.where(sums == 0, 1.0, sums).double()).tolist()
    return tuple(inverse)


def consensus(
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    output: torch.Tensor,
    codes: Sequence[str],
    working: str,
    start: int,
    kinds: Sequence[int],
    masks: torch.Tensor,
    thresholds: Sequence[torch.Tensor],
    numbers: torch.Tensor,
    reciprocals: torch.Tensor,
    counts: torch.Tensor,
    *,
    election: str,
    normalize: bool,
    storage_rounding: bool,
    wide: bool,
    vote_slack: bool,
    retain_slack: bool,
) -> None:
    """Merge a chunk whose first element has flat index ``start``.

    Inputs and ``output`` are the unsigned bits of ``count`` elements, their types in ``codes`` (base, models, output).
    ``masks``: [n, ROW] int64 (see masks.py), ``thresholds``: uint32 of each element for the models whose mask is
    ranked, any tensor for others. ``numbers``: float32, or float64 for that working dtype, four for each model
    (rescale, weight, 1 + vote slack, retain slack), then scale and divisor. ``reciprocals``: float64, those of
    ``reciprocals_of``. ``counts``: [n + 2, 4] int64, which kept, lost, saved and non-finite are added to.
    """
    over_tiles(
        consensus_kernel,
        output.numel(),
        base,
        tuple(models),
        masks,
        tuple(thresholds),
        numbers,
        reciprocals,
        output,
        counts,
        start,
        CODES=constants(codes[:-1]),
        OUT=codes[-1],
        WORKING=working,
        KINDS=constants(kinds),
        ELECTION=election,
        NORMALIZE=normalize,
        STORAGE_ROUNDING=storage_rounding,
        WIDE=wide,
        VOTE_SLACK=vote_slack,
        RETAIN_SLACK=retain_slack,
        ALIGNED=start % COLUMNS.value == 0,
        TABLE=working != "F64" and len(models) <= IN_A_TABLE,
        N=len(models),
        maxnreg=REGISTERS_OF_MANY if len(models) > 4 else None,
    )
