"""Philox 4x32-10 (Salmon et al., SC 2011): the random draws of elements, from keys and flat indices alone.

A draw is a number of 32 bits that is only compared with a bound. Its top byte, which decides but for one element in
256, is one of the 16 bytes of a block; the lower 24 bits are in a word of another stream. See step 9 of
docs/arithmetic.md.

Elements come in rows of eight neighbours, [rows, 8]. ``index``, [rows, 1], is the flat index of the first of each
row, and ``columns``, [1, 8], are 0 to 7. With ``ALIGNED`` all ``index`` are multiples of 8: a row then lies in one
block, and a thread that holds a row computes it once.
"""

import triton
import triton.language as tl


@triton.jit
def philox(key, counter, STREAM: tl.constexpr):
    """Four uint32 words for each 64-bit counter of a stream."""
    k0 = key.to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    c0 = counter.to(tl.uint32)
    c1 = (counter >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0) + STREAM
    c3 = tl.zeros_like(c0)
    for _ in tl.static_range(10):
        even = c0.to(tl.uint64) * 0xD2511F53
        odd = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (odd >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (even >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = odd.to(tl.uint32)
        c3 = even.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def chosen(words, number):
    """Of four words the one with a number, element by element. An index would move them out of registers."""
    lower = tl.where((number & 1) != 0, words[1], words[0])
    upper = tl.where((number & 1) != 0, words[3], words[2])
    return tl.where((number & 2) != 0, upper, lower)


@triton.jit
def top_bytes(key, index, columns, ALIGNED: tl.constexpr):
    """[rows, 8] of uint32: the draws' top bytes, in the highest eight bits; the others mean nothing."""
    if ALIGNED:
        words = philox(key, index >> 4, 0)
        second_half = (index & 8) != 0
        first = tl.where(second_half, words[2], words[0])
        second = tl.where(second_half, words[3], words[1])
        word = tl.where(columns < 4, first, second)
        byte = columns & 3
    else:
        place = index + columns
        word = chosen(philox(key, place >> 4, 0), (place >> 2) & 3)
        byte = (place & 3).to(tl.int32)
    return word << (24 - 8 * byte).to(tl.uint32)


@triton.jit
def lower_bits(key, index, columns, ALIGNED: tl.constexpr):
    """[rows, 8] of uint32: the lower 24 bits of the same draws."""
    if ALIGNED:
        first = chosen(philox(key, index >> 2, 1), columns & 3)
        second = chosen(philox(key, (index >> 2) + 1, 1), columns & 3)
        word = tl.where(columns < 4, first, second)
    else:
        place = index + columns
        word = chosen(philox(key, place >> 2, 1), place & 3)
    return word & 0xFFFFFF


@triton.jit
def draws(tops, near, among, key, index, columns, ALIGNED: tl.constexpr):
    """[rows, 8] of uint32: draws whose top bytes are ``tops``.

    They compare rightly with ``near``, a uint32 or one for each element, where ``among``; elsewhere they may be wrong.
    Lower bits are drawn only for tiles in which they decide for an element. ``among`` must come from values in memory:
    the compiler then gives the branch the layout of what was loaded.
    """
    result = tops
    distance = tl.where(among, tops ^ near, 0xFFFFFFFF)
    if tl.min(tl.min(distance, 1), 0) <= 0xFFFFFF:
        lower = lower_bits(key, index, columns, ALIGNED)
        result = tl.where(distance <= 0xFFFFFF, (tops & 0xFF000000) | lower, tops)
    return result
