"""Philox 4x32-10 (Salmon et al., SC 2011): the random draws of elements, from keys and flat indices alone.

A draw is a number of 32 bits that is only compared with a bound. Its top byte, which decides but for one element in
256, is one of the 16 bytes of a block; the lower 24 bits are in a word of another stream. See step 9 of
docs/arithmetic.md. Groups of 64 elements are drawn together, so that no word is computed in vain.
"""

import triton
import triton.language as tl

GROUP = tl.constexpr(64)


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
def words_of_blocks(key, first, BLOCKS: tl.constexpr, STREAM: tl.constexpr):
    """The words of so many blocks from block ``first``, [groups, 1], on: [groups, 4 * BLOCKS] of uint32, in order."""
    counter = (first + tl.arange(0, BLOCKS)[None, :]).to(tl.uint64)
    w0, w1, w2, w3 = philox(key, counter, STREAM)
    words = tl.join(
        tl.join(w0, w2), tl.join(w1, w3)
    )  # groups, blocks, high bit, low bit of the word's number
    return tl.reshape(words, (first.shape[0], 4 * BLOCKS))


@triton.jit
def top_bytes(key, first):
    """The top bytes of whole groups' draws, [groups, 64] of uint32, from flat index ``first``, [groups, 1], on."""
    words = words_of_blocks(key, first // 16, 4, 0)
    shifts = (8 * tl.arange(0, 4)).to(tl.uint32)[None, None, :]
    return tl.reshape((words[:, :, None] >> shifts) & 0xFF, (first.shape[0], GROUP))


@triton.jit
def lower_bits(key, first):
    """The lower 24 bits of the same draws."""
    return words_of_blocks(key, first // 4, 16, 1) & 0xFFFFFF


@triton.jit
def below(drawn, key, first, bound, among):
    """Which elements ``among`` some have draws below a bound, or each below its own; others may be wrong.

    ``drawn`` are the top bytes of their groups' draws, all in the shape of ``among``. Lower bits are
    drawn only for programs in which they decide for an element.
    """
    top = (bound >> 24).to(tl.uint32)
    result = drawn < top
    undecided = among & (drawn == top)
    if tl.max(tl.ravel(undecided.to(tl.int32)), 0) != 0:
        lower = tl.reshape(lower_bits(key, first), among.shape)
        result = result | (undecided & (lower < (bound & 0xFFFFFF).to(tl.uint32)))
    return result
