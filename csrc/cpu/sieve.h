// Which elements of a task vector a mask keeps.
#pragma once

#include <algorithm>
#include <type_traits>

#include "draws.h"

namespace merge_engine {
namespace ME_ISA {

// A range of magnitudes.
template <class Magnitude>
struct Window {
    Magnitude first, span;

    ME_INLINE bool holds(Magnitude m) const { return static_cast<Magnitude>(m - first) < span; }
};
template <>
struct Window<Words> {
    Words first, span;

    ME_INLINE Truth holds(Words m) const { return less(m - first, span); }
};

// A mask, made ready for many tiles.
//
// The keys of a band are looked for in the bits of |d| before rounding: because rounding is monotone, the magnitudes
// of a key are a range of them, and no element needs rounding. A mask keeps what is inside its band and not put out by
// its position.
template <DType Working>
class Sieve {
  public:
    using Real = typename RealOf<Working>::Type;
    using Magnitude = std::conditional_t<sizeof(Real) == 8, uint64_t, uint32_t>;  // the bits of a Real, without sign
    static constexpr Magnitude SIGN = Magnitude{1} << (8 * sizeof(Real) - 1);

    explicit Sieve(const Mask& mask) : mask_(mask), keys_(mask.random_key) {
        if (mask.kind != MaskKind::Band) return;
        const Magnitude low = first_of(mask.low), above_low = first_above(mask.low);
        const Magnitude high = first_of(mask.high), above_high = first_above(mask.high);
        band_ = {low, above_high > low ? above_high - low : 0};
        if (!decided(mask.low_positions)) low_ties_ = {low, above_low - low};
        if (!decided(mask.high_positions)) high_ties_ = {high, above_high - high};
    }

    // Reads d = x - b of one tile, and sets kept[j] to 1 where the mask keeps the element, else to 0. `index` is the
    // flat index in the tensor, `offset` that in the chunk. Returns how many values of the model are NaN or infinite.
    template <class Rounding>
    uint64_t read(const Array& model, const Real* ME_RESTRICT base, uint64_t index, uint64_t offset, int count,
                  Real* ME_RESTRICT delta, uint32_t* ME_RESTRICT kept) const {
        typename Storage<Working>::Bits rounded[TILE];
        const auto* ME_RESTRICT bits = tile_of<Working>(model, offset, count, rounded);
        uint32_t non_finite = 0;
        for (int j = 0; j < count; ++j) {
            const Real x = Storage<Working>::template load<Real>(bits[j]);
            non_finite += is_finite(x) ? 0 : 1;
            delta[j] = Rounding::round(x - base[j]);
            kept[j] = band_.holds(magnitude(delta[j]));
        }
        if (by_position()) {
            const TileBits stay = staying(delta, index, offset, count);
            for (int j = 0; j < count; j += LANES) {  // arrays of a tile are whole vectors
                store(kept + j, where(stay.lanes(j), load<Floats>(kept + j), Floats{}));
            }
        }
        return non_finite;
    }

    // The magnitudes inside the band, for every lane.
    Window<Words> band() const { return {Words{} + band_.first, Words{} + band_.span}; }
    // Whether positions put out any that are.
    bool by_position() const {
        const bool ties = low_ties_.span != 0 || high_ties_.span != 0;
        return mask_.kind == MaskKind::Band ? ties : mask_.kind != MaskKind::Dense;
    }

    // The elements that their positions do not put out, given their task vector or a function that finds those with
    // magnitudes in a window.
    TileBits staying(const Real* delta, uint64_t index, uint64_t offset, int count) const {
        return staying(index, offset, count, [&](const auto& window) { return elements_in(window, delta, count); });
    }
    template <class ElementsIn>
    TileBits staying(uint64_t index, uint64_t offset, int count, ElementsIn&& elements_in) const {
        if (mask_.kind == MaskKind::Band) return settled(index, count, elements_in);
        if (mask_.kind == MaskKind::Noted) return noted(mask_.notes, offset);
        if (mask_.kind == MaskKind::Draw) return drawn_within(mask_.low_positions, nullptr, index, count);
        uint32_t padded[TILE], room[DRAW_ROOM];
        const uint32_t* draws = draw_tile(keys_, index, count, room);
        const uint32_t* thresholds = mask_.thresholds + offset;
        if (count < TILE) {
            std::memcpy(padded, thresholds, static_cast<size_t>(count) * sizeof(uint32_t));
            thresholds = padded;
        }
        return bits_where(count, [&](int j) { return less(load<Words>(draws + j), load<Words>(thresholds + j)); });
    }

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

  private:
    static ME_INLINE Magnitude magnitude(Real delta) { return bits_of<Magnitude>(delta) & ~SIGN; }

    static Magnitude first_above(uint64_t key) { return key == ~0ull ? SIGN : first_of(key + 1); }

    // Whether all ties stay.
    bool decided(const Range& positions) const {
        return positions.first == 0 && positions.last >= (mask_.by_draw ? 0xFFFFFFFFull : ~0ull);
    }

    // The elements of a tile in a range of flat indices.
    static TileBits indices_within(const Range& range, uint64_t index, int count) {
        if (range.first > range.last || range.last < index) return {};
        const auto place = [&](uint64_t position) {
            return static_cast<int>(std::min(position - index, static_cast<uint64_t>(count)));
        };
        const TileBits before = first_bits(range.first > index ? place(range.first) : 0);
        TileBits bits = first_bits(range.last == ~0ull ? count : place(range.last + 1));
        for (int w = 0; w < TileBits::WORDS; ++w) bits.word[w] &= ~before.word[w];
        return bits;
    }

    // The elements whose magnitudes lie in a window.
    static TileBits elements_in(const Window<Magnitude>& window, const Real* delta, int count) {
        if constexpr (std::is_same_v<Real, float>) {
            const Window<Words> lanes = {Words{} + window.first, Words{} + window.span};
            return bits_where(count, [&](int j) { return lanes.holds(load<Words>(delta + j) & 0x7FFFFFFFu); });
        } else {
            TileBits bits = {};
            for (int j = 0; j < count; ++j) {
                bits.word[j / 64] |= static_cast<uint64_t>(window.holds(magnitude(delta[j]))) << (j % 64);
            }
            return bits;
        }
    }

    // All but the elements whose key equals a bound and whose position speaks against them.
    template <class ElementsIn>
    TileBits settled(uint64_t index, int count, ElementsIn&& elements_in) const {
        TileBits stay = first_bits(count);
        if (low_ties_.span) settle(elements_in(low_ties_), mask_.low_positions, index, count, stay);
        if (high_ties_.span) settle(elements_in(high_ties_), mask_.high_positions, index, count, stay);
        return stay;
    }
    // Takes away those of the tied elements whose positions are not in the range.
    void settle(const TileBits& tied, const Range& positions, uint64_t index, int count, TileBits& stay) const {
        const TileBits placed =
            mask_.by_draw ? drawn_within(positions, &tied, index, count) : indices_within(positions, index, count);
        for (int w = 0; w < TileBits::WORDS; ++w) stay.word[w] &= ~tied.word[w] | placed.word[w];
    }

    // The elements whose draws lie in a range; if it is only about a set, others may be among them.
    TileBits drawn_within(const Range& positions, const TileBits* set, uint64_t index, int count) const {
        constexpr int MANY = TILE / 5;  // to draw for all is cheaper
        if (positions.first > positions.last) return {};
        const DrawRange range(positions);
        const bool few = set && index % DRAW_GROUP == 0 && set->size() <= MANY;
        return few ? some_drawn_within(keys_, index, *set, range) : all_drawn_within(keys_, index, count, range);
    }

    const Mask& mask_;
    RoundKeys keys_;
    Window<Magnitude> band_{0, static_cast<Magnitude>(~Magnitude{0})};
    Window<Magnitude> low_ties_{0, 0}, high_ties_{0, 0};  // at the bounds, where positions decide
};

// Whether kept elements are divided by their own probabilities, and what for they are multiplied with then.
static inline bool by_probability(const Entry& entry) {
    return entry.mask.kind == MaskKind::Ranked && entry.mask.inverse_probability;
}
template <class Real>
static ME_INLINE Real inverse(uint32_t threshold) {
    return static_cast<Real>(4294967296.0 / static_cast<double>(threshold));
}

}  // namespace ME_ISA
}  // namespace merge_engine
