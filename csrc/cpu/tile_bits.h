// Sets of a tile's elements, a bit each.
#pragma once

#include "bits.h"
#include "lanes.h"
#include "tile.h"

namespace merge_engine {
namespace ME_ISA {

struct TileBits {
    static constexpr int WORDS = TILE / 64;
    uint64_t word[WORDS];
    uint32_t padding = 0;  // lanes() may read it

    // The bits of elements j to j + LANES.
    ME_INLINE Truth lanes(int j) const {
        uint32_t bits;
        std::memcpy(&bits, reinterpret_cast<const char*>(word) + static_cast<size_t>(j) / 8, sizeof(bits));
        return lanes_of_bits(LANES < 8 ? bits >> (j % 8) : bits);
    }

    ME_INLINE void set_lanes(int j, Truth truth) {
        const uint64_t bits = bits_of_lanes(truth);
        if constexpr (LANES < 8) {
            word[j / 64] = (j % 64 ? word[j / 64] : 0) | bits << j % 64;
        } else {
            std::memcpy(reinterpret_cast<char*>(word) + static_cast<size_t>(j) / 8, &bits, LANES / 8);
        }
    }

    ME_INLINE bool empty() const {
        uint64_t any = 0;
        for (const uint64_t w : word) any |= w;
        return any == 0;
    }
    int size() const {
        int bits = 0;
        for (const uint64_t w : word) bits += __builtin_popcountll(w);
        return bits;
    }
};

// The elements for which truth holds: truth(j) covers elements j to j + LANES. Beyond `count` no bit is set.
template <class F>
static ME_INLINE TileBits bits_where(int count, F&& truth) {
    TileBits bits = {};
    for (int at = 0; at < count; at += 64) {
        uint64_t word = 0;
#pragma GCC unroll 16
        for (int j = 0; j < 64; j += LANES) word |= bits_of_lanes(truth(at + j)) << j;
        bits.word[at / 64] = word;
    }
    if (count % 64) bits.word[count / 64] &= (1ull << count % 64) - 1;
    return bits;
}
static ME_INLINE TileBits first_bits(int count) {
    TileBits bits;
    for (int w = 0; w < TileBits::WORDS; ++w) {
        const int within = count - 64 * w;
        bits.word[w] = within >= 64 ? ~0ull : within > 0 ? (1ull << within) - 1 : 0;
    }
    return bits;
}

// The elements of the tile that begins with the element `first` of a chunk, one of whose elements each bit stands for.
static ME_INLINE TileBits noted(const uint64_t* notes, uint64_t first) {
    TileBits bits;
    std::memcpy(bits.word, notes + first / 64, sizeof(bits.word));
    return bits;
}
static ME_INLINE void note(const TileBits& bits, uint64_t first, uint64_t* notes) {
    std::memcpy(notes + first / 64, bits.word, sizeof(bits.word));
}

// Writes the places of the bits in order, and returns how many there are. A processor could not predict how many
// a part has, so every part writes as many places, some of them meaningless.
constexpr int MORE_PLACES = 16;
template <int N>
static inline int list_places(const uint64_t (&words)[N], uint32_t (&places)[64 * N + MORE_PLACES]) {
    int listed = 0;
#if defined(__AVX512F__)
    for (int at = 0; at < 64 * N; at += LANES) {
        const Truth those = lanes_of_bits(static_cast<uint32_t>(words[at / 64] >> at % 64));
        const Words numbers = lane_numbers() + static_cast<uint32_t>(at);
        listed += compress(those, (Ints)numbers, reinterpret_cast<int32_t*>(places + listed));
    }
#else
    using Eight = uint32_t __attribute__((vector_size(32)));
    static constexpr PlacesOfByte of_byte;
    for (int at = 0; at < 64 * N; at += 8) {
        const uint64_t byte = words[at / 64] >> at % 64 & 0xFF;
        store(places + listed, __builtin_convertvector(load<Places>(of_byte.places[byte]), Eight) + static_cast<uint32_t>(at));
        listed += of_byte.size[byte];
    }
#endif
    return listed;
}

}  // namespace ME_ISA
}  // namespace merge_engine
