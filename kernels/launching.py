"""How kernels are launched: tiles of a fixed size, the full ones without a mask, and options that keep the arithmetic.

Fixed sizes instead of tuning: each kernel reads every element once, and memory decides how long that takes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels are interpreted on the CPU. Triton reads this variable when it sees a kernel, so set it before."""

TILE = 4096 if INTERPRETED else 2048
"""Elements of a program. Compiled: eight for each of 256 threads, 16 bytes of a 16-bit type."""

OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
"""A fused multiply-add rounds once where docs/arithmetic.md rounds twice."""


def constants(values: Sequence[Any]) -> tuple[Any, ...]:
    """A tuple whose elements are constants to a kernel, one by one: they need no annotation in its signature."""
    return tuple(tl.constexpr(value) for value in values)


def over_tiles(kernel: Any, count: int, tile: int, *arguments: Any, **constants: Any) -> None:
    """Launch a program for each tile of ``count`` elements.

    The last, partial one is a launch of its own, because a mask would keep the loads of all from being vectorised.
    The kernel is given the first tile and the count after ``arguments``, and ``MASKED``.
    """
    full, rest = divmod(count, tile)
    if full:
        kernel[(full,)](*arguments, 0, count, **constants, MASKED=False, **OPTIONS)
    if rest:
        kernel[(1,)](*arguments, full, count, **constants, MASKED=True, **OPTIONS)
