"""Inner products of inputs and of task vectors: exact products, summed in float64 in an order that is fixed.

Of a whole tensor over blocks of 4096 elements as norms are (norms.py); of lines along the last dimension over the
part of each line in a block; of lines along the first dimension over blocks of whole rows, one running sum for each
line. Step 11 of docs/arithmetic.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from merge_engine.kernels.launching import INTERPRETED, ONE_WARP, constants, over_blocks
from merge_engine.kernels.norms import LANES, MOST_ABREAST, SUM_BLOCK, added_pairwise, lines_from
from merge_engine.kernels.numbers import load

WIDTH = 512 if INTERPRETED else 64
"""Neighbouring lines along the first dimension of a program."""


@triton.jit
def vectors_at(
    inputs,
    first,
    places,
    inside,
    CODES,
    WORKING: tl.constexpr,
    N: tl.constexpr,
    DELTAS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Elements of the N vectors in float64. Those of task vectors are rounded once, in the type of the arithmetic."""
    values = ()
    if DELTAS:
        base = load(inputs[0] + first, places, inside, CODES[0], WORKING, MASKED)
        for i in tl.static_range(N):
            x = load(inputs[i + 1] + first, places, inside, CODES[i + 1], WORKING, MASKED)
            values = values + ((x - base).to(tl.float64),)
    else:
        for i in tl.static_range(N):
            x = load(inputs[i] + first, places, inside, CODES[i], WORKING, MASKED)
            values = values + (x.to(tl.float64),)
    return values


@triton.jit
def with_products(sums, values, N: tl.constexpr):
    """The running sums of all pairs and the products of these elements, row by row of the matrix's upper triangle."""
    added = ()
    for i in tl.static_range(N):
        for k in tl.static_range(i, N):
            added = added + (sums[i * N - i * (i - 1) // 2 + k - i] + values[i] * values[k],)
    return added


@triton.jit
def zeros(shape: tl.constexpr, PAIRS: tl.constexpr):
    """A running sum for each pair."""
    sums = ()
    for _ in tl.static_range(PAIRS):
        sums = sums + (tl.zeros(shape, tl.float64),)
    return sums


@triton.jit(do_not_specialize=["first_block", "count"])
def gram_kernel(
    inputs,
    sums,
    first_block,
    count,
    CODES,
    WORKING: tl.constexpr,
    N: tl.constexpr,
    DELTAS: tl.constexpr,
    ABREAST: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The inner products of all pairs of N vectors over some blocks."""
    PAIRS: tl.constexpr = N * (N + 1) // 2
    block = (first_block + tl.program_id(0)).to(tl.int64) * ABREAST
    first = block * SUM_BLOCK
    of_program = tl.arange(0, ABREAST)
    places = (of_program * SUM_BLOCK)[:, None] + tl.arange(0, LANES)[None, :]
    products = zeros((ABREAST, LANES), PAIRS)
    lines = lines_from(first, count)
    line = lines * 0
    while line < lines:
        here = first + line * LANES
        inside = here + places < count
        values = vectors_at(inputs, here, places, inside, CODES, WORKING, N, DELTAS, MASKED)
        products = with_products(products, values, N)
        line += 1
    for pair in tl.static_range(PAIRS):
        tl.store(sums + (block + of_program) * PAIRS + pair, added_pairwise(products[pair]))


@triton.jit(do_not_specialize=["start", "length", "most", "count"])
def rows_kernel(
    inputs,
    sums,
    start,
    length,
    most,
    count,
    CODES,
    WORKING: tl.constexpr,
    N: tl.constexpr,
    DELTAS: tl.constexpr,
):
    """The inner products over one block, for each line of ``length`` neighbouring elements that it has some of."""
    PAIRS: tl.constexpr = N * (N + 1) // 2
    block = tl.program_id(0).to(tl.int64)
    first = block * SUM_BLOCK
    end = tl.minimum(first + SUM_BLOCK, count)
    row = sums + block * most * PAIRS + tl.arange(0, 1)
    places = tl.arange(0, LANES)[None, :]
    while first < end:
        last = tl.minimum(first + length - (start + first) % length, end)
        products = zeros((1, LANES), PAIRS)
        here = first
        while here < last:
            inside = here + places < last
            values = vectors_at(inputs, here, places, inside, CODES, WORKING, N, DELTAS, True)
            products = with_products(products, values, N)
            here += LANES
        for pair in tl.static_range(PAIRS):
            tl.store(row + pair, added_pairwise(products[pair]))
        row += PAIRS
        first = last


@triton.jit(do_not_specialize=["stride", "block_size", "count"])
def columns_kernel(
    inputs,
    sums,
    stride,
    block_size,
    count,
    CODES,
    WORKING: tl.constexpr,
    N: tl.constexpr,
    DELTAS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The inner products of some neighbouring lines along the first dimension over one block of rows."""
    PAIRS: tl.constexpr = N * (N + 1) // 2
    programs = tl.cdiv(stride, COLUMNS)
    block = (tl.program_id(0) // programs).to(tl.int64)
    columns = tl.program_id(0) % programs * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < stride
    here = block * block_size
    end = tl.minimum(here + block_size, count)
    products = zeros((COLUMNS,), PAIRS)
    while here < end:
        values = vectors_at(inputs, here, columns, inside, CODES, WORKING, N, DELTAS, True)
        products = with_products(products, values, N)
        here += stride
    for pair in tl.static_range(PAIRS):
        tl.store(sums + (block * stride + columns) * PAIRS + pair, products[pair], mask=inside)


def gram(
    inputs: Sequence[torch.Tensor],
    codes: Sequence[str],
    working: str,
    of_deltas: bool,
    start: int,
    line: tuple[int, int] | None,
    block: int,
    sums: torch.Tensor,
) -> None:
    """The inner products of all pairs of inputs (unsigned bits of types ``codes``), or of task vectors, into ``sums``.

    A column for each pair i <= j, row by row. ``sums`` is ``block_sums`` without a ``line`` (length, stride), and with
    one [blocks, lines of a block * pairs] zeros; blocks have ``block`` elements, and the chunk begins at element
    ``start``.
    """
    vectors = len(inputs) - of_deltas
    pairs = vectors * (vectors + 1) // 2
    count = inputs[0].numel()
    kind = {"CODES": constants(codes), "WORKING": working, "N": vectors, "DELTAS": of_deltas}
    if line is None:
        abreast = (
            MOST_ABREAST if INTERPRETED or pairs <= 6 else 2 if pairs <= 15 else 1
        )  # what fits registers
        over_blocks(
            gram_kernel,
            count,
            abreast * SUM_BLOCK.value,
            tuple(inputs),
            sums,
            ABREAST=abreast,
            options=ONE_WARP,
            **kind,
        )
        return
    length, stride = line
    blocks = triton.cdiv(count, block)
    if not blocks:
        return
    if stride == 1:
        most = sums.shape[1] // pairs
        rows_kernel[(blocks,)](tuple(inputs), sums, start, length, most, count, **kind, **ONE_WARP)
    else:
        grid = (blocks * triton.cdiv(stride, WIDTH),)
        columns_kernel[grid](tuple(inputs), sums, stride, block, count, COLUMNS=WIDTH, **kind, **ONE_WARP)
