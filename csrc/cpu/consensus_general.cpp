// The formulas of a merge, a tile and a step at a time.
#include "consensus_general.h"

#include <vector>

#include "mask_kernel.h"

namespace merge_engine {
namespace ME_ISA {
namespace {

// The numbers of one entry, rounded as the arithmetic demands.
template <class Real>
struct Scale {
    Real rescale, weight, vote, retain;
};

template <DType Working, class Rounding>
class ConsensusGeneral {
  public:
    using Real = typename RealOf<Working>::Type;

    explicit ConsensusGeneral(const Consensus& op) : op_(op) {
        for (const Entry& entry : op.entries) {
            masks_.emplace_back(entry.mask);
            const Real weight = static_cast<Real>(entry.weight);
            scales_.push_back({Rounding::round(static_cast<Real>(by_probability(entry) ? 1 : entry.rescale)),
                               op.wide ? weight : Rounding::round(weight),
                               static_cast<Real>(1.0 + entry.vote_slack), static_cast<Real>(entry.retain_slack)});
            slack_votes_ |= entry.vote_slack != 0;
            retains_ |= entry.retain_slack != 0;
        }
    }

    // Merges elements [first, last) of the chunk; index 0 of the chunk is element `start` of the tensor.
    void merge(uint64_t start, uint64_t first, uint64_t last, Counts* counts, uint64_t* non_finite) const {
        const size_t n = op_.entries.size();
        std::vector<Real> deltas(n * TILE);  // then v_i
        std::vector<uint32_t> kept(n * TILE);
        Real b[TILE] = {}, merged[TILE];
        for (uint64_t at = first; at < last; at += TILE) {
            const int width = static_cast<int>(std::min<uint64_t>(TILE, last - at));
            non_finite[0] += load_tile<Working>(op_.base, at, width, b);
            for (size_t i = 0; i < n; ++i) {
                const Entry& entry = op_.entries[i];
                Real* delta = deltas.data() + i * TILE;
                uint32_t* stays = kept.data() + i * TILE;
                non_finite[1 + i] +=
                    masks_[i].template read<Rounding>(entry.model, b, start + at, at, width, delta, stays);
                if (by_probability(entry)) divide_by_probability(entry.mask.thresholds + at, width, delta, stays);
            }
            merge_tile(deltas.data(), kept.data(), b, width, merged, counts);
            non_finite[n + 1] += store_tile(op_.output, at, width, merged);
        }
    }

  private:
    struct Votes {
        Real sum[TILE], plain[TILE], magnitude[TILE];
    };

    static void divide_by_probability(const uint32_t* ME_RESTRICT thresholds, int width, Real* ME_RESTRICT delta,
                                      const uint32_t* ME_RESTRICT kept) {
        for (int j = 0; j < width; ++j) {
            delta[j] = kept[j] ? Rounding::round(delta[j] * inverse<Real>(thresholds[j])) : Real(0);
        }
    }

    // Steps 5 to 8 in general.
    void merge_tile(Real* deltas, const uint32_t* kept, const Real* b, int width, Real* merged, Counts* counts) const {
        Real divisor[TILE];
        for (size_t i = 0; i < scales_.size(); ++i) weigh(i, kept + i * TILE, width, deltas + i * TILE, counts[i]);
        if (op_.election == Election::None) {
            sum_all(deltas, width, merged, divisor);
        } else if (op_.election == Election::Overlap) {
            overlap(deltas, width, merged);
        } else {
            Votes votes;
            elect(deltas, width, votes);
            for (int j = 0; j < width; ++j) merged[j] = divisor[j] = 0;
            for (size_t i = 0; i < scales_.size(); ++i) {
                retain(i, deltas + i * TILE, votes, width, merged, divisor, counts[i]);
            }
            for (int j = 0; j < width; ++j) divisor[j] = Rounding::round(divisor[j]);
            for (int j = 0; j < width; ++j) divisor[j] = divisor[j] == 0 ? Real(1) : divisor[j];
        }
        finish(b, merged, divisor, width);
    }

    // Step 5: v = w * (r * d) where the mask keeps the element, else 0. It takes the place of d. r * d if weights come
    // later.
    void weigh(size_t i, const uint32_t* ME_RESTRICT kept, int width, Real* ME_RESTRICT value, Counts& counts) const {
        const Scale<Real> scale = scales_[i];
        const Real weight = weighs_last(op_.election) ? Real(1) : scale.weight;
        uint32_t survived = 0;
        for (int j = 0; j < width; ++j) {
            const Real scaled = Rounding::round(value[j] * scale.rescale);
            survived += kept[j] & static_cast<uint32_t>(scaled != 0);
            value[j] = kept[j] ? Rounding::round(scaled * weight) : Real(0);
        }
        counts.kept += survived;
    }

    // Without an election every kept entry counts, and the divisor is the same everywhere.
    void sum_all(const Real* values, int width, Real* ME_RESTRICT mean, Real* ME_RESTRICT divisor) const {
        for (int j = 0; j < width; ++j) mean[j] = 0, divisor[j] = static_cast<Real>(op_.divisor);
        for (size_t i = 0; i < scales_.size(); ++i) {
            const Real* ME_RESTRICT value = values + i * TILE;
            for (int j = 0; j < width; ++j) mean[j] += value[j];
        }
    }

    // Step 21: a model that keeps an element alone counts with its weight, others share it.
    void overlap(const Real* values, int width, Real* ME_RESTRICT mean) const {
        Real keeping[TILE];
        for (int j = 0; j < width; ++j) mean[j] = keeping[j] = 0;
        for (size_t i = 0; i < scales_.size(); ++i) {
            const Real* ME_RESTRICT value = values + i * TILE;
            for (int j = 0; j < width; ++j) keeping[j] += value[j] != 0 ? Real(1) : Real(0);
        }
        for (size_t i = 0; i < scales_.size(); ++i) {
            const Real* ME_RESTRICT value = values + i * TILE;
            const Real weight = scales_[i].weight;
            for (int j = 0; j < width; ++j) {
                const Real alone = rounded(value[j] * weight), shared = Rounding::round(value[j] / keeping[j]);
                const Real part = keeping[j] > 1 ? shared : alone;
                mean[j] += value[j] != 0 ? part : Real(0);
            }
        }
    }

    // Step 6: S, and beside it what the slacks need: S without vote slack, and the sum of magnitudes.
    void elect(const Real* values, int width, Votes& votes) const {
        const bool by_count = op_.election == Election::Count;
        for (int j = 0; j < width; ++j) votes.sum[j] = votes.plain[j] = votes.magnitude[j] = 0;
        for (size_t i = 0; i < scales_.size(); ++i) {
            const Real* ME_RESTRICT value = values + i * TILE;
            Real vote[TILE];
            for (int j = 0; j < width; ++j) {
                const Real sign = value[j] > 0 ? Real(1) : value[j] < 0 ? Real(-1) : Real(0);
                vote[j] = by_count ? sign : value[j];
            }
            for (int j = 0; j < width; ++j) votes.plain[j] += vote[j];
            if (slack_votes_) {
                const Real strength = scales_[i].vote;
                for (int j = 0; j < width; ++j) votes.sum[j] += vote[j] * strength;
            }
            if (retains_) {
                for (int j = 0; j < width; ++j) votes.magnitude[j] += vote[j] < 0 ? -vote[j] : vote[j];
            }
        }
        if (!slack_votes_) {
            for (int j = 0; j < width; ++j) votes.sum[j] = votes.plain[j];
        }
        for (int j = 0; j < width; ++j) votes.sum[j] = Rounding::round(votes.sum[j]);
        for (int j = 0; j < width; ++j) votes.plain[j] = Rounding::round(votes.plain[j]);
    }

    // Step 7: adds the retained entries of one model to the mean and its divisor.
    void retain(size_t i, const Real* ME_RESTRICT value, const Votes& votes, int width, Real* ME_RESTRICT mean,
                Real* ME_RESTRICT divisor, Counts& counts) const {
        const Real weight = scales_[i].weight, slack = scales_[i].retain;
        const Real* ME_RESTRICT sum = votes.sum;
        const Real* ME_RESTRICT plain = votes.plain;
        const Real* ME_RESTRICT magnitude = votes.magnitude;
        const uint32_t always = slack >= 1;  // also where an entry is too small to show in the margin
        const Real factor = op_.election == Election::Deltas ? weight : Real(1);
        uint32_t lost = 0, saved = 0;
        for (int j = 0; j < width; ++j) {
            const Real v = value[j];
            const uint32_t votes_ = v != 0;
            const uint32_t positive = v > 0;
            const uint32_t agrees = positive == static_cast<uint32_t>(sum[j] >= 0);
            const uint32_t agrees_plainly = positive == static_cast<uint32_t>(plain[j] >= 0);
            const Real margin = sum[j] < 0 ? -sum[j] : sum[j];
            const uint32_t narrow = (margin < slack * magnitude[j]) | always;
            const uint32_t retained = votes_ & (agrees | narrow);
            mean[j] += retained ? Rounding::round(v * factor) : Real(0);
            divisor[j] += retained ? weight : Real(0);
            lost += votes_ & (retained ^ 1u);
            saved += retained & (agrees_plainly ^ 1u);
        }
        counts.lost += lost;
        counts.saved += saved;
    }

    // Step 8: b + lambda * m.
    void finish(const Real* ME_RESTRICT b, Real* ME_RESTRICT mean, const Real* ME_RESTRICT divisor,
                int width) const {
        const Real lambda = static_cast<Real>(op_.lambda);
        for (int j = 0; j < width; ++j) mean[j] = rounded(mean[j]);
        if (op_.normalize && op_.election != Election::Overlap) {
            for (int j = 0; j < width; ++j) mean[j] = rounded(mean[j] / divisor[j]);
        }
        if (lambda != 1) {
            for (int j = 0; j < width; ++j) mean[j] = rounded(mean[j] * lambda);
        }
        for (int j = 0; j < width; ++j) mean[j] = rounded(b[j] + mean[j]);
    }

    // Of what may be wide.
    ME_INLINE Real rounded(Real value) const { return op_.wide ? value : Rounding::round(value); }

    const Consensus& op_;
    std::vector<MaskKernel<Working>> masks_;
    std::vector<Scale<Real>> scales_;
    bool slack_votes_ = false, retains_ = false;
};

}  // namespace

void consensus_general(const Consensus& op, uint64_t start, uint64_t first, uint64_t last, Counts* counts,
               uint64_t* non_finite) {
    with_dtype(op.working, [&](auto dtype) {
        constexpr bool narrow = sizeof(typename Storage<dtype()>::Bits) == 2;  // others compute as they store
        using Rounding = std::conditional_t<narrow, RoundedTo<dtype()>, Unrounded>;
        if (op.storage_rounding && narrow) {
            ConsensusGeneral<dtype(), Rounding>(op).merge(start, first, last, counts, non_finite);
        } else {
            ConsensusGeneral<dtype(), Unrounded>(op).merge(start, first, last, counts, non_finite);
        }
    });
}

}  // namespace ME_ISA
}  // namespace merge_engine
