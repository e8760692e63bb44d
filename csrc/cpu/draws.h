// The random draws of a tile, compared with bounds.
#pragma once

#include <algorithm>

#include "philox_lanes.h"
#include "tile_bits.h"

namespace merge_engine {
namespace ME_ISA {

constexpr int BLOCKS_AT_ONCE = (VECTOR_BYTES == 64 ? 8 : 4) * SLOTS;
constexpr int DRAW_ROOM = TILE + BLOCKS_AT_ONCE * DRAW_BLOCK;

// The top bytes of the draws of elements [index, index + count) of a tensor: where they begin in `room`. Whole vectors
// may be read.
static inline const uint8_t* draw_tile(const RoundKeys& keys, uint64_t index, int count, uint8_t (&room)[DRAW_ROOM]) {
    constexpr int VECTORS = BLOCKS_AT_ONCE / SLOTS;
    const int skipped = static_cast<int>(index % DRAW_BLOCK);
    const int blocks = (skipped + count + DRAW_BLOCK - 1) / DRAW_BLOCK;
    for (int at = 0; at < blocks; at += BLOCKS_AT_ONCE) {
        Slots counters[VECTORS];
        for (int v = 0; v < VECTORS; ++v) {
            counters[v] = block_numbers() + (index / DRAW_BLOCK + static_cast<uint64_t>(at + v * SLOTS));
        }
        SlotWords words[VECTORS];
        philox_slots<VECTORS>(keys, counters, words);
        for (int v = 0; v < VECTORS; ++v) store_blocks(words[v], room + (at + v * SLOTS) * DRAW_BLOCK);
    }
    return room + skipped;
}

// Sets of elements whose draws are below bounds. They may hold elements outside `among`.
class DrawnBelow {
  public:
    DrawnBelow(const RoundKeys& keys, uint64_t index, int count)
        : keys_(keys), index_(index), count_(count), bytes_(draw_tile(keys, index, count, room_)) {}

    // One bound for all.
    TileBits than(uint64_t bound, const TileBits& among) const {
        const Bytes top = Bytes{} + static_cast<uint8_t>(bound >> 24);
        return compare([&](int) { return top; }, [&](int) { return bound; }, among);
    }
    // A bound for each. `bounds` has whole vectors.
    TileBits than(const uint32_t* bounds, const TileBits& among) const {
        uint8_t tops[TILE];
        for (int j = 0; j < TILE; ++j) tops[j] = static_cast<uint8_t>(bounds[j] >> 24);
        return compare([&](int j) { return load<Bytes>(tops + j); }, [&](int j) { return bounds[j]; }, among);
    }

  private:
    template <class Tops, class Bounds>
    TileBits compare(Tops&& tops, Bounds&& bounds, const TileBits& among) const {
        TileBits below = {};
        for (int w = 0; 64 * w < count_; ++w) {
            uint64_t less = 0, equal = 0;
            for (int j = 0; j < 64; j += VECTOR_BYTES) {
                const Bytes drawn = load<Bytes>(bytes_ + 64 * w + j), top = tops(64 * w + j);
                less |= bits_less(drawn, top) << j;
                equal |= bits_equal(drawn, top) << j;
            }
            for (uint64_t rest = equal & among.word[w]; rest; rest &= rest - 1) {  // one in 256
                const int j = 64 * w + __builtin_ctzll(rest);
                const uint32_t lower = static_cast<uint32_t>(bounds(j)) & LOWER_DRAW;
                if (lower && lower_bits(keys_.key, index_ + static_cast<uint64_t>(j)) < lower) less |= rest & -rest;
            }
            below.word[w] = less;
        }
        if (count_ % 64) below.word[count_ / 64] &= (1ull << count_ % 64) - 1;
        return below;
    }

    const RoundKeys& keys_;
    uint64_t index_;
    int count_;
    uint8_t room_[DRAW_ROOM];
    const uint8_t* bytes_;
};

// The elements [index, index + count) of a tensor whose draws are below a bound, and maybe some outside `among`.
static inline TileBits drawn_below(uint64_t bound, const RoundKeys& keys, uint64_t index, int count,
                                   const TileBits& among) {
    if (bound == 0) return {};
    if (bound >= EVERY_DRAW) return first_bits(count);
    return DrawnBelow(keys, index, count).than(bound, among);
}

}  // namespace ME_ISA
}  // namespace merge_engine
