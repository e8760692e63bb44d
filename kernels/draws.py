"""Philox 4x32-10 (Salmon et al., SC 2011): the random draw of an element, from its key and flat index alone.

Elements go in groups of 64 that share 16 counters: element i has word (i / 16) % 4 of counter
(i / 64) * 16 + i % 16. Whole groups are drawn, so that no word is computed in vain.
"""

import triton
import triton.language as tl

GROUP = tl.constexpr(64)


@triton.jit
def philox(key, counter):
    """Four uint32 words for each 64-bit counter."""
    k0 = key.to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    c0 = counter.to(tl.uint32)
    c1 = (counter >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0)
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
def draw_groups(key, first):
    """The draws of whole groups, [groups, 64] of uint32, from the flat index that each begins with, [groups, 1]."""
    counter = (first // 4 + tl.arange(0, 16)[None, :]).to(tl.uint64)
    w0, w1, w2, w3 = philox(key, counter)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # groups, 16, high bit, low bit of the word's number
    return tl.reshape(tl.permute(words, (0, 2, 3, 1)), (first.shape[0], GROUP))
