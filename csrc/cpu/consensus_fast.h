// The common merge in one pass through registers, from inputs to output.
#pragma once

#include <algorithm>
#include <vector>

#include "consensus_general.h"
#include "mask_kernel.h"
#include "rounding_lanes.h"

namespace merge_engine {
namespace ME_ISA {

// Steps 1 to 8 for dtypes that compute in float32.
//
// A tile has two passes: which elements does each model keep, and what becomes of them. In the second, nothing is NaN or
// infinite. Tiles that are not like that are left to consensus_general.
template <DType Working, class Rounding>
class ConsensusFast {
  public:
    static bool serves(const Consensus& op) {
        const auto odd = [&](const Entry& entry) {
            return (weighs_last(op.election) && slack(entry)) || (ROUNDS && entry.weight == 0);
        };
        return !op.entries.empty() && op.entries.size() <= MANY &&
               std::none_of(op.entries.begin(), op.entries.end(), odd);
    }

    explicit ConsensusFast(const Consensus& op) : op_(op) {
        const bool last = weighs_last(op.election);
        for (const Entry& entry : op.entries) {
            const float weight = static_cast<float>(entry.weight), rescale = static_cast<float>(entry.rescale);
            masks_.emplace_back(entry.mask, !ROUNDS && weight != 0);
            Model model;
            model.weight = op.wide ? weight : Rounding::round(weight);
            model.rescale = Rounding::round(rescale);
            model.of_elements = by_probability(entry);
            model.scales = rescale != 1 || model.of_elements;
            model.leaves_equal = masks_.back().leaves_equal();
            model.strength = static_cast<float>(1.0 + entry.vote_slack);
            model.retain = static_cast<float>(entry.retain_slack);
            retains_ |= model.retain != 0;
            const float smallest = bits_of<float>(masks_.back().smallest_kept());
            const float scaled = Rounding::round(smallest * std::min(model.rescale, 1.0f));
            model.may_vanish = scaled == 0 || (!last && Rounding::round(scaled * model.weight) == 0);
            models_.push_back(model);
        }
        merge_tile_ = merge_for(op, models_);
    }

    // Merges elements [first, last) of the chunk; index 0 of the chunk is element `start` of the tensor.
    void merge(uint64_t start, uint64_t first, uint64_t last, Counts* counts, uint64_t* non_finite) const {
        std::vector<Part> parts(models_.size());
        for (uint64_t at = first; at < last; at += TILE) {
            const int width = static_cast<int>(std::min<uint64_t>(TILE, last - at));
            if ((this->*merge_tile_)(parts.data(), start, at, width, counts)) continue;
            consensus_general(op_, start, at, at + static_cast<uint64_t>(width), counts, non_finite);
        }
    }

  private:
    using Bits = typename Storage<Working>::Bits;
    using Vectors = StorageLanes<Working>;
    static constexpr bool ROUNDS = !std::is_same_v<Rounding, Unrounded>;
    static constexpr Election SLACK = Election::Count;  // stands for votes by count, and for both with slacks
    static constexpr size_t MANY = 32;                  // models, for which there are no loops of their own
    static constexpr int STRIP = 4;                     // vectors whose sums are in registers at a time

    struct Model {
        float weight, rescale, strength, retain;
        bool scales, of_elements;  // multiplied with a factor, and with one for each element
        bool leaves_equal;         // see MaskKernel
        bool may_vanish;           // a vote may be 0 where the mask keeps an element
    };

    // Of one model in one tile.
    struct Part {
        const Bits* bits;
        TileBits kept;             // ordered
        uint64_t unequal;          // of these, those that differ from the base, if the mask leaves that open
        uint64_t survived, voted;  // of these, those that are not 0 once they are scaled, and once they are weighted
        uint64_t retained, saved;
        float factor[TILE];  // of each element, ordered, where they differ
        Bits room[TILE];
    };
    using Strip = Floats[STRIP];

    static bool slack(const Entry& entry) { return entry.vote_slack != 0 || entry.retain_slack != 0; }

    // Plain: the result is stored as it is summed, and nothing is multiplied but by weights.
    using MergeTile = bool (ConsensusFast::*)(Part*, uint64_t, uint64_t, int, Counts*) const;
    static MergeTile merge_for(const Consensus& op, const std::vector<Model>& models) {
        const auto odd = [](const Model& model) { return model.scales || model.may_vanish; };
        const bool plain = !ROUNDS && op.output.dtype == Working && op.lambda == 1 &&
                           std::none_of(models.begin(), models.end(), odd);
        switch (plain ? models.size() : MANY) {
            case 1: return merge_for<1, true>(op);
            case 2: return merge_for<2, true>(op);
            default: return plain ? merge_for<MANY, true>(op) : merge_for<MANY, false>(op);
        }
    }
    template <size_t N, bool Plain>
    static MergeTile merge_for(const Consensus& op) {
        switch (op.election) {
            case Election::None: return &ConsensusFast::merge_tile<N, Plain, Election::None>;
            case Election::Deltas: return &ConsensusFast::merge_tile<N, Plain, Election::Deltas>;
            case Election::Overlap: return &ConsensusFast::merge_tile<N, Plain, Election::Overlap>;
            default:
                return op.election == Election::Count || std::any_of(op.entries.begin(), op.entries.end(), slack)
                           ? &ConsensusFast::merge_tile<MANY, false, SLACK>
                           : &ConsensusFast::merge_tile<N, Plain, Election::Sum>;
        }
    }

    // False, with nothing counted, if the tile is not as it must be.
    template <size_t N, bool Plain, Election How>
    bool merge_tile(Part* parts, uint64_t start, uint64_t at, int width, Counts* counts) const {
        Bits base_room[TILE], room[TILE];
        float wide[TILE];
        const Bits* base = whole_groups<Working>(op_.base, at, width, base_room);
        Ints largest = {};
        for (size_t i = 0; i < models_.size(); ++i) {
            Part& part = parts[i];
            const Entry& entry = op_.entries[i];
            part.bits = whole_groups<Working>(entry.model, at, width, part.room);
            masks_[i].keep(part.bits, base, start + at, at, width, part.kept, largest);
            part.unequal = part.survived = part.voted = part.retained = part.saved = 0;
            if (by_probability(entry)) order_factors(entry.mask.thresholds + at, width, part.factor);
        }
        if (any_at_least(largest, smallest_infinite<Rounding>())) return false;
        const bool direct = op_.output.dtype == Working;
        Bits* output = static_cast<Bits*>(op_.output.data) + at;
        Bits* merged = direct && width % GROUP == 0 ? output : room;
        if (!merge_groups<N, Plain, How>(parts, base, width, merged, direct ? nullptr : wide)) return false;
        if (!direct) {
            if (store_tile(op_.output, at, width, wide) > 0) return false;
        } else if (merged != output) {
            std::memcpy(output, merged, static_cast<size_t>(width) * sizeof(Bits));
        }
        for (size_t i = 0; i < models_.size(); ++i) {
            const Part& part = parts[i];
            const uint64_t kept = models_[i].leaves_equal ? part.unequal : static_cast<uint64_t>(part.kept.size());
            counts[i].kept += models_[i].may_vanish ? part.survived : kept;
            if (elects(How)) counts[i].lost += (models_[i].may_vanish ? part.voted : kept) - part.retained;
            counts[i].saved += part.saved;
        }
        return true;
    }

    static void order_factors(const uint32_t* thresholds, int width, float* factor) {
        float natural[TILE] = {};
        for (int j = 0; j < width; ++j) natural[j] = inverse<float>(thresholds[j]);
        for (int at = 0; at < width; at += GROUP) {
            for (int j = 0; j < HALF; ++j) factor[at + j] = natural[at + Vectors::place(j)];
            for (int j = HALF; j < GROUP; ++j) factor[at + j] = natural[at + Vectors::place(j)];
        }
    }

    static constexpr bool elects(Election how) { return how == Election::Sum || how == SLACK || how == Election::Deltas; }
    static ME_INLINE Floats rounded(Floats v) { return round_lanes<Rounding>(v); }
    // Of what may be wide.
    ME_INLINE Floats narrow(Floats v) const { return ROUNDS && !op_.wide ? rounded(v) : v; }

    // Writes the result to `merged`, or in float and in natural order to `wide` if that is given. False if there are
    // values that are not finite in `merged`.
    template <size_t N, bool Plain, Election How>
    bool merge_groups(Part* parts, const Bits* base, int width, Bits* merged, float* wide) const {
        typename Vectors::Magnitudes largest = {};
        for (int at = 0; at < width; at += GROUP) {
            // Of the next tile: its first pass would wait for them, this one has time.
            prefetch_group(base + at + TILE);
            for (size_t i = 0; i < models_.size(); ++i) prefetch_group(parts[i].bits + at + TILE);
            float ordered[GROUP];
            for (int j = 0; j < HALF; j += STRIP / 2 * LANES) {
                Strip b, result;
                load_strip(base + at, j, b);
                merge_strip<N, Plain, How>(parts, at, j, b, result);
#pragma GCC unroll 2
                for (int v = 0; v < STRIP / 2; ++v) {
                    const int place = j + v * LANES;
                    if (!Plain && wide) {
                        store(ordered + place, result[2 * v]), store(ordered + HALF + place, result[2 * v + 1]);
                    } else {
                        const auto stored = Vectors::store(result[2 * v], result[2 * v + 1], merged + at, place);
                        largest = larger(largest, stored);
                    }
                }
            }
            if (!Plain && wide) {
                for (int j = 0; j < HALF; ++j) {
                    wide[at + Vectors::place(j)] = ordered[j], wide[at + Vectors::place(HALF + j)] = ordered[HALF + j];
                }
            }
        }
        return !any_at_least(largest, Vectors::INFINITE);
    }

    // A strip takes turns between the halves of a group. Where its vectors are in the order of elements:
    static constexpr int place(int v, int j) { return v % 2 * HALF + j + v / 2 * LANES; }
    static ME_INLINE void load_strip(const Bits* group, int j, Strip& strip) {
#pragma GCC unroll 2
        for (int v = 0; v < STRIP; v += 2) {
            strip[v] = Vectors::template load<0>(group, j + v / 2 * LANES);
            strip[v + 1] = Vectors::template load<1>(group, j + v / 2 * LANES);
        }
    }

    // Steps 5 to 8, or 21.
    template <size_t N, bool Plain, Election How>
    ME_INLINE void merge_strip(Part* parts, int at, int j, const Strip& b, Strip& result) const {
        const size_t n = N == MANY ? models_.size() : N;
        constexpr bool starts = Plain && N != MANY;  // a sum without adding to 0, where no vote is -0
        Strip values[N], sum = {}, mean = {}, weights = {};
#pragma GCC unroll 2
        for (size_t i = 0; i < n; ++i) {
            weigh<Plain, How>(models_[i], parts[i], at, j, b, values[i]);
#pragma GCC unroll 4
            for (int v = 0; v < STRIP; ++v) sum[v] = starts && i == 0 ? values[i][v] : sum[v] + values[i][v];
        }
        if constexpr (How == Election::Sum || How == Election::Deltas) {
            retain<N, How>(parts, values, sum, mean, weights);
        } else if constexpr (How == SLACK) {
            retain_with_slacks(parts, values, sum, mean, weights);
        } else if constexpr (How == Election::Overlap) {
            add_overlapping(values, mean);
        } else {
            for (int v = 0; v < STRIP; ++v) mean[v] = sum[v];
        }
        const Floats lambda = every(static_cast<float>(op_.lambda));
        if (op_.normalize && How == Election::None) {
            for (int v = 0; v < STRIP; ++v) mean[v] = narrow(mean[v]) / every(static_cast<float>(op_.divisor));
        } else if (op_.normalize && How != Election::Overlap) {
#pragma GCC unroll 4
            for (int v = 0; v < STRIP; ++v) {
                const Floats divisor = rounded(weights[v]), m = narrow(mean[v]);
                mean[v] = where(differ(divisor, Floats{}), m / divisor, m);
            }
        }
#pragma GCC unroll 4
        for (int v = 0; v < STRIP; ++v) {
            Floats m = narrow(mean[v]);
            if (!Plain && op_.lambda != 1) m = narrow(m * lambda);
            result[v] = narrow(b[v] + m);
        }
    }

    // Step 5: v of a model.
    template <bool Plain, Election How>
    ME_INLINE void weigh(const Model& model, Part& part, int at, int j, const Strip& b, Strip& value) const {
        const Floats zero = {}, rescale = every(model.rescale), weight = every(model.weight);
        Strip x;
        load_strip(part.bits + at, j, x);
        Truth keeps[STRIP];
#pragma GCC unroll 4
        for (int v = 0; v < STRIP; ++v) keeps[v] = part.kept.lanes(at + place(v, j));
        if (model.leaves_equal) {
            uint64_t unequal = 0;
#pragma GCC unroll 4
            for (int v = 0; v < STRIP; ++v) {
                keeps[v] = keeps[v] & differ(x[v], b[v]);
                unequal |= bits_of_lanes(keeps[v]) << v * LANES;
            }
            part.unequal += size(unequal);
        }
        uint64_t survived = 0, voted = 0;
#pragma GCC unroll 4
        for (int v = 0; v < STRIP; ++v) {
            Floats scaled = rounded(x[v] - b[v]);
            if (!Plain && model.of_elements) {
                scaled = rounded(scaled * load<Floats>(part.factor + at + place(v, j)));
            } else if (!Plain && model.scales) {
                scaled = rounded(scaled * rescale);
            }
            const Floats vote = weighs_last(How) ? scaled : rounded(scaled * weight);
            value[v] = where(keeps[v], vote, zero);
            if (!Plain && model.may_vanish) {
                survived |= bits_of_lanes(keeps[v] & differ(scaled, zero)) << v * LANES;
                voted |= bits_of_lanes(differ(value[v], zero)) << v * LANES;
            }
        }
        if (!Plain && model.may_vanish) part.survived += size(survived), part.voted += size(voted);
    }

    // Step 7 for votes that are the values themselves. A value that agrees is positive once the sign of the sum is taken
    // away from both; a sum of 0 elects +. What is not a number stays, so that it is seen in the output.
    template <size_t N, Election How>
    ME_INLINE void retain(Part* parts, const Strip (&values)[N], const Strip& sum, Strip& mean, Strip& weights) const {
        const size_t n = N == MANY ? models_.size() : N;
        const Floats zero = {};
        Words sign[STRIP];
#pragma GCC unroll 4
        for (int v = 0; v < STRIP; ++v) sign[v] = (Words)rounded(sum[v]) & 0x80000000u;
#pragma GCC unroll 2
        for (size_t i = 0; i < n; ++i) {
            const Floats weight = every(models_[i].weight);
            uint64_t retained = 0;
#pragma GCC unroll 4
            for (int v = 0; v < STRIP; ++v) {
                const Floats value = (Floats)((Words)values[i][v] ^ sign[v]);
                const Truth stays = not_at_most(value, zero);
                const Floats part = How == Election::Deltas ? rounded(value * weight) : value;
                mean[v] = i == 0 ? where(stays, part, zero) : where(stays, mean[v] + part, mean[v]);
                weights[v] = i == 0 ? where(stays, weight, zero) : where(stays, weights[v] + weight, weights[v]);
                retained |= bits_of_lanes(stays) << v * LANES;
            }
            parts[i].retained += size(retained);
        }
#pragma GCC unroll 4
        for (int v = 0; v < STRIP; ++v) {
            mean[v] = (Floats)((Words)mean[v] ^ sign[v]);
            if (How == Election::Deltas) mean[v] += zero;  // there may be weights of 0, and a sum of them is not -0
        }
    }

    // Steps 6 and 7 with slacks, or with votes by count.
    template <size_t N>
    ME_INLINE void retain_with_slacks(Part* parts, const Strip (&values)[N], const Strip& total, Strip& mean,
                                      Strip& weights) const {
        const size_t n = N == MANY ? models_.size() : N;
        const bool by_count = op_.election == Election::Count;
        Strip sum = {}, plain = {}, magnitude = {};
#pragma GCC unroll 2
        for (size_t i = 0; i < n; ++i) {
            const Floats strength = every(models_[i].strength);
#pragma GCC unroll 4
            for (int v = 0; v < STRIP; ++v) {
                const Floats value = values[i][v];
                const Floats one = (Floats)(((Words)value & 0x80000000u) | (Words)every(1.0f));
                const Floats vote = by_count ? where(differ(value, Floats{}), one, Floats{}) : value;
                plain[v] += vote;
                sum[v] += vote * strength;
                magnitude[v] += absolute(vote);
            }
        }
        Truth positive[STRIP], plainly[STRIP];
        Strip margin;
#pragma GCC unroll 4
        for (int v = 0; v < STRIP; ++v) {
            positive[v] = at_least(rounded(sum[v]), Floats{});
            plainly[v] = at_least(rounded(plain[v]), Floats{});
            margin[v] = absolute(rounded(sum[v]));
            mean[v] = total[v] - total[v];  // 0, or NaN where a value is not finite
        }
#pragma GCC unroll 2
        for (size_t i = 0; i < n; ++i) {
            const Floats weight = every(models_[i].weight), slack = every(models_[i].retain);
            const Truth always = at_least(slack, every(1.0f));
            uint64_t retained = 0, saved = 0;
#pragma GCC unroll 4
            for (int v = 0; v < STRIP; ++v) {
                const Floats value = values[i][v];
                const Truth votes = differ(value, Floats{}), negative = less(value, Floats{});
                Truth stays = negative ^ positive[v];
                if (retains_) stays = stays | less(margin[v], slack * magnitude[v]) | always;
                stays = stays & votes;
                mean[v] = where(stays, mean[v] + value, mean[v]);
                weights[v] = where(stays, weights[v] + weight, weights[v]);
                retained |= bits_of_lanes(stays) << v * LANES;
                saved |= bits_of_lanes(stays & ~(negative ^ plainly[v])) << v * LANES;
            }
            parts[i].retained += size(retained);
            parts[i].saved += size(saved);
        }
    }

    // Step 21.
    template <size_t N>
    ME_INLINE void add_overlapping(const Strip (&values)[N], Strip& mean) const {
        const size_t n = N == MANY ? models_.size() : N;
        Ints keeping[STRIP] = {};
#pragma GCC unroll 2
        for (size_t i = 0; i < n; ++i) {
#pragma GCC unroll 4
            for (int v = 0; v < STRIP; ++v) {
                keeping[v] = count(keeping[v], differ(values[i][v], Floats{}));
            }
        }
#pragma GCC unroll 2
        for (size_t i = 0; i < n; ++i) {
            const Floats weight = every(models_[i].weight);
#pragma GCC unroll 4
            for (int v = 0; v < STRIP; ++v) {
                const Floats value = values[i][v];
                const Floats shared = rounded(value / __builtin_convertvector(keeping[v], Floats));
                const Floats part = where(less(Ints{} + 1, keeping[v]), shared, narrow(value * weight));
                mean[v] = where(differ(value, Floats{}), mean[v] + part, mean[v]);
            }
        }
    }

    static ME_INLINE Floats absolute(Floats v) { return (Floats)((Words)v & 0x7FFFFFFFu); }
    static ME_INLINE uint64_t size(uint64_t set) { return static_cast<uint64_t>(__builtin_popcountll(set)); }

    const Consensus& op_;
    std::vector<MaskKernel<Working>> masks_;
    std::vector<Model> models_;
    bool retains_ = false;
    MergeTile merge_tile_;
};

}  // namespace ME_ISA
}  // namespace merge_engine
