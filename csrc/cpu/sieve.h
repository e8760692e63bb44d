// Which elements of a task vector a mask keeps.
#pragma once

#include <type_traits>

#include "draws.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace merge_engine {
namespace ME_ISA {

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
    ME_INLINE uint32_t holds(uint32_t position) const {
        return static_cast<uint32_t>(position >= first) & static_cast<uint32_t>(position <= last);
    }
};

// Bit k is set where marks[k] is 1, of 64 marks that are 0 or 1.
static inline uint64_t gather_marks(const uint8_t* marks) {
    uint64_t word = 0;
#if defined(__SSE2__)
    for (int k = 0; k < 64; k += 16) {
        const __m128i some = _mm_loadu_si128(reinterpret_cast<const __m128i*>(marks + k));
        const int bits = _mm_movemask_epi8(_mm_slli_epi16(some, 7));
        word |= static_cast<uint64_t>(static_cast<uint32_t>(bits)) << k;
    }
#else
    for (int k = 0; k < 64; ++k) word |= static_cast<uint64_t>(marks[k]) << k;
#endif
    return word;
}

// A mask, made ready for many tiles.
//
// The keys of a band are looked for in the bits of |d| before rounding: because rounding is monotone, the magnitudes
// of a key are a range of them, and no element needs rounding.
template <DType Working>
class Sieve {
  public:
    using Real = typename RealOf<Working>::Type;

    explicit Sieve(const Mask& mask) : mask_(mask) {
        if (mask.kind != MaskKind::Band) return;
        low_ = first_of(mask.low);
        above_low_ = first_above(mask.low);
        high_ = first_of(mask.high);
        const Magnitude above_high = first_above(mask.high);
        span_ = above_high > low_ ? above_high - low_ : 0;
        const Magnitude sure_end = decided(mask.high_positions) ? above_high : high_;
        sure_low_ = decided(mask.low_positions) ? low_ : above_low_;
        sure_span_ = sure_end > sure_low_ ? sure_end - sure_low_ : 0;
    }

    // Reads d = x - b of one tile, and sets kept[j] to 1 where the mask keeps the element, else to 0. `index` is the
    // flat index in the tensor, `offset` that in the chunk. Returns how many values of the model are NaN or infinite.
    template <class Rounding>
    uint64_t read(const Array& model, const Real* ME_RESTRICT base, uint64_t index, uint64_t offset, int count,
                  Real* ME_RESTRICT delta, uint32_t* ME_RESTRICT kept) const {
        typename Storage<Working>::Bits rounded[TILE];
        const auto* ME_RESTRICT bits = tile_of<Working>(model, offset, count, rounded);
        uint32_t non_finite = 0;
        if (mask_.kind == MaskKind::Band) {
            uint32_t ties = 0;
            for (int j = 0; j < count; ++j) {
                const Real x = Storage<Working>::template load<Real>(bits[j]);
                non_finite += is_finite(x) ? 0 : 1;
                delta[j] = Rounding::round(x - base[j]);
                kept[j] = inside(magnitude(delta[j]));
                ties += tied(magnitude(delta[j]));
            }
            if (ties) settle(delta, ties, index, count, kept);
            return non_finite;
        }
        for (int j = 0; j < count; ++j) {
            const Real x = Storage<Working>::template load<Real>(bits[j]);
            non_finite += is_finite(x) ? 0 : 1;
            delta[j] = Rounding::round(x - base[j]);
        }
        if (mask_.kind == MaskKind::Dense) {
            for (int j = 0; j < count; ++j) kept[j] = 1;
        } else {
            keep_by_draw(index, offset, count, kept);
        }
        return non_finite;
    }

  private:
    using Magnitude = std::conditional_t<sizeof(Real) == 8, uint64_t, uint32_t>;  // the bits of a Real, without sign
    static constexpr Magnitude SIGN = Magnitude{1} << (8 * sizeof(Real) - 1);

    static ME_INLINE Magnitude magnitude(Real delta) { return bits_of<Magnitude>(delta) & ~SIGN; }

    // The smallest magnitude whose key is at least `key`; SIGN, which is above all magnitudes, if there is none.
    static Magnitude first_of(uint64_t key) {
        Magnitude low = 0, high = SIGN;
        while (low < high) {
            const Magnitude middle = low + (high - low) / 2;
            if (magnitude_key<Working>(bits_of<Real>(middle)) >= key) {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        return low;
    }
    static Magnitude first_above(uint64_t key) { return key == ~0ull ? SIGN : first_of(key + 1); }

    // Whether all ties stay.
    bool decided(const Range& positions) const {
        return positions.first == 0 && positions.last >= (mask_.by_draw ? 0xFFFFFFFFull : ~0ull);
    }
    ME_INLINE uint32_t inside(Magnitude m) const { return static_cast<Magnitude>(m - low_) < span_; }
    ME_INLINE uint32_t tied(Magnitude m) const {
        return inside(m) & static_cast<uint32_t>(static_cast<Magnitude>(m - sure_low_) >= sure_span_);
    }

    void keep_by_draw(uint64_t index, uint64_t offset, int count, uint32_t* ME_RESTRICT kept) const {
        uint32_t draws[TILE];
        draw_tile(mask_.random_key, index, count, draws);
        if (mask_.kind == MaskKind::Ranked) {
            const uint32_t* ME_RESTRICT thresholds = mask_.thresholds + offset;
            for (int j = 0; j < count; ++j) kept[j] = draws[j] < thresholds[j];
        } else {
            const TileRange range(mask_.low_positions, true, index, count);
            for (int j = 0; j < count; ++j) kept[j] = range.holds(draws[j]);
        }
    }

    // Decides the `ties` elements whose key equals a bound, by their positions.
    void settle(const Real* ME_RESTRICT delta, uint32_t ties, uint64_t index, int count,
                uint32_t* ME_RESTRICT kept) const {
        constexpr int FEW = TILE / 10;  // to decide these one by one is cheaper
        const TileRange at_low(mask_.low_positions, mask_.by_draw, index, count);
        const TileRange at_high(mask_.high_positions, mask_.by_draw, index, count);
        const auto keeps = [&](Magnitude m, uint32_t position) {
            return (static_cast<uint32_t>(m >= above_low_) | at_low.holds(position)) &
                   (static_cast<uint32_t>(m < high_) | at_high.holds(position));
        };
        uint32_t positions[TILE];
        if (ties > FEW) {
            if (mask_.by_draw) {
                draw_tile(mask_.random_key, index, count, positions);
            } else {
                for (int j = 0; j < count; ++j) positions[j] = static_cast<uint32_t>(j);
            }
            for (int j = 0; j < count; ++j) kept[j] &= keeps(magnitude(delta[j]), positions[j]);
            return;
        }
        uint8_t marks[TILE];
        for (int j = 0; j < count; ++j) marks[j] = static_cast<uint8_t>(tied(magnitude(delta[j])));
        std::memset(marks + count, 0, static_cast<size_t>(TILE - count));
        int places[FEW + PHILOX_LANES], found = 0;
        for (int at = 0; at < count; at += 64) {
            for (uint64_t word = gather_marks(marks + at); word; word &= word - 1) {
                places[found++] = at + __builtin_ctzll(word);
            }
        }
        if (mask_.by_draw) {
            for (int i = found; i % PHILOX_LANES != 0; ++i) places[i] = 0;
            draw_some(mask_.random_key, index, places, found, positions);
        } else {
            for (int i = 0; i < found; ++i) positions[i] = static_cast<uint32_t>(places[i]);
        }
        for (int i = 0; i < found; ++i) kept[places[i]] &= keeps(magnitude(delta[places[i]]), positions[i]);
    }

    const Mask& mask_;
    Magnitude low_ = 0, above_low_ = 0, high_ = 0, span_ = 0;  // where the bounds begin, and the first one ends
    Magnitude sure_low_ = 0, sure_span_ = 0;                   // what stays wherever it is
};

}  // namespace ME_ISA
}  // namespace merge_engine
