"""Task vectors, mask, election of signs and disjoint mean in one read of every input.

    d_i = x_i - b                              v_i = w_i * (r_i * d_i) where the mask keeps it, else 0
    S = sum of v_i * (1 + s_i)                 the elected sign is + where S >= 0
    m = sum of the retained v_i / sum of their w_i        merged = b + scale * m

Steps 1 to 10 and 13 of docs/arithmetic.md; csrc/cpu/consensus.cpp is the same in C++. Models are added in their
order, in registers: the kernel is compiled for each number of models.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from merge_engine.kernels.counting import FIELDS, KEPT, LOST, NON_FINITE, SAVED, add_tallies, tally
from merge_engine.kernels.draws import GROUP
from merge_engine.kernels.launching import TILE, constants, over_tiles
from merge_engine.kernels.masks import RANKED, RANKED_INVERSE, ROW, keeps
from merge_engine.kernels.numbers import divided, load, load_bits, non_finite, rounded_to, store

IN_REGISTERS = 8  # of so many models eight elements fit the registers of a thread; of more, four
NUMBERS = tl.constexpr(4)  # of an entry: rescale, weight, 1 + vote slack, retain slack


@triton.jit
def rounded(value, WORKING: tl.constexpr, STORAGE_ROUNDING: tl.constexpr):
    """A result, rounded to the working dtype when every step is to be."""
    if STORAGE_ROUNDING:
        result = rounded_to(value, WORKING)
    else:
        result = value
    return result


@triton.jit(do_not_specialize=["start", "first_tile", "count"])
def consensus_kernel(
    base,
    models,
    masks,
    thresholds,
    numbers,
    output,
    counts,
    start,
    first_tile,
    count,
    CODES,
    OUT: tl.constexpr,
    WORKING: tl.constexpr,
    KINDS,
    ELECTION: tl.constexpr,
    NORMALIZE: tl.constexpr,
    STORAGE_ROUNDING: tl.constexpr,
    VOTE_SLACK: tl.constexpr,
    RETAIN_SLACK: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile of a chunk. ``counts`` has rows for the base, the models and the output."""
    REAL: tl.constexpr = tl.float64 if WORKING == "F64" else tl.float32
    first = (first_tile + tl.program_id(0)).to(tl.int64) * BLOCK
    place = tl.arange(0, BLOCK)
    groups = (tl.arange(0, BLOCK // GROUP) * GROUP)[:, None]
    offsets = first + place
    inside = offsets < count

    b = load(base, offsets, inside, CODES[0], WORKING, MASKED)
    add_tallies(counts, tally(non_finite(b), NON_FINITE))
    values = ()
    tallies = ()
    for i in tl.static_range(N):
        x = load(models[i], offsets, inside, CODES[i + 1], WORKING, MASKED)
        delta = rounded(x - b, WORKING, STORAGE_ROUNDING)
        below = place.to(tl.uint32)  # stands in for thresholds where a mask has none
        if (KINDS[i] == RANKED) | (KINDS[i] == RANKED_INVERSE):
            below = load_bits(thresholds[i], offsets, inside, MASKED)
        kept = keeps(masks + i * ROW, below, delta, start + first, place, groups, KINDS[i], WORKING)
        if KINDS[i] == RANKED_INVERSE:
            inverse = (4294967296.0 / tl.maximum(below, 1).to(tl.float64)).to(REAL)
            delta = tl.where(kept, rounded(delta * inverse, WORKING, STORAGE_ROUNDING), 0.0)
        else:
            rescale = rounded(tl.load(numbers + i * NUMBERS).to(REAL), WORKING, STORAGE_ROUNDING)
            delta = rounded(delta * rescale, WORKING, STORAGE_ROUNDING)
        weight = rounded(tl.load(numbers + i * NUMBERS + 1).to(REAL), WORKING, STORAGE_ROUNDING)
        value = tl.where(kept, rounded(delta * weight, WORKING, STORAGE_ROUNDING), 0.0)
        values = values + (value,)
        tallies = tallies + (tally(kept & (delta != 0), KEPT) + tally(non_finite(x), NON_FINITE),)

    mean = tl.zeros_like(b)
    if ELECTION == "none":
        for i in tl.static_range(N):
            mean += values[i]
            add_tallies(counts + (i + 1) * FIELDS, tallies[i])
        divisor = tl.load(numbers + N * NUMBERS + 1).to(REAL) + tl.zeros_like(b)
    else:
        plain = tl.zeros_like(b)
        slackened = tl.zeros_like(b)
        spread = tl.zeros_like(b)
        for i in tl.static_range(N):
            vote = values[i]
            if ELECTION == "count":
                vote = (values[i] > 0).to(REAL) - (values[i] < 0).to(REAL)
            plain += vote
            if VOTE_SLACK:
                slackened += vote * tl.load(numbers + i * NUMBERS + 2).to(REAL)
            if RETAIN_SLACK:
                spread += tl.abs(vote)
        plain = rounded(plain, WORKING, STORAGE_ROUNDING)
        elected = plain
        if VOTE_SLACK:
            elected = rounded(slackened, WORKING, STORAGE_ROUNDING)
        divisor = tl.zeros_like(b)
        for i in tl.static_range(N):
            voted = values[i] != 0
            positive = values[i] > 0
            retained = voted & (positive == (elected >= 0))
            if RETAIN_SLACK:
                slack = tl.load(numbers + i * NUMBERS + 3).to(REAL) + tl.zeros_like(b)
                narrow_margin = (tl.abs(elected) < slack * spread) | (slack >= 1)
                retained = retained | (voted & narrow_margin)
            mean += tl.where(retained, values[i], 0.0)
            weight = rounded(tl.load(numbers + i * NUMBERS + 1).to(REAL), WORKING, STORAGE_ROUNDING)
            divisor += tl.where(retained, weight, 0.0)
            lost = tally(voted & (retained == 0), LOST)
            if VOTE_SLACK or RETAIN_SLACK:
                lost += tally(retained & (positive != (plain >= 0)), SAVED)
            add_tallies(counts + (i + 1) * FIELDS, tallies[i] + lost)
        divisor = rounded(divisor, WORKING, STORAGE_ROUNDING)
        divisor = tl.where(divisor == 0, 1.0, divisor)

    mean = rounded(mean, WORKING, STORAGE_ROUNDING)
    if NORMALIZE:
        mean = rounded(divided(mean, divisor), WORKING, STORAGE_ROUNDING)
    scale = tl.load(numbers + N * NUMBERS).to(REAL)
    mean = rounded(mean * scale, WORKING, STORAGE_ROUNDING)
    merged = rounded(b + mean, WORKING, STORAGE_ROUNDING)
    written = store(output, offsets, inside, merged, OUT, MASKED)
    add_tallies(counts + (N + 1) * FIELDS, tally(written, NON_FINITE))


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
    counts: torch.Tensor,
    *,
    election: str,
    normalize: bool,
    storage_rounding: bool,
    vote_slack: bool,
    retain_slack: bool,
) -> None:
    """Merge a chunk whose first element has flat index ``start``.

    Inputs and ``output`` are the unsigned bits of ``count`` elements, their types in ``codes`` (base, models, output).
    ``masks``: [n, 8] int64 (see masks.py), ``thresholds``: uint32 of each element for the models whose mask is ranked,
    any tensor for others. ``numbers``: float64, four for each model (rescale, weight, 1 + vote slack, retain
    slack), then scale and divisor. ``counts``: [n + 2, 4] int64, which kept, lost, saved and non-finite are added to.
    """
    tile = TILE if len(models) <= IN_REGISTERS else TILE // 2
    over_tiles(
        consensus_kernel,
        output.numel(),
        tile,
        base,
        tuple(models),
        masks,
        tuple(thresholds),
        numbers,
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
        VOTE_SLACK=vote_slack,
        RETAIN_SLACK=retain_slack,
        N=len(models),
        BLOCK=tile,
    )
