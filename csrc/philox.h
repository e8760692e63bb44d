// Random draws of elements: Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//
// A counter-based generator: the draw of an element depends on its key and flat index alone, hence not on chunk,
// device, thread or order. A draw is a number of 32 bits that is only ever compared with a bound. Its top byte decides
// but for one element in 256; so the top bytes come from one stream of blocks, 16 elements to a block, and the lower 24
// bits from another, for those few. Step 9 of docs/arithmetic.md.
#pragma once

#include "numeric.h"

namespace merge_engine {

constexpr int DRAW_BLOCK = 16;           // elements whose top bytes are in one block
constexpr uint32_t LOWER_DRAW = 0xFFFFFF;  // the bits of a draw below its top byte
constexpr uint64_t EVERY_DRAW = uint64_t{1} << 32;

struct PhiloxWords {
    uint32_t word[4];

    ME_INLINE uint32_t at(uint64_t n) const {  // comparisons instead of an index, so that all stay in registers
        const uint32_t lower = n & 1 ? word[1] : word[0], upper = n & 1 ? word[3] : word[2];
        return n & 2 ? upper : lower;
    }
};

// Both halves of a product.
struct WideProduct {
    uint32_t low, high;

    ME_INLINE WideProduct(uint32_t x, uint32_t y) {
#ifdef __CUDA_ARCH__
        // Of a product of 64-bit integers nvcc adds nothing to the upper half, in one more instruction.
        asm("{.reg .b64 product;\n\tmul.wide.u32 product, %2, %3;\n\tmov.b64 {%0, %1}, product;}"
            : "=r"(low), "=r"(high)
            : "r"(x), "r"(y));
#else
        const uint64_t product = uint64_t{x} * y;
        low = static_cast<uint32_t>(product), high = static_cast<uint32_t>(product >> 32);
#endif
    }
};

enum class DrawStream : uint32_t { TopBytes = 0, LowerBits = 1 };

struct RoundKey {
    uint32_t first, second;
};

constexpr int PHILOX_ROUNDS = 10;

ME_INLINE RoundKey round_key(uint64_t key, int round) {
    const uint32_t turn = static_cast<uint32_t>(round);
    return {static_cast<uint32_t>(key) + turn * 0x9E3779B9u, static_cast<uint32_t>(key >> 32) + turn * 0xBB67AE85u};
}

// `key_of` gives the key of a round.
template <class KeyOf>
ME_INLINE PhiloxWords philox(KeyOf&& key_of, uint64_t counter, DrawStream stream) {
    uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
    uint32_t c2 = static_cast<uint32_t>(stream), c3 = 0;
    for (int round = 0; round < PHILOX_ROUNDS; ++round) {
        const RoundKey key = key_of(round);
        const WideProduct even(0xD2511F53u, c0), odd(0xCD9E8D57u, c2);
        c0 = odd.high ^ c1 ^ key.first;
        c2 = even.high ^ c3 ^ key.second;
        c1 = odd.low;
        c3 = even.low;
    }
    return {{c0, c1, c2, c3}};
}

ME_INLINE PhiloxWords philox(uint64_t key, uint64_t counter, DrawStream stream) {
    return philox([key](int round) { return round_key(key, round); }, counter, stream);
}

// The top byte of an element's draw, from the block of its neighbours.
ME_INLINE uint32_t top_byte(const PhiloxWords& block, uint64_t index) {
    return block.at(index % DRAW_BLOCK / 4) >> (8 * (index % 4)) & 0xFF;
}
ME_INLINE PhiloxWords top_bytes(uint64_t key, uint64_t index) {
    return philox(key, index / DRAW_BLOCK, DrawStream::TopBytes);
}
// The other 24 bits.
ME_INLINE uint32_t lower_bits(uint64_t key, uint64_t index) {
    return philox(key, index / 4, DrawStream::LowerBits).at(index % 4) & LOWER_DRAW;
}

// Whether the draw whose top byte is given is below a bound. The lower bits are looked at only when they decide.
ME_INLINE bool is_drawn_below(uint64_t bound, uint32_t top, uint64_t key, uint64_t index) {
    const uint32_t bound_top = static_cast<uint32_t>(bound >> 24);  // 256 where all are below
    if (top != bound_top) return top < bound_top;
    const uint32_t lower = static_cast<uint32_t>(bound) & LOWER_DRAW;
    return lower != 0 && lower_bits(key, index) < lower;
}

}  // namespace merge_engine
