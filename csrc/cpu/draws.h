// The random draws of a tile.
#pragma once

#include <algorithm>

#include "philox_lanes.h"
#include "tile_bits.h"

namespace merge_engine {
namespace ME_ISA {

// The words of even and odd counters, in turn.
static ME_INLINE Words interleaved(Slots even, Slots odd) {
    return (Words)((even & 0xFFFFFFFFu) | odd << 32);
}

constexpr int GROUP_COUNTERS = DRAW_GROUP / 4;
constexpr int DRAW_ROOM = TILE + 4 * DRAW_GROUP;

// The random draws of elements [index, index + count) of a tensor: where they begin in `room`.
static inline const uint32_t* draw_tile(const RoundKeys& keys, uint64_t index, int count, uint32_t (&room)[DRAW_ROOM]) {
    constexpr int VECTORS = VECTOR_BYTES == 64 ? 8 : 4;
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

// A range of draws that is not empty, for every lane.
class DrawRange {
  public:
    explicit DrawRange(const Range& range)
        : first_(Words{} + static_cast<uint32_t>(range.first)),
          span_(Words{} + static_cast<uint32_t>(std::min<uint64_t>(range.last, 0xFFFFFFFFu) - range.first)) {}

    ME_INLINE Truth holds(Words draws) const { return static_cast<Truth>(~less(span_, draws - first_)); }

  private:
    Words first_, span_;
};

// The places of a byte's bits, lowest first, and how many there are.
using Places = uint16_t __attribute__((vector_size(16)));
struct PlacesOfByte {
    alignas(16) uint16_t places[256][8] = {};
    uint8_t size[256] = {};

    constexpr PlacesOfByte() {
        for (uint32_t bits = 0; bits < 256; ++bits) {
            for (uint16_t bit = 0; bit < 8; ++bit) {
                if (bits >> bit & 1) places[bits][size[bits]++] = bit;
            }
        }
    }
};

// Of a tile's counters those that a set of its elements needs: element j of a group shares its counter with j + 16,
// j + 32 and j + 48.
class NeededCounters {
  public:
    static constexpr int MOST = TILE / 4, WORDS = MOST / 64;

    explicit NeededCounters(const TileBits& set) {
        static constexpr PlacesOfByte of_byte;
        uint64_t found = 0;
        for (int w = 0; w < WORDS; ++w) {
            uint64_t needed = 0;
            for (int g = 0; g < 4; ++g) {
                const uint64_t group = set.word[4 * w + g], halves = group | group >> 32;
                needed |= ((halves | halves >> 16) & 0xFFFF) << 16 * g;
            }
            needed_[w] = needed;
#pragma GCC unroll 8
            for (int at = 64 * w; at < 64 * w + 64; at += 8, needed >>= 8) {
                store(list_ + found, load<Places>(of_byte.places[needed & 0xFF]) + static_cast<uint16_t>(at));
                found += of_byte.size[needed & 0xFF];
            }
        }
        size_ = static_cast<int>(found);
    }

    int size() const { return size_; }
    ME_INLINE Words some(int at) const { return widened(load<Halves>(list_ + at)); }

    // Given sets of listed counters, one for each of their four words: the elements that these words are for.
    TileBits elements(const uint64_t (&listed)[4][WORDS + 1]) const {
        TileBits elements = {};
        for (int w = 0, before = 0; w < WORDS; before += __builtin_popcountll(needed_[w++])) {
            for (int word = 0; word < 4; ++word) {
                const uint64_t* from = listed[word] + before / 64;
                const uint64_t next = from[0] >> before % 64 | from[1] << 1 << (63 - before % 64);
                const uint64_t counters = spread(next, needed_[w]);
                for (int g = 0; g < 4; ++g) elements.word[4 * w + g] |= (counters >> 16 * g & 0xFFFF) << 16 * word;
            }
        }
        return elements;
    }

  private:
    uint64_t needed_[WORDS];
    int size_;
    uint16_t list_[MOST];
};

// The elements [index, index + count) of a tensor whose draws are in a range.
static inline TileBits all_drawn_within(const RoundKeys& keys, uint64_t index, int count, const DrawRange& range) {
    uint32_t room[DRAW_ROOM];
    const uint32_t* draws = draw_tile(keys, index, count, room);
    return bits_where(count, [&](int j) { return range.holds(load<Words>(draws + j)); });
}

// Those of a set, and some others: only the counters that the set needs are drawn from. The tile begins with a group.
static inline TileBits some_drawn_within(const RoundKeys& keys, uint64_t index, const TileBits& set,
                                         const DrawRange& range) {
    constexpr int VECTORS = 4;
    const NeededCounters needed(set);
    const uint64_t first = index / DRAW_GROUP * GROUP_COUNTERS;
    uint64_t passed[4][NeededCounters::WORDS + 1] = {};
    for (int at = 0; at < needed.size(); at += VECTORS * SLOTS) {
        Slots counter[VECTORS];
        for (int v = 0; v < VECTORS; v += 2) {
            const Slots pair = (Slots)needed.some(at + v * SLOTS);
            counter[v] = first + (pair & 0xFFFFFFFFu);
            counter[v + 1] = first + (pair >> 32);
        }
        SlotWords words[VECTORS];
        philox_slots<VECTORS>(keys, counter, words);
        for (int word = 0; word < 4; ++word) {
            uint64_t bits = 0;
            for (int v = 0; v < VECTORS; v += 2) {
                const Words draws = interleaved(words[v].word[word], words[v + 1].word[word]);
                bits |= bits_of_lanes(range.holds(draws)) << v * SLOTS;
            }
            passed[word][at / 64] |= bits << at % 64;
        }
    }
    return needed.elements(passed);
}

}  // namespace ME_ISA
}  // namespace merge_engine
