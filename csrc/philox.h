// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//
// A counter-based generator: the draw of an element depends on its key and flat index alone, hence not
// on chunk, device, thread or order. Elements go in groups of 64 that share 16 counters: element i uses
// word (i / 16) % 4 of counter (i / 64) * 16 + i % 16, so that a vector of lanes yields four vectors of
// neighbours.
#pragma once

#include "numeric.h"

namespace merge_engine {

constexpr int DRAW_GROUP = 64;

struct PhiloxWords {
    uint32_t word[4];
};

ME_INLINE PhiloxWords philox(uint64_t key, uint64_t counter) {
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
    uint32_t c2 = 0, c3 = 0;
    for (int round = 0; round < 10; ++round) {
        const uint64_t even = static_cast<uint64_t>(0xD2511F53u) * c0;
        const uint64_t odd = static_cast<uint64_t>(0xCD9E8D57u) * c2;
        const uint32_t next0 = static_cast<uint32_t>(odd >> 32) ^ c1 ^ k0;
        const uint32_t next2 = static_cast<uint32_t>(even >> 32) ^ c3 ^ k1;
        c1 = static_cast<uint32_t>(odd);
        c3 = static_cast<uint32_t>(even);
        c0 = next0;
        c2 = next2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// The draw of one element. The comparisons instead of an index let a loop over this be vectorised.
ME_INLINE uint32_t philox_draw(uint64_t key, uint64_t index) {
    const PhiloxWords words = philox(key, index / DRAW_GROUP * (DRAW_GROUP / 4) + index % (DRAW_GROUP / 4));
    const uint64_t word = index / (DRAW_GROUP / 4) % 4;
    const uint32_t lower = word == 0 ? words.word[0] : words.word[1];
    const uint32_t upper = word == 2 ? words.word[2] : words.word[3];
    return word < 2 ? lower : upper;
}

}  // namespace merge_engine
