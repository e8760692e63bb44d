"""How kernels are launched: a program's elements, full tiles without a mask, options that keep the arithmetic.

Fixed sizes instead of tuning: each kernel reads every element once, and memory decides how long that takes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels are interpreted on the CPU. Triton reads this variable when it sees a kernel, so set it before."""

COLUMNS = tl.constexpr(8)
"""Neighbours of a thread: 16 bytes of a 16-bit type, and half of what a block of random draws serves."""

ROWS = 512 if INTERPRETED else 32
"""Rows of neighbours in a tile. Compiled: one for each thread of a warp. Interpreted: many take as long as few."""

TILE = ROWS * COLUMNS.value
MOST_STEPS = 3 if INTERPRETED else 8
"""Tiles of a program, one after the other: it adds to counts in memory once for all of them."""

WORTH_STEPS = 1 if INTERPRETED else 4096
"""Programs that fill a GPU. A tensor with fewer tiles than that is not merged in steps."""

BLOCK = 4096 if INTERPRETED else 2048
"""Elements of a program of eight warps."""

OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
"""A fused multiply-add rounds once where docs/arithmetic.md rounds twice."""

ONE_WARP = {**OPTIONS, "num_warps": 1}
"""A warp that works alone waits for no other, and a branch that few elements need is taken by few."""


def constants(values: Sequence[Any]) -> tuple[Any, ...]:
    """A tuple whose elements are constants to a kernel, one by one: they need no annotation in its signature."""
    return tuple(tl.constexpr(value) for value in values)


def over_tiles(
    kernel: Any, count: int, *arguments: Any, most_steps: int = MOST_STEPS, **constants: Any
) -> None:
    """Launch programs of one warp for the tiles of ``count`` elements.

    What does not fill the steps of a program, and the last, partial tile, are a launch of their own, because a mask
    would keep the loads of all from being vectorised. The kernel is given ``first_tile``, ``steps`` and ``count`` after
    ``arguments``, and ``ROWS`` and ``MASKED``: program p takes ``steps`` tiles from ``first_tile + p * steps`` on.
    """
    full = count // TILE
    steps = min(max(full // WORTH_STEPS, 1), most_steps)
    whole = full // steps * steps
    if whole:
        grid = (whole // steps,)
        kernel[grid](*arguments, 0, steps, count, **constants, ROWS=ROWS, MASKED=False, **ONE_WARP)
    if count > whole * TILE:
        grid = (triton.cdiv(count, TILE) - whole,)
        kernel[grid](*arguments, whole, 1, count, **constants, ROWS=ROWS, MASKED=True, **ONE_WARP)


def over_blocks(
    kernel: Any, count: int, block: int, *arguments: Any, options: dict[str, Any] = OPTIONS, **constants: Any
) -> None:
    """Launch a program for each block of ``count`` elements; the last, partial one is a launch of its own as well.

    The kernel is given the first block and the count after ``arguments``, and ``MASKED``.
    """
    full, rest = divmod(count, block)
    if full:
        kernel[(full,)](*arguments, 0, count, **constants, MASKED=False, **options)
    if rest:
        kernel[(1,)](*arguments, full, count, **constants, MASKED=True, **options)
