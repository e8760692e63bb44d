"""DELLA's keep probabilities: magnitudes ranked within each line of a tensor.

    P = (density - epsilon) + 2 * epsilon * (mean rank scaled to 0..1)        threshold = floor(2^32 * P)

Step 9 of docs/arithmetic.md. Keys are gathered line by line and sorted by torch; the number of smaller and of equal
ones, and with them the mean rank, follows from two binary searches. Some lines at a time bound the memory for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from merge_engine.kernels.launching import BLOCK, over_blocks
from merge_engine.kernels.numbers import load, magnitude_key

AT_A_TIME = 1 << 22  # elements, unless a line has more


@triton.jit
def element_of(position, length, stride, IN_ORDER: tl.constexpr):
    """The place in memory of the element at a position, counted line after line.

    ``IN_ORDER`` says that the elements of a line are neighbours, as in matrices: then it is the position.
    """
    if IN_ORDER:
        element = position
    else:
        line = position // length
        element = (line // stride) * (length * stride) + line % stride + (position % length) * stride
    return element


@triton.jit(do_not_specialize=["length", "stride", "first", "first_tile", "count"])
def keys_kernel(
    base,
    model,
    keys,
    length,
    stride,
    first,
    first_tile,
    count,
    BASE: tl.constexpr,
    MODEL: tl.constexpr,
    WORKING: tl.constexpr,
    IN_ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Magnitude keys of ``count`` elements in the order of lines, from position ``first``."""
    offsets = (first_tile + tl.program_id(0)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    places = element_of(first + offsets, length, stride, IN_ORDER)
    b = load(base, places, inside, BASE, WORKING, MASKED)
    x = load(model, places, inside, MODEL, WORKING, MASKED)
    tl.store(keys + offsets, magnitude_key(x - b, WORKING), mask=inside)


@triton.jit
def count_below(lines, begin, length, keys, inside, OR_EQUAL: tl.constexpr):
    """How many keys of its own sorted line each key exceeds (or equals): a binary search."""
    low = tl.zeros_like(begin)
    high = low + length
    rest = length.to(tl.int64)
    while rest > 0:
        middle = (low + high) // 2
        open_ = low < high
        there = tl.load(lines + begin + middle, mask=inside & open_, other=0)
        if OR_EQUAL:
            passes = there <= keys
        else:
            passes = there < keys
        low = tl.where(open_ & passes, middle + 1, low)
        high = tl.where(open_ & (passes == 0), middle, high)
        rest = rest // 2
    return low


@triton.jit(do_not_specialize=["length", "stride", "first", "first_tile", "count"])
def thresholds_kernel(
    keys,
    lines,
    numbers,
    thresholds,
    length,
    stride,
    first,
    first_tile,
    count,
    IN_ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """floor(2^32 * P) of every element, at its place in memory. ``numbers``: density - epsilon, 2 * epsilon."""
    offsets = (first_tile + tl.program_id(0)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    key = tl.load(keys + offsets, mask=inside, other=0)
    begin = offsets // length * length
    smaller = count_below(lines, begin, length, key, inside, False)
    not_larger = count_below(lines, begin, length, key, inside, True)
    twice_rank = (smaller + not_larger - 1).to(tl.float64)
    highest = (2 * tl.maximum(length.to(tl.int64) - 1, 1) + tl.zeros_like(offsets)).to(tl.float64)
    scaled = tl.where(length > 1, twice_rank / highest, 0.5)
    probability = tl.load(numbers) + tl.load(numbers + 1) * scaled
    # Rounding may lift a probability to exactly 1.
    threshold = tl.minimum((probability * 4294967296.0).to(tl.int64), 0xFFFFFFFF).to(tl.uint32)
    places = element_of(first + offsets, length, stride, IN_ORDER)
    tl.store(thresholds + places, threshold, mask=inside)


def rank_thresholds(
    base: torch.Tensor,
    model: torch.Tensor,
    codes: Sequence[str],
    working: str,
    length: int,
    stride: int,
    numbers: torch.Tensor,
    thresholds: torch.Tensor,
) -> None:
    """The threshold of every element, below which its draw must be for it to stay.

    Inputs are unsigned bits of whole lines of ``length`` elements, ``stride`` apart, their types in ``codes`` (base,
    model). ``numbers``: float64, density - epsilon and 2 * epsilon. ``thresholds``: uint32, written. Takes
    memory for about 2^22 keys, sorted and unsorted, with torch's indices.
    """
    count = base.numel()
    key_dtype = {"F64": torch.int64, "F32": torch.int32}.get(working, torch.int16)
    step = max(AT_A_TIME // length, 1) * length
    for first in range(0, count, step):
        some = min(step, count - first)
        keys = torch.empty(some, dtype=key_dtype, device=base.device)
        over_blocks(
            keys_kernel,
            some,
            BLOCK,
            base,
            model,
            keys,
            length,
            stride,
            first,
            BASE=codes[0],
            MODEL=codes[1],
            WORKING=working,
            IN_ORDER=stride == 1,
            BLOCK=BLOCK,
        )
        lines = torch.sort(keys.view(-1, length), dim=1).values
        over_blocks(
            thresholds_kernel,
            some,
            BLOCK,
            keys,
            lines,
            numbers,
            thresholds,
            length,
            stride,
            first,
            IN_ORDER=stride == 1,
            BLOCK=BLOCK,
        )
