// The random draws of a tile.
#pragma once

#include "philox_lanes.h"
#include "tile.h"

namespace merge_engine {
namespace ME_ISA {

// The random draws of elements [index, index + count) of a tensor.
static inline void draw_tile(uint64_t key, uint64_t index, int count, uint32_t* ME_RESTRICT draws) {
    static_assert(DRAW_GROUP == 4 * PHILOX_LANES, "a group is one call");
    const int skipped = static_cast<int>(index % DRAW_GROUP);
    uint32_t aligned[TILE + DRAW_GROUP];
    for (int at = 0; at < skipped + count; at += DRAW_GROUP) {
        const uint64_t counter = (index - static_cast<uint64_t>(skipped) + static_cast<uint64_t>(at)) / 4;
        uint32_t low[PHILOX_LANES], high[PHILOX_LANES], words[4][PHILOX_LANES];
        for (int lane = 0; lane < PHILOX_LANES; ++lane) {
            low[lane] = static_cast<uint32_t>(counter) + static_cast<uint32_t>(lane);  // a multiple of 16, plus
            high[lane] = static_cast<uint32_t>(counter >> 32);
        }
        philox_lanes(key, low, high, words);
        std::memcpy(aligned + at, words, sizeof(words));
    }
    std::memcpy(draws, aligned + skipped, static_cast<size_t>(count) * sizeof(uint32_t));
}

// The random draws of the elements at index + offsets[0], ..., in whole groups of PHILOX_LANES.
static inline void draw_some(uint64_t key, uint64_t index, const int* ME_RESTRICT offsets, int count,
                             uint32_t* ME_RESTRICT draws) {
    for (int at = 0; at < count; at += PHILOX_LANES) {
        uint32_t low[PHILOX_LANES], high[PHILOX_LANES], word[PHILOX_LANES], words[4][PHILOX_LANES];
        for (int lane = 0; lane < PHILOX_LANES; ++lane) {
            const uint64_t element = index + static_cast<uint64_t>(offsets[at + lane]);
            const uint64_t counter = element / DRAW_GROUP * PHILOX_LANES + element % PHILOX_LANES;
            low[lane] = static_cast<uint32_t>(counter);
            high[lane] = static_cast<uint32_t>(counter >> 32);
            word[lane] = static_cast<uint32_t>(element) / PHILOX_LANES % 4;
        }
        philox_lanes(key, low, high, words);
        for (int lane = 0; lane < PHILOX_LANES; ++lane) {
            const uint32_t lower = word[lane] == 0 ? words[0][lane] : words[1][lane];
            const uint32_t upper = word[lane] == 2 ? words[2][lane] : words[3][lane];
            draws[at + lane] = word[lane] < 2 ? lower : upper;
        }
    }
}

}  // namespace ME_ISA
}  // namespace merge_engine
