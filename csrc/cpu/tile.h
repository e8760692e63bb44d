// A tile is a short run of elements that stays in the first-level cache while one simple loop after the
// other passes over it. Each loop is plain C++ that compilers vectorise for whatever they compile for.
#pragma once

#include <type_traits>

#include "../operations.h"
#include "philox_lanes.h"

#define ME_RESTRICT __restrict__

namespace merge_engine {
namespace ME_ISA {  // compiled once per instruction set; the names must not meet

constexpr int TILE = 512;
constexpr uint64_t BLOCK = 65536;  // elements handed to a thread at a time
static_assert(SUM_BLOCK % TILE == 0 && BLOCK % SUM_BLOCK == 0, "blocks are whole tiles");

// The working type's arithmetic type.
template <DType Working>
struct RealOf {
    using Type = float;
};
template <>
struct RealOf<DType::F64> {
    using Type = double;
};

// Calls f with the working dtype as a compile-time constant.
template <class F>
void with_dtype(DType dtype, F&& f) {
    switch (dtype) {
        case DType::BF16: return f(std::integral_constant<DType, DType::BF16>{});
        case DType::F16: return f(std::integral_constant<DType, DType::F16>{});
        case DType::F32: return f(std::integral_constant<DType, DType::F32>{});
        case DType::F64: return f(std::integral_constant<DType, DType::F64>{});
    }
}

// Keys are held in lanes as wide as the arithmetic's, which saves the narrowing.
template <DType Working>
using KeyOf = std::conditional_t<Working == DType::F64, uint64_t, uint32_t>;

// Widens `count` elements and returns how many are NaN or infinite.
template <DType From, class Real>
static uint64_t load_as(const void* data, uint64_t first, int count, Real* ME_RESTRICT out) {
    const auto* ME_RESTRICT bits = static_cast<const typename Storage<From>::Bits*>(data) + first;
    int non_finite = 0;
    for (int j = 0; j < count; ++j) {
        out[j] = Storage<From>::template load<Real>(bits[j]);
        non_finite += is_finite(out[j]) ? 0 : 1;
    }
    return static_cast<uint64_t>(non_finite);
}

// Rounds and writes `count` elements and returns how many are then NaN or infinite.
template <DType To, class Real>
static uint64_t store_as(void* data, uint64_t first, int count, const Real* ME_RESTRICT values) {
    auto* ME_RESTRICT bits = static_cast<typename Storage<To>::Bits*>(data) + first;
    int non_finite = 0;
    for (int j = 0; j < count; ++j) {
        bits[j] = Storage<To>::store(values[j]);
        non_finite += is_finite(Storage<To>::template load<Real>(bits[j])) ? 0 : 1;
    }
    return static_cast<uint64_t>(non_finite);
}

// Reads elements [first, first + count) of an input, rounded to the working dtype, and returns how many of
// them are then NaN or infinite.
template <DType Working, class Real>
static uint64_t load_tile(const Array& array, uint64_t first, int count, Real* ME_RESTRICT out) {
    if (array.dtype == Working) return load_as<Working>(array.data, first, count, out);
    double wide[TILE];
    typename Storage<Working>::Bits rounded[TILE];
    with_dtype(array.dtype, [&](auto from) { load_as<from()>(array.data, first, count, wide); });
    for (int j = 0; j < count; ++j) rounded[j] = Storage<Working>::store(wide[j]);
    return load_as<Working>(rounded, 0, count, out);
}

template <class Real>
static uint64_t store_tile(const Array& array, uint64_t first, int count, const Real* ME_RESTRICT values) {
    uint64_t non_finite = 0;
    with_dtype(array.dtype, [&](auto to) { non_finite = store_as<to()>(array.data, first, count, values); });
    return non_finite;
}

// d = x - b
template <class Rounding, class Real>
static void task_vector_tile(const Real* ME_RESTRICT model, const Real* ME_RESTRICT base, int count,
                             Real* ME_RESTRICT delta) {
    for (int j = 0; j < count; ++j) delta[j] = Rounding::round(model[j] - base[j]);
}

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

// A range of positions as 32-bit bounds for one tile: draws as they are, flat indices relative to `index`.
struct TileRange {
    uint32_t first, last;

    TileRange(const Range& range, bool by_draw, uint64_t index, int count) {
        if (by_draw) {
            first = static_cast<uint32_t>(range.first);
            last = static_cast<uint32_t>(range.last > 0xFFFFFFFFull ? 0xFFFFFFFFull : range.last);
            if (range.first > range.last) first = 1, last = 0;
            return;
        }
        const uint64_t end = index + static_cast<uint64_t>(count);
        if (range.first > range.last || range.last < index || range.first >= end) {
            first = 1, last = 0;
            return;
        }
        first = range.first > index ? static_cast<uint32_t>(range.first - index) : 0;
        last = range.last < end ? static_cast<uint32_t>(range.last - index) : static_cast<uint32_t>(count);
    }
};

// Whether elements whose key equals a bound of the mask stay, from their positions.
template <class Key>
struct TieRule {
    Key low, high;
    TileRange at_low, at_high;

    TieRule(const Mask& mask, uint64_t index, int count)
        : low(static_cast<Key>(mask.low)),
          high(static_cast<Key>(mask.high)),
          at_low(mask.low_positions, mask.by_draw, index, count),
          at_high(mask.high_positions, mask.by_draw, index, count) {}

    ME_INLINE uint32_t keeps(Key key, uint32_t position) const {
        const uint32_t low_keeps = (key != low) | ((position >= at_low.first) & (position <= at_low.last));
        const uint32_t high_keeps = (key != high) | ((position >= at_high.first) & (position <= at_high.last));
        return low_keeps & high_keeps;
    }
};

// Decides the `ties` elements whose key equals a bound, which `at_bound` marks with 1.
template <class Key>
static void decide_ties(const Mask& mask, const Key* ME_RESTRICT keys, const uint8_t* ME_RESTRICT at_bound, int ties,
                        uint64_t index, int count, uint32_t* ME_RESTRICT kept) {
    constexpr int FEW = TILE / 16;
    const TieRule<Key> rule(mask, index, count);
    uint32_t positions[TILE];
    if (ties > FEW) {
        if (mask.by_draw) {
            draw_tile(mask.random_key, index, count, positions);
        } else {
            for (int j = 0; j < count; ++j) positions[j] = static_cast<uint32_t>(j);
        }
        for (int j = 0; j < count; ++j) kept[j] &= rule.keeps(keys[j], positions[j]);
        return;
    }
    // Gathered, eight marks at a look, and drawn together.
    int tied[FEW + PHILOX_LANES], found = 0;
    for (int at = 0; at < count; at += 8) {
        uint64_t marks;
        std::memcpy(&marks, at_bound + at, sizeof(marks));
        for (; marks; marks &= marks - 1) tied[found++] = at + __builtin_ctzll(marks) / 8;
    }
    if (mask.by_draw) {
        for (int i = found; i % PHILOX_LANES != 0; ++i) tied[i] = 0;
        draw_some(mask.random_key, index, tied, found, positions);
    } else {
        for (int i = 0; i < found; ++i) positions[i] = static_cast<uint32_t>(tied[i]);
    }
    for (int i = 0; i < found; ++i) kept[tied[i]] &= rule.keeps(keys[tied[i]], positions[i]);
}

// kept[j] = 1 where the mask keeps the element. `index` is the flat index in the tensor, `offset` in the
// chunk.
template <DType Working, class Real>
static void mask_tile(const Mask& mask, const Real* ME_RESTRICT delta, uint64_t index, uint64_t offset, int count,
                      uint32_t* ME_RESTRICT kept) {
    using Key = KeyOf<Working>;
    uint32_t draws[TILE];
    Key keys[TILE];
    switch (mask.kind) {
        case MaskKind::Dense:
            for (int j = 0; j < count; ++j) kept[j] = 1;
            return;
        case MaskKind::Draw: {
            draw_tile(mask.random_key, index, count, draws);
            const TileRange range(mask.low_positions, true, index, count);
            for (int j = 0; j < count; ++j) kept[j] = (draws[j] >= range.first) & (draws[j] <= range.last);
            return;
        }
        case MaskKind::Ranked: {
            draw_tile(mask.random_key, index, count, draws);
            const uint32_t* ME_RESTRICT thresholds = mask.thresholds + offset;
            for (int j = 0; j < count; ++j) kept[j] = draws[j] < thresholds[j];
            return;
        }
        case MaskKind::Band: {
            constexpr uint64_t highest = static_cast<Key>(~Key{0});
            const Key low = static_cast<Key>(mask.low), high = static_cast<Key>(mask.high < highest ? mask.high : highest);
            uint8_t at_bound[TILE];
            std::memset(at_bound + count / 8 * 8, 0, 8 * (count % 8 != 0));
            int ties = 0;
            for (int j = 0; j < count; ++j) {
                keys[j] = magnitude_key<Working>(delta[j]);
                kept[j] = (keys[j] >= low) & (keys[j] <= high);
                const uint32_t tied = (keys[j] == low) | (keys[j] == high);
                at_bound[j] = static_cast<uint8_t>(tied);
                ties += static_cast<int>(tied);
            }
            constexpr uint64_t every = ~0ull;
            const bool undecided = mask.low_positions.first > 0 || mask.low_positions.last < every ||
                                   mask.high_positions.first > 0 || mask.high_positions.last < every;
            if (undecided && ties) decide_ties(mask, keys, at_bound, ties, index, count, kept);
            return;
        }
    }
}

}  // namespace ME_ISA
}  // namespace merge_engine
