// The common merge in one pass through registers, from inputs to output.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "sieve.h"
#include "storage_lanes.h"

namespace merge_engine {
namespace ME_ISA {

// Steps 1 to 8 for dtypes that compute in float32, without rounding in between, slack or votes by count.
template <DType Working>
class PlainMerger {
  public:
    static bool serves(const Consensus& op) {
        const auto slack = [](const Entry& entry) { return entry.vote_slack != 0 || entry.retain_slack != 0; };
        return op.election != Election::Count && !op.storage_rounding && op.output.dtype == Working &&
               !op.entries.empty() && op.entries.size() <= MANY &&
               std::none_of(op.entries.begin(), op.entries.end(), slack);
    }

    explicit PlainMerger(const Consensus& op) : op_(op), merge_tiles_(loops_for(op)) {
        for (const Entry& entry : op.entries) sieves_.emplace_back(entry.mask);
    }

    // Merges elements [first, last) of the chunk; index 0 of the chunk is element `start` of the tensor.
    void merge(uint64_t start, uint64_t first, uint64_t last, Counts* counts, uint64_t* non_finite) const {
        (this->*merge_tiles_)(start, first, last, counts, non_finite);
    }

  private:
    using Bits = typename Storage<Working>::Bits;
    using Vectors = StorageLanes<Working>;
    static constexpr int MANY = 32;  // models, for which there are no loops of their own

    // What the task vector of a model is multiplied with: one factor, or one for each element of the tile.
    struct Factors {
        float factor[TILE];
        bool differ;

        ME_INLINE Floats lanes(int j) const { return load<Floats>(factor + (differ ? j : 0)); }
    };
    void set_factors(size_t i, uint64_t offset, int width, Factors& factors) const {
        const Entry& entry = op_.entries[i];
        factors.differ = by_probability(entry);
        if (!factors.differ) return store(factors.factor, Floats{} + static_cast<float>(entry.rescale));
        for (int j = 0; j < width; ++j) factors.factor[j] = inverse<float>(entry.mask.thresholds[offset + j]);
    }

    using Loops = void (PlainMerger::*)(uint64_t, uint64_t, uint64_t, Counts*, uint64_t*) const;
    static Loops loops_for(const Consensus& op) {
        switch (op.entries.size()) {
            case 1: return loops_for<1>(op);
            case 2: return loops_for<2>(op);
            case 3: return loops_for<3>(op);
            case 4: return loops_for<4>(op);
            default: return loops_for<MANY>(op);
        }
    }
    template <int N>
    static Loops loops_for(const Consensus& op) {
        if (op.election == Election::None) {
            return op.normalize ? &PlainMerger::merge_tiles<N, false, true>
                                : &PlainMerger::merge_tiles<N, false, false>;
        }
        return op.normalize ? &PlainMerger::merge_tiles<N, true, true> : &PlainMerger::merge_tiles<N, true, false>;
    }

    // Of a tile no more is kept than which ties and draws stay.
    template <int N, bool Elects, bool Normalize>
    void merge_tiles(uint64_t start, uint64_t first, uint64_t last, Counts* counts, uint64_t* non_finite) const {
        const size_t n = op_.entries.size();
        Bits room[N + 2][TILE];
        Ints survived[N] = {}, lost[N] = {};
        for (uint64_t at = first; at < last; at += TILE) {
            const int width = static_cast<int>(std::min<uint64_t>(TILE, last - at));
            const Bits *base = whole_tile(op_.base, at, width, room[N]), *models[N];
            Bits* merged = width < TILE ? room[N + 1] : static_cast<Bits*>(op_.output.data) + at;
            TileBits stay[N];
            Factors rescale[N];
            for (size_t i = 0; i < n; ++i) {
                models[i] = whole_tile(op_.entries[i].model, at, width, room[i]);
                stay[i] = staying(i, models[i], base, start + at, at, width);
                set_factors(i, at, width, rescale[i]);
            }
            if (!merge_rows<N, Elects, Normalize>(models, base, stay, rescale, width, merged, survived, lost)) {
                non_finite[0] += non_finite_in<Working>(base, width);
                for (size_t i = 0; i < n; ++i) non_finite[1 + i] += non_finite_in<Working>(models[i], width);
                non_finite[n + 1] += non_finite_in<Working>(merged, width);
            }
            const size_t bytes = static_cast<size_t>(width) * sizeof(Bits);
            if (width < TILE) std::memcpy(static_cast<Bits*>(op_.output.data) + at, merged, bytes);
        }
        for (size_t i = 0; i < n; ++i) counts[i].kept += total(survived[i]), counts[i].lost += total(lost[i]);
    }

    // A tile of an input that may be read beyond its width.
    static const Bits* whole_tile(const Array& array, uint64_t at, int width, Bits (&room)[TILE]) {
        const Bits* bits = tile_of<Working>(array, at, width, room);
        if (width == TILE || bits == room) return bits;
        std::memcpy(room, bits, static_cast<size_t>(width) * sizeof(Bits));
        return room;
    }

    TileBits staying(size_t i, const Bits* model, const Bits* base, uint64_t index, uint64_t offset, int width) const {
        const Sieve<Working>& sieve = sieves_[i];
        if (!sieve.by_position()) return first_bits(width);
        return sieve.staying(index, offset, width, [&](const Window<uint32_t>& window) {
            const Window<Words> lanes = {Words{} + window.first, Words{} + window.span};
            return bits_where(width, [&](int j) {
                const Floats delta = Vectors::load(model + j) - Vectors::load(base + j);
                return lanes.holds((Words)delta & 0x7FFFFFFFu);
            });
        });
    }

    // Steps 1 to 8, given which elements stay for their positions. False if there may be values that are not finite: a
    // task vector entry is no more finite than what it is the difference of.
    template <int N, bool Elects, bool Normalize>
    bool merge_rows(const Bits* const (&models)[N], const Bits* base, const TileBits (&stay)[N],
                    const Factors (&rescale)[N], int width, Bits* merged, Ints (&survived)[N], Ints (&lost)[N]) const {
        const Floats zero = {}, one = zero + 1.0f;
        const Floats nothing = Elects ? -zero : zero;  // a sum of votes that starts from -0 saves an addition
        const Floats lambda = zero + static_cast<float>(op_.lambda), divisor = zero + static_cast<float>(op_.divisor);
        const int n = N == MANY ? static_cast<int>(op_.entries.size()) : N;
        Floats weight[N];
        Window<Words> band[N];
        for (int i = 0; i < n; ++i) {
            weight[i] = zero + static_cast<float>(op_.entries[static_cast<size_t>(i)].weight);
            band[i] = sieves_[static_cast<size_t>(i)].band();
        }
        Ints largest = {};
        for (int j = 0; j < width; j += LANES) {
            const Floats b = Vectors::load(base + j);
            Floats value[N], sum = nothing;
#pragma GCC unroll 4
            for (int i = 0; i < n; ++i) {
                const Floats delta = Vectors::load(models[i] + j) - b;
                const Words magnitude = (Words)delta & 0x7FFFFFFFu;
                largest = larger(largest, (Ints)magnitude);
                const Truth stays = band[i].holds(magnitude) & stay[i].lanes(j);
                const Floats scaled = delta * rescale[i].lanes(j);
                survived[i] = count(survived[i], stays & differ(scaled, zero));
                value[i] = where(stays, scaled * weight[i], zero);
                sum += value[i];
            }
            Floats mean = sum;
            if (Elects) {
                const Truth positive = at_least(sum, zero);
                Floats weights = mean = nothing;
#pragma GCC unroll 4
                for (int i = 0; i < n; ++i) {
                    const Truth votes = differ(value[i], zero);
                    const Truth retained = votes & ~(greater(value[i], zero) ^ positive);
                    mean += where(retained, value[i], zero);
                    if (Normalize) weights += where(retained, weight[i], zero);
                    lost[i] = count(lost[i], votes ^ retained);
                }
                if (Normalize) mean /= where(differ(weights, zero), weights, one);
            } else if (Normalize) {
                mean /= divisor;
            }
            const Floats result = b + mean * lambda;
            largest = larger(largest, (Ints)result & 0x7FFFFFFF);
            Vectors::store(result, merged + j);
        }
        return bits_of_lanes(less((Words)largest, Words{} + infinity_)) == (1ull << LANES) - 1;
    }

    const Consensus& op_;
    std::vector<Sieve<Working>> sieves_;
    const Loops merge_tiles_;
    // Where magnitudes begin that are infinite in the working dtype.
    uint32_t infinity_ = static_cast<uint32_t>(Sieve<Working>::first_of(magnitude_key<Working>(INFINITY)));
};

}  // namespace ME_ISA
}  // namespace merge_engine
