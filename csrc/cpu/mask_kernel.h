// Which elements of a task vector a mask keeps.
#pragma once

#include <algorithm>
#include <type_traits>

#include "draws.h"
#include "quotient.h"
#include "storage_lanes.h"

namespace merge_engine {
namespace ME_ISA {

// The smallest of the magnitudes [0, end) for which something holds that holds for all above; `end` if there is none.
template <class Magnitude, class F>
static Magnitude first_that(Magnitude end, F&& holds) {
    Magnitude low = 0, high = end;
    while (low < high) {
        const Magnitude middle = low + (high - low) / 2;
        if (holds(middle)) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

// A mask, made ready for many tiles.
//
// The keys of a band are looked for in the bits of |d| before rounding: because rounding is monotone, the magnitudes
// of a key are a range of them, and no element needs rounding. A mask keeps the elements inside its band, except for
// ties at its bounds whose positions are outside their range.
template <DType Working>
class MaskKernel {
  public:
    using Real = typename RealOf<Working>::Type;
    using Bits = typename Storage<Working>::Bits;
    using Magnitude = std::conditional_t<sizeof(Real) == 8, uint64_t, uint32_t>;  // the bits of a Real, without sign
    static constexpr Magnitude SIGN = Magnitude{1} << (8 * sizeof(Real) - 1);     // above all magnitudes

    // `reaches_output`: whoever calls keep() finds a value that is not finite in what it makes of the kept elements.
    explicit MaskKernel(const Mask& mask, bool reaches_output = false)
        : mask_(mask), keys_(mask.random_key), unbounded_(reaches_output && mask.kind != MaskKind::Band) {
        if (mask.kind != MaskKind::Band) return;
        const Magnitude low = first_of(mask.low), above_low = first_above(mask.low);
        const Magnitude high = first_of(mask.high), above_high = first_above(mask.high);
        band_ = {low, above_high > low ? above_high - low : 0};
        unbounded_ = reaches_output && above_high == SIGN && mask.keeps_all_ties(mask.high_positions);
        if (!mask.keeps_all_ties(mask.low_positions)) low_ties_ = {low, above_low - low};
        if (!mask.keeps_all_ties(mask.high_positions)) high_ties_ = {high, above_high - high};
    }

    // Reads d = x - b of one tile, and sets kept[j] to 1 where the mask keeps the element, else to 0. `index` is the
    // flat index in the tensor, `offset` that in the chunk. Returns how many values of the model are NaN or infinite.
    template <class Rounding>
    uint64_t read(const Array& model, const Real* ME_RESTRICT base, uint64_t index, uint64_t offset, int count,
                  Real* ME_RESTRICT delta, uint32_t* ME_RESTRICT kept) const {
        Bits rounded[TILE];
        const Bits* ME_RESTRICT bits = tile_of<Working>(model, offset, count, rounded);
        uint32_t non_finite = 0;
        for (int j = 0; j < count; ++j) {
            const Real x = Storage<Working>::template load<Real>(bits[j]);
            non_finite += is_finite(x) ? 0 : 1;
            delta[j] = Rounding::round(x - base[j]);
            kept[j] = band_.holds(magnitude(delta[j]));
        }
        TileBits stay = placed(index, offset, count);
        drop_ties_by_position(low_ties_, mask_.low_positions, delta, index, count, stay);
        drop_ties_by_position(high_ties_, mask_.high_positions, delta, index, count, stay);
        for (int j = 0; j < count; j += LANES) {  // arrays of a tile are whole vectors
            store(kept + j, where(stay.lanes(j), load<Floats>(kept + j), Floats{}));
        }
        return non_finite;
    }

    // Sets `kept` to those elements of a tile that the mask keeps and that are not zero, ordered (see StorageLanes). With
    // leaves_equal() some may be zero. Raises `largest` to the magnitudes of all elements, except where kept elements
    // reach the output.
    // Whole groups are read; elements beyond `count` must be there, and be zero.
    void keep(const Bits* model, const Bits* base, uint64_t index, uint64_t offset, int count, TileBits& kept,
              Ints& largest) const {
        TileBits tied;
        const Window inside = not_zero(band_);
        if (leaves_equal()) {
            for (uint64_t& word : kept.word) word = ~0ull;
            look_for_infinity(model, count, largest);
        } else if (unbounded_ && low_ties_.span) {
            scan<true, true>(model, base, count, inside, kept, low_ties_.span, tied, largest);
        } else if (unbounded_) {
            scan<true, false>(model, base, count, inside, kept, 0, tied, largest);
        } else {
            scan<false, true>(model, base, count, inside, kept, low_ties_.span, tied, largest);
        }
        if (low_ties_.span) drop_ties_by_position(tied, mask_.low_positions, index, count, kept);
        if (high_ties_.span) {
            scan<false, false>(model, base, count, not_zero(high_ties_), tied, 0, tied, largest);
            drop_ties_by_position(tied, mask_.high_positions, index, count, kept);
        }
        if (drawn()) {
            const TileBits stay = placed(index, offset, count);
            for (int w = 0; w < TileBits::WORDS; ++w) kept.word[w] &= Vectors::ordered(stay.word[w]);
        }
    }
    // Whether keep() leaves it to the caller to drop the elements that equal the base. What is kept and the base reach
    // the output, so `largest` need only tell whether the others are finite.
    bool leaves_equal() const { return unbounded_ && drawn(); }
    // Whether draws or ranks decide, and magnitudes do not.
    bool drawn() const { return mask_.kind != MaskKind::Band && mask_.kind != MaskKind::Dense; }
    // The elements that draws or ranks keep: all of them where neither decides.
    TileBits placed(uint64_t index, uint64_t offset, int count) const {
        if (mask_.kind == MaskKind::Noted) return noted(mask_.notes, offset);
        if (mask_.kind == MaskKind::Draw) {
            return drawn_below(draws_below(mask_.low_positions), keys_, index, count, first_bits(count));
        }
        if (mask_.kind != MaskKind::Ranked) return first_bits(count);
        uint32_t padded[TILE];
        const uint32_t* thresholds = mask_.thresholds + offset;
        if (count < TILE) {
            std::memcpy(padded, thresholds, static_cast<size_t>(count) * sizeof(uint32_t));
            thresholds = padded;
        }
        return DrawnBelow(keys_, index, count).than(thresholds, first_bits(count));
    }
    // A lower bound of the magnitudes that are kept and not zero, from the dtype and the band.
    Magnitude smallest_kept() const {
        return std::max(band_.first, bits_of<Magnitude>(Storage<Working>::template load<Real>(1)));
    }

    // The smallest magnitude whose key is at least `key`; SIGN if there is none.
    static Magnitude first_of(uint64_t key) {
        return first_that(SIGN, [key](Magnitude m) { return magnitude_key<Working>(bits_of<Real>(m)) >= key; });
    }

  private:
    using Vectors = StorageLanes<Working>;

    struct Window {
        Magnitude first, span;

        ME_INLINE bool holds(Magnitude m) const { return static_cast<Magnitude>(m - first) < span; }
    };
    static Window not_zero(const Window& window) {
        return window.first || !window.span ? window : Window{1, window.span - 1};
    }

    static ME_INLINE Magnitude magnitude(Real delta) { return bits_of<Magnitude>(delta) & ~SIGN; }

    static Magnitude first_above(uint64_t key) { return key == ~0ull ? SIGN : first_of(key + 1); }

    // Finds the elements with magnitudes in [first, first + span) (with Unbounded: at or above first), and those in
    // [first, first + part). Bits are in the order of lanes.
    template <bool Unbounded, bool HasPart>
    static ME_INLINE void scan(const Bits* model, const Bits* base, int count, const Window& window, TileBits& inside,
                               Magnitude part, TileBits& in_part, Ints& largest) {
        const Words first = Words{} + window.first, span = Words{} + window.span;
        const Words part_span = Words{} + part, part_end = first + part_span;
        Ints highest = largest;
        for (int at = 0; at < count; at += GROUP) {
            const auto look = [&](auto half, int j) {
                const Floats delta = Vectors::template load<half()>(model + at, j) -
                                     Vectors::template load<half()>(base + at, j);
                const Words magnitude = (Words)delta & 0x7FFFFFFFu, from_first = magnitude - first;
                if (!Unbounded) highest = larger(highest, (Ints)magnitude);
                const Truth within = Unbounded ? at_least(magnitude, first) : less(from_first, span);
                inside.set_lanes(at + half() * HALF + j, within);
                if (!HasPart) return;
                const Truth within_part =
                    Unbounded ? less_among(within, magnitude, part_end) : less(from_first, part_span);
                in_part.set_lanes(at + half() * HALF + j, within_part);
            };
#pragma GCC unroll 8
            for (int j = 0; j < HALF; j += LANES) {
                look(std::integral_constant<int, 0>{}, j);
                look(std::integral_constant<int, 1>{}, j);
            }
        }
        for (int w = (count + GROUP - 1) / GROUP; w < TileBits::WORDS; ++w) {
            inside.word[w] = 0;
            if (HasPart) in_part.word[w] = 0;
        }
        largest = highest;
    }

    // Raises `largest` if the model is not finite.
    static ME_INLINE void look_for_infinity(const Bits* model, int count, Ints& largest) {
        typename Vectors::Magnitudes highest = {};
        for (int at = 0; at < count; at += GROUP) {
#pragma GCC unroll 8
            for (int j = 0; j < HALF; j += LANES) highest = larger(highest, Vectors::magnitudes(model + at, j));
        }
        if (any_at_least(highest, Vectors::INFINITE)) largest = Ints{} + StorageLanes<DType::F32>::INFINITE;
    }

    // Takes the elements out of `stay` whose magnitudes lie in a window and whose positions are not in the range.
    void drop_ties_by_position(const Window& window, const Range& positions, const Real* delta, uint64_t index,
                               int count, TileBits& stay) const {
        if (window.span == 0) return;
        TileBits tied = {};
        for (int j = 0; j < count; ++j) {
            tied.word[j / 64] |= static_cast<uint64_t>(window.holds(magnitude(delta[j]))) << (j % 64);
        }
        const TileBits stays = within(positions, tied, index, count);
        for (int w = 0; w < TileBits::WORDS; ++w) stay.word[w] &= ~tied.word[w] | stays.word[w];
    }
    // The same for elements in the order of lanes, of which it is known which are tied.
    void drop_ties_by_position(const TileBits& tied, const Range& positions, uint64_t index, int count,
                               TileBits& stay) const {
        TileBits natural;
        for (int w = 0; w < TileBits::WORDS; ++w) natural.word[w] = Vectors::unordered(tied.word[w]);
        const TileBits stays = within(positions, natural, index, count);
        for (int w = 0; w < TileBits::WORDS; ++w) {
            stay.word[w] &= ~tied.word[w] | Vectors::ordered(stays.word[w]);
        }
    }

    // The elements of a set whose positions lie in a range. May over-report outside the set.
    TileBits within(const Range& positions, const TileBits& set, uint64_t index, int count) const {
        return mask_.by_draw ? drawn_below(draws_below(positions), keys_, index, count, set)
                             : indices_within(positions, index, count);
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
    const Mask& mask_;
    RoundKeys keys_;
    Window band_{0, static_cast<Magnitude>(~Magnitude{0})};
    bool unbounded_;  // keep() keeps everything that is not below the band, and it reaches the output
    Window low_ties_{0, 0}, high_ties_{0, 0};  // at the bounds, where positions decide
};

// A set of a tile's elements that is ordered, in natural order.
template <DType Working>
static ME_INLINE TileBits in_natural_order(const TileBits& ordered) {
    TileBits natural;
    for (int w = 0; w < TileBits::WORDS; ++w) natural.word[w] = StorageLanes<Working>::unordered(ordered.word[w]);
    return natural;
}

// A tile of an input, with zeros up to a whole group.
template <DType Working>
static const typename Storage<Working>::Bits* whole_groups(const Array& array, uint64_t at, int count,
                                                           typename Storage<Working>::Bits (&room)[TILE]) {
    const auto* bits = tile_of<Working>(array, at, count, room);
    if (count % GROUP == 0) return bits;
    if (bits != room) std::memcpy(room, bits, static_cast<size_t>(count) * sizeof(*bits));
    std::memset(room + count, 0, static_cast<size_t>(GROUP - count % GROUP) * sizeof(*bits));
    return room;
}

// Whether kept elements are divided by their own probabilities, and what for they are multiplied with then.
static inline bool by_probability(const Entry& entry) {
    return entry.mask.kind == MaskKind::Ranked && entry.mask.inverse_probability;
}
template <class Real>
static ME_INLINE Real inverse(uint32_t threshold) {
    return static_cast<Real>(4294967296.0 * reciprocal(threshold));
}

}  // namespace ME_ISA
}  // namespace merge_engine
