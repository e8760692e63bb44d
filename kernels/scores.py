"""Scores of positions, and what a mask of them keeps; steps 22 to 25 of docs/arithmetic.md."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from merge_engine.kernels.exponentials import SOFTENED, exponential, logarithm
from merge_engine.kernels.launching import COLUMNS, ONE_WARP, constants, over_tiles
from merge_engine.kernels.masks import keeps
from merge_engine.kernels.norms import LANES, SUM_BLOCK, added_pairwise
from merge_engine.kernels.numbers import divided, load, load_bits, magnitude, narrow, rounded_to, widen


@triton.jit(do_not_specialize=["first_tile", "steps", "count"])
def variance_kernel(
    inputs,
    scores,
    first_tile,
    steps,
    count,
    CODES,
    WORKING: tl.constexpr,
    STORAGE_ROUNDING: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The variance of the task vectors over some tiles. ``inputs`` begin with the base; N counts them all."""
    HALF: tl.constexpr = (WORKING == "BF16") | (WORKING == "F16")
    WIDE: tl.constexpr = tl.float32 if HALF else tl.float64
    REAL: tl.constexpr = tl.float64 if WORKING == "F64" else tl.float32
    tile = first_tile + tl.program_id(0) * steps
    places = (tl.arange(0, ROWS) * COLUMNS)[:, None] + tl.arange(0, COLUMNS)[None, :]
    step = steps * 0
    while step < steps:
        first = (tile + step).to(tl.int64) * (ROWS * COLUMNS)
        inside = first + places < count
        b = load(inputs[0] + first, places, inside, CODES[0], WORKING, MASKED)
        mean = tl.zeros((ROWS, COLUMNS), WIDE)
        squares = tl.zeros((ROWS, COLUMNS), WIDE)
        one = tl.full((1, 1), 1.0, WIDE)
        for i in tl.static_range(1, N):
            delta = load(inputs[i] + first, places, inside, CODES[i], WORKING, MASKED) - b
            if STORAGE_ROUNDING:
                delta = rounded_to(delta, WORKING)
            number = one * i
            distance = delta.to(WIDE) - mean
            mean = mean + divided(distance, number, 1.0 / number.to(tl.float64))
            squares = squares + distance * (delta.to(WIDE) - mean)
        number = one * (N - 1)
        found = divided(squares, number, 1.0 / number.to(tl.float64)).to(REAL)
        if STORAGE_ROUNDING:
            found = rounded_to(found, WORKING)
        found = tl.where(found == found, found, 0.0)
        CODE: tl.constexpr = "F64" if WORKING == "F64" else "F32"
        tl.store(scores + first + places, narrow(found, CODE), mask=inside)
        step += 1


@triton.jit
def largest_of(array, first, length, CODE: tl.constexpr, WORKING: tl.constexpr):
    """The largest element of a line, as [1] float64. NaN is none."""
    lanes = tl.arange(0, LANES)[None, :]
    nothing = tl.full((1, LANES), float("-inf"), tl.float64)
    top = nothing
    at = length * 0
    while at < length:
        inside = at + lanes < length
        x = load(array + first + at, lanes, inside, CODE, WORKING, True).to(tl.float64)
        x = tl.where(inside, x, nothing)
        top = tl.where(x > top, x, top)
        at += LANES
    return tl.max(top, 1)


@triton.jit
def powers_of(array, first, at, end, top, table, CODE: tl.constexpr, WORKING: tl.constexpr):
    """exp of 64 elements of a line less its largest."""
    lanes = tl.arange(0, LANES)[None, :]
    x = load(array + first + at, lanes, at + lanes < end, CODE, WORKING, True).to(tl.float64)
    return exponential(x - top[:, None], table)


@triton.jit
def total_of(array, first, length, top, table, CODE: tl.constexpr, WORKING: tl.constexpr):
    """The sum of the powers of a line, as [1] float64: as of a tensor of its own."""
    lanes = tl.arange(0, LANES)[None, :]
    total = tl.zeros((1,), tl.float64)
    at = length * 0
    while at < length:
        end = tl.minimum(at + SUM_BLOCK, length)
        sums = tl.zeros((1, LANES), tl.float64)
        while at < end:
            power = powers_of(array, first, at, end, top, table, CODE, WORKING)
            sums += tl.where(at + lanes < end, power, 0.0)
            at += LANES
        total += added_pairwise(sums)
    return total


@triton.jit(do_not_specialize=["length"])
def importance_kernel(
    base,
    model,
    table,
    scores,
    length,
    BASE: tl.constexpr,
    MODEL: tl.constexpr,
    WORKING: tl.constexpr,
):
    """The scores of one line: |d| times the divergence of the line."""
    REAL: tl.constexpr = tl.float64 if WORKING == "F64" else tl.float32
    CODE: tl.constexpr = "F64" if WORKING == "F64" else "F32"
    lanes = tl.arange(0, LANES)[None, :]
    first = tl.program_id(0).to(tl.int64) * length
    softened = tl.load(table + SOFTENED)
    top_p = largest_of(model, first, length, MODEL, WORKING)
    top_q = largest_of(base, first, length, BASE, WORKING)
    total_p = total_of(model, first, length, top_p, table, MODEL, WORKING)
    total_q = total_of(base, first, length, top_q, table, BASE, WORKING)
    divergence = tl.zeros((1,), tl.float64)
    at = length * 0
    while at < length:
        end = tl.minimum(at + SUM_BLOCK, length)
        sums = tl.zeros((1, LANES), tl.float64)
        while at < end:
            p = powers_of(model, first, at, end, top_p, table, MODEL, WORKING) / total_p[:, None] + softened
            q = powers_of(base, first, at, end, top_q, table, BASE, WORKING) / total_q[:, None] + softened
            sums += tl.where(at + lanes < end, p * logarithm(p / q, table), 0.0)
            at += LANES
        divergence += added_pairwise(sums)
    factor = tl.where(divergence > 0, divergence, 0.0).to(REAL)[:, None]
    at = length * 0
    while at < length:
        inside = at + lanes < length
        b = load(base + first + at, lanes, inside, BASE, WORKING, True)
        x = load(model + first + at, lanes, inside, MODEL, WORKING, True)
        found = tl.abs(x - b) * factor
        found = tl.where(found == found, found, 0.0)
        tl.store(scores + first + at + lanes, narrow(found, CODE), mask=inside)
        at += LANES


@triton.jit(do_not_specialize=["start", "first_tile", "steps", "count"])
def note_kernel(
    scores,
    mask,
    notes,
    start,
    first_tile,
    steps,
    count,
    REAL: tl.constexpr,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Write 1 for the elements of some tiles whose score the mask keeps, else 0."""
    tile = first_tile + tl.program_id(0) * steps
    columns = tl.arange(0, COLUMNS)[None, :]
    rows = (tl.arange(0, ROWS) * COLUMNS)[:, None]
    places = rows + columns
    step = steps * 0
    while step < steps:
        first = (tile + step).to(tl.int64) * (ROWS * COLUMNS)
        inside = first + places < count
        score = widen(
            load_bits(scores + first, places, inside, MASKED),
            REAL,
            tl.float64 if REAL == "F64" else tl.float32,
        )
        index = start + first + rows
        kept = keeps(mask, places.to(tl.uint32), magnitude(score), index, columns, KIND, ALIGNED)
        tl.store(notes + first + places, kept.to(tl.uint32), mask=inside)
        step += 1


def variances(
    inputs: Sequence[torch.Tensor],
    codes: Sequence[str],
    working: str,
    storage_rounding: bool,
    scores: torch.Tensor,
) -> None:
    """The variance of the task vectors at each position, into ``scores``: uint32, or uint64 if ``working`` is F64.

    ``inputs`` are unsigned bits, the base first, their types in ``codes``.
    """
    over_tiles(
        variance_kernel,
        scores.numel(),
        tuple(inputs),
        scores,
        CODES=constants(codes),
        WORKING=working,
        STORAGE_ROUNDING=storage_rounding,
        N=len(inputs),
    )


def importances(
    base: torch.Tensor,
    model: torch.Tensor,
    codes: Sequence[str],
    working: str,
    length: int,
    table: torch.Tensor,
    scores: torch.Tensor,
) -> None:
    """|d| times the divergence of each line of ``length`` elements, into ``scores``, as of ``variances``.

    ``base`` and ``model`` are unsigned bits, their types in ``codes``. ``table``: float64, that of exponentials.py.
    """
    lines = scores.numel() // length
    if lines:
        importance_kernel[(lines,)](
            base,
            model,
            table,
            scores,
            length,
            BASE=codes[0],
            MODEL=codes[1],
            WORKING=working,
            **ONE_WARP,
        )


def note(
    scores: torch.Tensor, working: str, start: int, kind: int, mask: torch.Tensor, notes: torch.Tensor
) -> None:
    """Write to ``notes``, [count] uint32, 1 where the mask keeps a score, else 0.

    ``scores``: bits of the type of the arithmetic, which is ``working`` here; ``mask``: [ROW] int64, of a kind in
    masks.py.
    """
    over_tiles(
        note_kernel,
        scores.numel(),
        scores,
        mask,
        notes,
        start,
        REAL=working,
        KIND=kind,
        ALIGNED=start % COLUMNS.value == 0,
    )
