// L1 norms: magnitudes summed in double in a fixed order.
#include <algorithm>
#include <type_traits>

#include "primitives.h"
#include "mask_kernel.h"
#include "rounding_lanes.h"
#include "storage_lanes.h"
#include "sums.h"

namespace merge_engine {
namespace ME_ISA {
namespace {

// The sums of |d| or d^2 over one block, and over those of its elements that the mask keeps, which are noted.
struct Sums {
    double before, after;
};

// In float64, where no rounding is left to do.
template <bool Squared>
Sums wide_sums_of_block(const Array& base, const Array& model, const MaskKernel<DType::F64>& mask, uint64_t start,
                        uint64_t first, uint64_t last, uint64_t* notes) {
    double b[TILE], deltas[TILE], terms[TILE];
    uint32_t kept[TILE];
    LaneSum before, after;
    for (uint64_t at = first; at < last; at += TILE) {
        const int n = static_cast<int>(std::min<uint64_t>(TILE, last - at));
        load_tile<DType::F64>(base, at, n, b);
        mask.read<Unrounded>(model, b, start + at, at, n, deltas, kept);
        if (notes) note(bits_where(n, [&](int j) { return less(Words{}, load<Words>(kept + j)); }), at, notes);
        for (int j = 0; j < n; ++j) terms[j] = Squared ? deltas[j] * deltas[j] : deltas[j] < 0 ? -deltas[j] : deltas[j];
        before.add(n, terms);
        for (int j = 0; j < n; ++j) terms[j] = kept[j] ? terms[j] : 0.0;
        after.add(n, terms);
    }
    return {before.total(), after.total()};
}

// The same for dtypes that compute in float32: the running sums of a block are ordered.
template <DType Working, class Rounding, bool Squared>
class OrderedSums {
  public:
    void add(const typename Storage<Working>::Bits* model, const typename Storage<Working>::Bits* base,
             const TileBits& kept, int count) {
#pragma GCC unroll 16
        for (int j = 0; j < HALF; j += LANES) {
            add_lanes<0>(model, base, kept, count, j);
            add_lanes<1>(model, base, kept, count, j);
        }
    }
    Sums total() const { return {total(before_), total(after_)}; }

  private:
    using Vectors = StorageLanes<Working>;
    static_assert(GROUP == SUM_LANES, "an element of a group has a running sum");

    template <int H>
    ME_INLINE void add_lanes(const typename Storage<Working>::Bits* model, const typename Storage<Working>::Bits* base,
                             const TileBits& kept, int count, int j) {
        const int lane = H * HALF + j;
        Doubles low = load<Doubles>(before_ + lane), high = load<Doubles>(before_ + lane + LANES / 2);
        Doubles kept_low = load<Doubles>(after_ + lane), kept_high = load<Doubles>(after_ + lane + LANES / 2);
        for (int at = 0; at < count; at += GROUP) {
            // Each pass prefetches its share of the next tile: all at once would have to wait.
            const int share = lane * (TILE / GROUP) + at * LANES / GROUP;
            __builtin_prefetch(base + TILE + share);
            __builtin_prefetch(model + TILE + share);
            const Floats delta = round_lanes<Rounding>(Vectors::template load<H>(model + at, j) -
                                                       Vectors::template load<H>(base + at, j));
            if (Squared && std::is_same_v<Rounding, Unrounded>) {
                const Doubles first = low_doubles(delta), last = high_doubles(delta);
                const Floats stays = where(kept.lanes(at + lane), delta, Floats{});
                const Doubles kept_first = low_doubles(stays), kept_last = high_doubles(stays);
                low += first * first, high += last * last;
                kept_low += kept_first * kept_first, kept_high += kept_last * kept_last;
            } else {
                const Floats magnitude = Squared ? round_lanes<Rounding>(delta * delta)
                                                 : (Floats)((Words)delta & 0x7FFFFFFFu);
                low += low_doubles(magnitude), high += high_doubles(magnitude);
                add_among(kept.lanes(at + lane), magnitude, kept_low, kept_high);
            }
        }
        store(before_ + lane, low), store(before_ + lane + LANES / 2, high);
        store(after_ + lane, kept_low), store(after_ + lane + LANES / 2, kept_high);
    }
    static double total(const double (&ordered)[SUM_LANES]) {
        LaneSum sum;
        for (int j = 0; j < GROUP; ++j) sum.lane[Vectors::place(j)] = ordered[j];
        return sum.total();
    }

    double before_[SUM_LANES] = {}, after_[SUM_LANES] = {};
};

template <DType Working, class Rounding, bool Squared>
Sums sums_of_block(const Array& base, const Array& model, const MaskKernel<Working>& mask, uint64_t start,
                         uint64_t first, uint64_t last, uint64_t* notes) {
    typename Storage<Working>::Bits base_room[TILE], model_room[TILE];
    OrderedSums<Working, Rounding, Squared> sums;
    TileBits kept;
    Ints largest = {};
    for (uint64_t at = first; at < last; at += TILE) {
        const int n = static_cast<int>(std::min<uint64_t>(TILE, last - at));
        const auto* b = whole_groups<Working>(base, at, n, base_room);
        const auto* x = whole_groups<Working>(model, at, n, model_room);
        if (mask.drawn()) {
            kept = mask.placed(start + at, at, n);
            if (notes) note(kept, at, notes);
            for (uint64_t& word : kept.word) word = StorageLanes<Working>::ordered(word);
        } else {
            mask.keep(x, b, start + at, at, n, kept, largest);
            if (notes) note(in_natural_order<Working>(kept), at, notes);
        }
        sums.add(x, b, kept, n);
    }
    return sums.total();
}

template <DType Working, class Rounding, bool Squared>
void sums_of(const Array& base, const std::vector<Array>& models, const std::vector<Mask>& masks,
             const std::vector<uint64_t*>& notes, uint64_t start, uint64_t count, int threads, double* sums) {
    const std::vector<MaskKernel<Working>> kernels(masks.begin(), masks.end());
    sum_blocks(count, 2 * models.size(), threads, sums, [&](uint64_t first, uint64_t last, double* out) {
        for (size_t m = 0; m < models.size(); ++m) {
            Sums found;
            if constexpr (Working == DType::F64) {
                found = wide_sums_of_block<Squared>(base, models[m], kernels[m], start, first, last, notes[m]);
            } else {
                found = sums_of_block<Working, Rounding, Squared>(base, models[m], kernels[m], start, first, last,
                                                                  notes[m]);
            }
            out[2 * m] = found.before;
            out[2 * m + 1] = found.after;
        }
    });
}

template <bool Squared>
void sums_as(const Array& base, const std::vector<Array>& models, const std::vector<Mask>& masks,
             const std::vector<uint64_t*>& notes, DType working, bool storage_rounding, uint64_t start, uint64_t count,
             int threads, double* sums) {
    with_dtype(working, [&](auto dtype) {
        // A magnitude of 32 bits, and any number of 64, is rounded already.
        constexpr bool narrow = sizeof(typename Storage<dtype()>::Bits) == 2;
        constexpr bool may_round = narrow || (Squared && dtype() == DType::F32);
        using Rounding = std::conditional_t<may_round, RoundedTo<dtype()>, Unrounded>;
        if (storage_rounding && may_round) {
            sums_of<dtype(), Rounding, Squared>(base, models, masks, notes, start, count, threads, sums);
        } else {
            sums_of<dtype(), Unrounded, Squared>(base, models, masks, notes, start, count, threads, sums);
        }
    });
}

}  // namespace

void l1_norms(const Array& base, const std::vector<Array>& models, const std::vector<Mask>& masks,
              const std::vector<uint64_t*>& notes, DType working, bool storage_rounding, uint64_t start,
              uint64_t count, int threads, double* sums) {
    sums_as<false>(base, models, masks, notes, working, storage_rounding, start, count, threads, sums);
}

void squares(const Array& base, const std::vector<Array>& models, const std::vector<Mask>& masks,
             const std::vector<uint64_t*>& notes, DType working, bool storage_rounding, uint64_t start,
             uint64_t count, int threads, double* sums) {
    sums_as<true>(base, models, masks, notes, working, storage_rounding, start, count, threads, sums);
}

}  // namespace ME_ISA
}  // namespace merge_engine
