// The random draws of a tile.
#pragma once

#include <algorithm>

#include "philox_lanes.h"
#include "tile_bits.h"

namespace merge_engine {
namespace ME_ISA {

constexpr int GROUP_COUNTERS = DRAW_GROUP / 4;
constexpr int DRAW_ROOM = TILE + 4 * DRAW_GROUP;

// The random draws of elements [index, index + count) of a tensor: where they begin in `room`.
static inline const uint32_t* draw_tile(const RoundKeys& keys, uint64_t index, int count, uint32_t (&room)[DRAW_ROOM]) {
    constexpr int VECTORS = VECTOR_BYTES == 64 ? 8 : 4;
    const int skipped = static_cast<int>(index % DRAW_GROUP);
    const int counters = (skipped + count + DRAW_GROUP - 1) / DRAW_GROUP * GROUP_COUNTERS;
    const uint64_t first = index / DRAW_GROUP * GROUP_COUNTERS;
    for (int at = 0; at < counters; at += VECTORS * SLOTS) {
        Slots counter[VECTORS];
        for (int v = 0; v < VECTORS; v += 2) {
            split(lane_numbers() + static_cast<uint32_t>(at + v * SLOTS), counter[v], counter[v + 1]);
        }
        for (int v = 0; v < VECTORS; ++v) counter[v] += first;
        SlotWords words[VECTORS];
        philox_slots<VECTORS>(keys, counter, words);
        for (int v = 0; v < VECTORS; v += 2) {
            const int counted = at + v * SLOTS;
            uint32_t* draws = room + counted / GROUP_COUNTERS * DRAW_GROUP + counted % GROUP_COUNTERS;
            for (int word = 0; word < 4; ++word) {
                store(draws + word * GROUP_COUNTERS, joined(words[v].word[word], words[v + 1].word[word]));
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

// Elements 16 k to 16 k + 15 of a group have word k of its 16 counters. Of four groups, from sets of counters, one for
// each word, to sets of elements, one for each group; and back.
static ME_INLINE void exchange(const uint64_t* from, uint64_t* to) {
    using Quarters = uint16_t __attribute__((vector_size(32)));
    Quarters quarters;
    std::memcpy(&quarters, from, sizeof(quarters));
#if defined(__clang__)
    quarters = __builtin_shufflevector(quarters, quarters, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
#else
    quarters = __builtin_shuffle(quarters, Quarters{0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15});
#endif
    std::memcpy(to, &quarters, sizeof(quarters));
}

// Of a tile's counters those that a set of its elements needs.
class NeededCounters {
  public:
    static constexpr int MOST = TILE / 4, WORDS = MOST / 64;

    explicit NeededCounters(const TileBits& set) {
        for (int w = 0; w < WORDS; ++w) {
            uint64_t by_word[4];
            exchange(set.word + 4 * w, by_word);
            needed_[w] = by_word[0] | by_word[1] | by_word[2] | by_word[3];
        }
        size_ = list_places(needed_, list_);
    }

    int size() const { return size_; }
    ME_INLINE Words some(int at) const { return load<Words>(list_ + at); }

    // Given sets of listed counters, one for each of their four words: the elements that these words are for.
    TileBits elements(const uint64_t (&listed)[4][WORDS + 1]) const {
        TileBits elements;
        for (int w = 0, before = 0; w < WORDS; before += __builtin_popcountll(needed_[w++])) {
            uint64_t by_word[4];
            for (int word = 0; word < 4; ++word) {
                const uint64_t* from = listed[word] + before / 64;
                const uint64_t next = from[0] >> before % 64 | from[1] << 1 << (63 - before % 64);
                by_word[word] = spread(next, needed_[w]);
            }
            exchange(by_word, elements.word + 4 * w);
        }
        return elements;
    }

  private:
    uint64_t needed_[WORDS];
    int size_;
    uint32_t list_[MOST + MORE_PLACES];
};

// Draws from several vectors of counters, given by their lanes, and sets bits where the draws are in a range: in a word
// of bits for each of the four.
constexpr int AT_ONCE = 4 * SLOTS;
template <class Counters>
static ME_INLINE void draw_some(const RoundKeys& keys, uint64_t first, Counters&& counters, const DrawRange& range,
                                uint64_t (&within)[4]) {
    constexpr int VECTORS = AT_ONCE / SLOTS;
    Slots counter[VECTORS];
    for (int v = 0; v < VECTORS; v += 2) split(counters(v * SLOTS), counter[v], counter[v + 1]);
    for (int v = 0; v < VECTORS; ++v) counter[v] += first;
    SlotWords words[VECTORS];
    philox_slots<VECTORS>(keys, counter, words);
    for (int word = 0; word < 4; ++word) {
        within[word] = 0;
        for (int v = 0; v < VECTORS; v += 2) {
            const Words draws = joined(words[v].word[word], words[v + 1].word[word]);
            within[word] |= bits_of_lanes(range.holds(draws)) << v * SLOTS;
        }
    }
}

// The elements [index, index + count) of a tensor whose draws are in a range.
static inline TileBits all_drawn_within(const RoundKeys& keys, uint64_t index, int count, const DrawRange& range) {
    if (index % DRAW_GROUP) {
        uint32_t room[DRAW_ROOM];
        const uint32_t* draws = draw_tile(keys, index, count, room);
        return bits_where(count, [&](int j) { return range.holds(load<Words>(draws + j)); });
    }
    const uint64_t first = index / DRAW_GROUP * GROUP_COUNTERS;
    TileBits bits = {};
    for (int w = 0; w < TileBits::WORDS && 64 * w < count; w += 4) {
        uint64_t by_word[4] = {};
        for (int at = 0; at < 64; at += AT_ONCE) {
            const uint32_t next = static_cast<uint32_t>(w * GROUP_COUNTERS + at);
            uint64_t within[4];
            draw_some(keys, first, [&](int lane) { return lane_numbers() + (next + static_cast<uint32_t>(lane)); }, range, within);
            for (int word = 0; word < 4; ++word) by_word[word] |= within[word] << at;
        }
        exchange(by_word, bits.word + w);
    }
    if (count < TILE) {
        const TileBits those = first_bits(count);
        for (int w = 0; w < TileBits::WORDS; ++w) bits.word[w] &= those.word[w];
    }
    return bits;
}

// Those of a set, and some others: only the counters that the set needs are drawn from. The tile begins with a group.
static inline TileBits some_drawn_within(const RoundKeys& keys, uint64_t index, const TileBits& set,
                                         const DrawRange& range) {
    const NeededCounters needed(set);
    const uint64_t first = index / DRAW_GROUP * GROUP_COUNTERS;
    uint64_t passed[4][NeededCounters::WORDS + 1] = {};
    for (int at = 0; at < needed.size(); at += AT_ONCE) {
        uint64_t within[4];
        draw_some(keys, first, [&](int lane) { return needed.some(at + lane); }, range, within);
        for (int word = 0; word < 4; ++word) passed[word][at / 64] |= within[word] << at % 64;
    }
    return needed.elements(passed);
}

}  // namespace ME_ISA
}  // namespace merge_engine
