// The common merge in one pass through registers, from inputs to output.
#pragma once

#include <algorithm>
#include <vector>

#include "consensus_general.h"
#include "mask_kernel.h"

namespace merge_engine {
namespace ME_ISA {

// Steps 1 to 8 for dtypes that compute in float32, without rounding in between.
//
// A tile has two passes: which elements does each model keep, and what becomes of them. In the second, an element that
// is kept has a vote that is not 0, and nothing is NaN or infinite. Tiles that are not like that are left to
// consensus_general.
template <DType Working>
class ConsensusFast {
  public:
    static bool serves(const Consensus& op) {
        const bool last = weighs_last(op.election);
        const auto factors = [&](const Entry& entry) { return slack(entry) || scales(entry); };
        return !(last && (op.lambda != 1 || std::any_of(op.entries.begin(), op.entries.end(), factors))) &&
               !op.storage_rounding && op.output.dtype == Working && !op.entries.empty() && op.entries.size() <= MANY;
    }

    explicit ConsensusFast(const Consensus& op) : op_(op), merge_tile_(merge_for(op)) {
        for (const Entry& entry : op.entries) {
            masks_.emplace_back(entry.mask, entry.weight != 0);
            const float rescale = static_cast<float>(entry.rescale), weight = static_cast<float>(entry.weight);
            const uint32_t smallest = first_that(MaskKernel<Working>::SIGN, [&](uint32_t magnitude) {
                const float scaled = bits_of<float>(magnitude) * rescale;
                return scaled != 0 && (scaled * weight != 0 || weight == 0 || weighs_last(op.election));
            });
            smallest_nonzero_vote_.push_back(smallest > masks_.back().smallest_kept() ? smallest : 0);
        }
    }

    // Merges elements [first, last) of the chunk; index 0 of the chunk is element `start` of the tensor.
    void merge(uint64_t start, uint64_t first, uint64_t last, Counts* counts, uint64_t* non_finite) const {
        for (uint64_t at = first; at < last; at += TILE) {
            const int width = static_cast<int>(std::min<uint64_t>(TILE, last - at));
            if ((this->*merge_tile_)(start, at, width, counts)) continue;
            consensus_general(op_, start, at, at + static_cast<uint64_t>(width), counts, non_finite);
        }
    }

  private:
    using Bits = typename Storage<Working>::Bits;
    using Vectors = StorageLanes<Working>;
    static constexpr size_t MANY = 32;  // models, for which there are no loops of their own
    static constexpr Election SLACK = Election::Count;  // stands for votes by count, and for both with slacks

    // What the task vector of a model is multiplied with: one factor, or one for each element of the tile, ordered.
    struct Factors {
        float factor[TILE];
        int places;  // all bits, or none if they are all the same

        ME_INLINE Floats lanes(int j) const { return load<Floats>(factor + (j & places)); }
    };
    void set_factors(size_t i, uint64_t offset, int width, Factors& factors) const {
        const Entry& entry = op_.entries[i];
        factors.places = by_probability(entry) ? -1 : 0;
        if (!factors.places) return store(factors.factor, every(static_cast<float>(entry.rescale)));
        float natural[TILE] = {};
        for (int j = 0; j < width; ++j) natural[j] = inverse<float>(entry.mask.thresholds[offset + j]);
        for (int at = 0; at < width; at += GROUP) {
            for (int j = 0; j < HALF; ++j) factors.factor[at + j] = natural[at + Vectors::place(j)];
            for (int j = HALF; j < GROUP; ++j) factors.factor[at + j] = natural[at + Vectors::place(j)];
        }
    }

    // Of one model in one tile.
    struct Part {
        const Bits* bits;
        TileBits kept;
        const TileBits* votes;
        Factors rescale;
    };

    // Steps 6 and 7: what the slacks make of an election.
    template <size_t N>
    struct Slacks {
        struct Ballot {
            Floats margin, magnitude;           // |S| and T
            Truth positive, plainly_positive;  // the elected sign, with and without slack
        };

        explicit Slacks(const Consensus& op) : one(op.election == Election::Count ? (Words)every(1.0f) : Words{}) {
            for (size_t i = 0; i < op.entries.size(); ++i) {
                strength[i] = every(static_cast<float>(1.0 + op.entries[i].vote_slack));
                const float slack = static_cast<float>(op.entries[i].retain_slack);
                retain[i] = every(slack);
                always[i] = at_least(retain[i], every(1.0f));
                retains |= slack != 0;
            }
        }

        ME_INLINE Ballot count(const Floats (&value)[N], size_t n) const {
            Floats sum = {}, plain = {}, magnitude = {};
#pragma GCC unroll 4
            for (size_t i = 0; i < n; ++i) {
                const Words sign = (Words)value[i] & 0x80000000u;
                const Words by_count = ((Words)value[i] & 0x7FFFFFFFu) == 0 ? Words{} : one | sign;
                const Floats vote = by_sum() ? value[i] : (Floats)by_count;
                plain += vote;
                sum += vote * strength[i];
                magnitude += (Floats)((Words)vote & 0x7FFFFFFFu);
            }
            return {(Floats)((Words)sum & 0x7FFFFFFFu), magnitude, at_least(sum, Floats{}), at_least(plain, Floats{})};
        }
        // Where an entry is kept that lost narrowly.
        ME_INLINE Truth narrow(size_t i, const Ballot& ballot) const {
            return retains ? less(ballot.margin, retain[i] * ballot.magnitude) | always[i] : Truth{};
        }
        ME_INLINE bool by_sum() const { return one[0] == 0; }

        Words one;  // the bits of 1 if votes are counted
        Floats strength[N], retain[N];
        Truth always[N];
        bool retains = false;
    };

    using MergeTile = bool (ConsensusFast::*)(uint64_t, uint64_t, int, Counts*) const;
    static MergeTile merge_for(const Consensus& op) {
        switch (op.entries.size()) {
            case 1: return merge_for<1>(op);
            case 2: return merge_for<2>(op);
            case 3: return merge_for<3>(op);
            case 4: return merge_for<4>(op);
            default: return merge_for<MANY>(op);
        }
    }
    static bool scales(const Entry& entry) { return entry.rescale != 1 || by_probability(entry); }
    static bool slack(const Entry& entry) { return entry.vote_slack != 0 || entry.retain_slack != 0; }
    template <size_t N>
    static MergeTile merge_for(const Consensus& op) {
        if (op.election == Election::Overlap) return &ConsensusFast::merge_tile<N, false, Election::Overlap, false>;
        if (op.election == Election::Deltas) return merge_for<N, false, Election::Deltas>(op);
        if (op.election == Election::Count || std::any_of(op.entries.begin(), op.entries.end(), slack)) {
            return &ConsensusFast::merge_tile<N, true, SLACK, true>;  // it looks itself whether to normalize
        }
        return op.lambda != 1 || std::any_of(op.entries.begin(), op.entries.end(), scales) ? merge_for<N, true>(op)
                                                                                           : merge_for<N, false>(op);
    }
    template <size_t N, bool Scales>
    static MergeTile merge_for(const Consensus& op) {
        return op.election == Election::None ? merge_for<N, Scales, Election::None>(op)
                                             : merge_for<N, Scales, Election::Sum>(op);
    }
    template <size_t N, bool Scales, Election How>
    static MergeTile merge_for(const Consensus& op) {
        return op.normalize ? &ConsensusFast::merge_tile<N, Scales, How, true>
                            : &ConsensusFast::merge_tile<N, Scales, How, false>;
    }

    // False, with nothing counted, if the tile is not as it must be.
    template <size_t N, bool Scales, Election How, bool Normalize>
    bool merge_tile(uint64_t start, uint64_t at, int width, Counts* counts) const {
        const size_t n = N == MANY ? op_.entries.size() : N;
        Bits room[N + 2][TILE];
        const Bits* base = whole_groups<Working>(op_.base, at, width, room[N]);
        Bits* merged = width % GROUP ? room[N + 1] : static_cast<Bits*>(op_.output.data) + at;
        static constexpr TileBits none = {};
        Part parts[N];
        Ints largest = {};
        for (size_t i = 0; i < n; ++i) {
            Part& part = parts[i];
            part.bits = whole_groups<Working>(op_.entries[i].model, at, width, room[i]);
            masks_[i].keep(part.bits, base, start + at, at, width, part.kept, largest);
            part.votes = op_.entries[i].weight != 0 || weighs_last(How) ? &part.kept : &none;
            const uint32_t needed = smallest_nonzero_vote_[i];
            if (needed && masks_[i].any_below(needed, part.bits, base, width)) return false;
            if (Scales) set_factors(i, at, width, part.rescale);
        }
        uint64_t retained[N] = {}, saved[N] = {};
        if (any_at_least(largest, StorageLanes<DType::F32>::INFINITE)) return false;
        if (!merge_groups<N, Scales, How, Normalize>(parts, base, width, merged, retained, saved)) return false;
        for (size_t i = 0; i < n; ++i) {
            counts[i].kept += static_cast<uint64_t>(parts[i].kept.size());
            if (elects(How)) counts[i].lost += static_cast<uint64_t>(parts[i].votes->size()) - retained[i];
            counts[i].saved += saved[i];
        }
        if (width % GROUP) {
            std::memcpy(static_cast<Bits*>(op_.output.data) + at, merged, static_cast<size_t>(width) * sizeof(Bits));
        }
        return true;
    }

    // The group of the next tile: the first pass would wait for it, the second has time.
    static ME_INLINE void prefetch(const Bits* group) {
        for (size_t byte = 0; byte < GROUP * sizeof(Bits); byte += 64) {
            __builtin_prefetch(reinterpret_cast<const char*>(group) + byte);
        }
    }

    static constexpr bool elects(Election how) { return how == Election::Sum || how == SLACK || how == Election::Deltas; }

    // Steps 5 to 8, or 21. False if there are values that are not finite.
    template <size_t N, bool Scales, Election How, bool Normalize>
    bool merge_groups(const Part (&parts)[N], const Bits* base, int width, Bits* merged,
                      uint64_t (&retained)[N], [[maybe_unused]] uint64_t (&saved)[N]) const {
        const Floats zero = {};
        const Floats divisor = every(static_cast<float>(op_.divisor));
        [[maybe_unused]] const Floats lambda = every(static_cast<float>(op_.lambda));
        const size_t n = N == MANY ? op_.entries.size() : N;
        Floats weight[N];
        for (size_t i = 0; i < n; ++i) weight[i] = every(static_cast<float>(op_.entries[i].weight));
        [[maybe_unused]] const Slacks<N> slacks(op_);
        const auto merged_lanes = [&](auto half, int at, int j) {
            const int place = at + half() * HALF + j;
            const Floats b = Vectors::template load<half()>(base + at, j);
            Floats value[N], sum = zero;
#pragma GCC unroll 4
            for (size_t i = 0; i < n; ++i) {
                const Floats delta = Vectors::template load<half()>(parts[i].bits + at, j) - b;
                const Floats scaled = Scales ? delta * parts[i].rescale.lanes(place) : delta;
                const Floats vote = weighs_last(How) ? scaled : scaled * weight[i];
                value[i] = where(parts[i].votes->lanes(place), vote, zero);
                sum = i == 0 ? value[i] : sum + value[i];
            }
            Floats mean = sum;
            if (How == Election::Overlap) {
                Ints keeping = {};
#pragma GCC unroll 4
                for (size_t i = 0; i < n; ++i) keeping = count(keeping, parts[i].votes->lanes(place));
                const Floats number = __builtin_convertvector(keeping, Floats);
                const Truth several = less(Ints{} + 1, keeping);
                mean = zero;
#pragma GCC unroll 4
                for (size_t i = 0; i < n; ++i) {
                    const Floats part = where(several, value[i] / number, value[i] * weight[i]);
                    mean = where(parts[i].votes->lanes(place), mean + part, mean);
                }
            } else if (How == Election::Deltas) {
                Floats weights = zero;
                mean = zero;
#pragma GCC unroll 4
                for (size_t i = 0; i < n; ++i) {
                    const Truth stays = of_one_sign(parts[i].votes->lanes(place), value[i], sum);
                    mean = where(stays, mean + value[i] * weight[i], mean);
                    if (Normalize) weights = where(stays, weights + weight[i], weights);
                    retained[i] += static_cast<uint64_t>(__builtin_popcountll(bits_of_lanes(stays)));
                }
                if (Normalize) mean = where(differ(weights, zero), mean / weights, mean);
            } else if (How == SLACK) {
                Floats weights = zero;
                const auto ballot = slacks.count(value, n);
                mean = zero;
#pragma GCC unroll 4
                for (size_t i = 0; i < n; ++i) {
                    const Truth votes = parts[i].votes->lanes(place), negative = less((Ints)value[i], Ints{});
                    const Truth stays = votes & ((negative ^ ballot.positive) | slacks.narrow(i, ballot));
                    mean = where(stays, mean + value[i], mean);
                    weights = where(stays, weights + weight[i], weights);
                    retained[i] += static_cast<uint64_t>(__builtin_popcountll(bits_of_lanes(stays)));
                    const Truth in_spite = stays & ~(negative ^ ballot.plainly_positive);
                    saved[i] += static_cast<uint64_t>(__builtin_popcountll(bits_of_lanes(in_spite)));
                }
                if (op_.normalize) mean = where(differ(weights, zero), mean / weights, mean);
            } else if (How == Election::Sum) {
                Floats weights = zero;
#pragma GCC unroll 4
                for (size_t i = 0; i < n; ++i) {
                    const Truth stays = of_one_sign(parts[i].votes->lanes(place), value[i], sum);
                    mean = i == 0 ? where(stays, value[i], zero) : where(stays, mean + value[i], mean);
                    if (Normalize) weights = where(stays, i == 0 ? weight[i] : weights + weight[i], weights);
                    retained[i] += static_cast<uint64_t>(__builtin_popcountll(bits_of_lanes(stays)));
                }
                if (Normalize) mean = where(differ(weights, zero), mean / weights, mean);
            } else if (Normalize) {
                mean /= divisor;
            }
            return Scales ? b + mean * lambda : b + mean;
        };
        typename Vectors::Magnitudes largest = {};
        for (int at = 0; at < width; at += GROUP) {
            prefetch(base + at + TILE);
            for (size_t i = 0; i < n; ++i) prefetch(parts[i].bits + at + TILE);
#pragma GCC unroll 8
            for (int j = 0; j < HALF; j += LANES) {
                const Floats first = merged_lanes(std::integral_constant<int, 0>{}, at, j);
                const Floats second = merged_lanes(std::integral_constant<int, 1>{}, at, j);
                largest = larger(largest, Vectors::store(first, second, merged + at, j));
            }
        }
        return !any_at_least(largest, Vectors::INFINITE);
    }

    const Consensus& op_;
    std::vector<MaskKernel<Working>> masks_;
    std::vector<uint32_t> smallest_nonzero_vote_;  // smallest magnitude whose weighted vote is not 0; 0: not to check
    const MergeTile merge_tile_;
};

}  // namespace ME_ISA
}  // namespace merge_engine
