// The random draws of a tile.
#pragma once

#include "philox_lanes.h"
#include "tile.h"

namespace merge_engine {
namespace ME_ISA {

// The words of even and odd counters, in turn.
static ME_INLINE Words interleaved(Slots even, Slots odd) {
    return (Words)((even & 0xFFFFFFFFu) | odd << 32);
}

constexpr int GROUP_COUNTERS = DRAW_GROUP / 4;
constexpr int DRAW_ROOM = TILE + 2 * DRAW_GROUP;
constexpr int VECTORS = VECTOR_BYTES == 64 ? 4 : 2;  // of counters, that fit the registers

// The random draws of elements [index, index + count) of a tensor: where they begin in `room`.
static inline const uint32_t* draw_tile(const RoundKeys& keys, uint64_t index, int count, uint32_t (&room)[DRAW_ROOM]) {
    const int skipped = static_cast<int>(index % DRAW_GROUP);
    const int counters = (skipped + count + DRAW_GROUP - 1) / DRAW_GROUP * GROUP_COUNTERS;
    Slots first;
    for (int slot = 0; slot < SLOTS; ++slot) first[slot] = static_cast<uint64_t>(2 * slot);
    first += index / DRAW_GROUP * GROUP_COUNTERS;
    for (int at = 0; at < counters; at += VECTORS * SLOTS) {
        Slots counter[VECTORS];
        for (int v = 0; v < VECTORS; ++v) counter[v] = first + static_cast<uint64_t>(at + v / 2 * 2 * SLOTS + v % 2);
        SlotWords words[VECTORS];
        philox_slots<VECTORS>(keys, counter, words);
        for (int v = 0; v < VECTORS; v += 2) {
            const int counted = at + v * SLOTS;
            uint32_t* draws = room + counted / GROUP_COUNTERS * DRAW_GROUP + counted % GROUP_COUNTERS;
            for (int word = 0; word < 4; ++word) {
                store(draws + word * GROUP_COUNTERS, interleaved(words[v].word[word], words[v + 1].word[word]));
            }
        }
    }
    return room + skipped;
}

// The random draws of the elements at index + places[0], ..., in whole vectors: `places` and `draws` have room for one
// more than `count` needs.
static inline void draw_some(const RoundKeys& keys, uint64_t index, const uint32_t* places, int count,
                             uint32_t* draws) {
    constexpr uint64_t COUNTERS = GROUP_COUNTERS;
    for (int at = 0; at < count; at += VECTORS / 2 * LANES) {
        Slots element[VECTORS], counter[VECTORS], drawn[VECTORS];
        for (int n = 0; n < VECTORS; n += 2) {
            const Slots pair = load<Slots>(places + at + n / 2 * LANES);
            element[n] = index + (pair & 0xFFFFFFFFu);
            element[n + 1] = index + (pair >> 32);
        }
        for (int n = 0; n < VECTORS; ++n) counter[n] = element[n] / DRAW_GROUP * COUNTERS + element[n] % COUNTERS;
        SlotWords words[VECTORS];
        philox_slots<VECTORS>(keys, counter, words);
        for (int n = 0; n < VECTORS; ++n) {
            const Slots* word = words[n].word;
            const auto second = (element[n] & COUNTERS) != 0, upper = (element[n] & 2 * COUNTERS) != 0;
            drawn[n] = upper ? (second ? word[3] : word[2]) : (second ? word[1] : word[0]);
        }
        for (int n = 0; n < VECTORS; n += 2) store(draws + at + n / 2 * LANES, interleaved(drawn[n], drawn[n + 1]));
    }
}

}  // namespace ME_ISA
}  // namespace merge_engine
