"""Exponentials and logarithms of operations that IEEE defines, as in csrc/exponentials.h.

Step 24 of docs/arithmetic.md. Their constants come in a table: those of a kernel's text are not always float64.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

EXP_LAST = tl.constexpr(13)
LOG = tl.constexpr(14)
LOG_LAST = tl.constexpr(24)
LOG2_E = tl.constexpr(25)
LN2_HIGH = tl.constexpr(26)
LN2_LOW = tl.constexpr(27)
SOFTENED = tl.constexpr(28)
TABLE = (
    *(1.0 / math.factorial(k) for k in range(14)),
    *(1.0 / (2 * k + 1) for k in range(11)),
    1.4426950408889634,
    0.6931471803691238,
    1.9082149292705877e-10,
    1e-8,
)
"""The terms of both series and the constants above."""


@triton.jit
def exponential(x, table):
    """exp of float64 that is at most 0."""
    magic = 6755399441055744.0  # 1.5 * 2^52: a sum with it has the nearest whole number in its last bits
    shifted = x * tl.load(table + LOG2_E) + magic
    whole = shifted - magic
    rest = (x - whole * tl.load(table + LN2_HIGH)) - whole * tl.load(table + LN2_LOW)
    total = rest * 0.0 + tl.load(table + EXP_LAST)
    for k in tl.static_range(EXP_LAST):
        total = total * rest + tl.load(table + EXP_LAST - 1 - k)
    scaled = total.to(tl.int64, bitcast=True) + (shifted.to(tl.int64, bitcast=True) << 52)
    found = tl.where(x < -700.0, 0.0, scaled.to(tl.float64, bitcast=True))
    return tl.where(x == x, found, x)


@triton.jit
def logarithm(x, table):
    """log of positive normal float64."""
    bits = x.to(tl.int64, bitcast=True)
    exponent = (bits - 0x3FE6A09E667F3BCD) >> 52  # x = 2^exponent * m with m from sqrt(1/2) to sqrt(2)
    above_one = (bits - (exponent << 52)).to(tl.float64, bitcast=True) - 1.0
    ratio = above_one / (above_one + 2.0)
    square = ratio * ratio
    total = square * 0.0 + tl.load(table + LOG_LAST)
    for k in tl.static_range(LOG_LAST - LOG):
        total = total * square + tl.load(table + LOG_LAST - 1 - k)
    whole = exponent.to(tl.float64)
    low = whole * tl.load(table + LN2_LOW) + 2.0 * ratio * total
    return tl.where(x == x, whole * tl.load(table + LN2_HIGH) + low, x)
