// Task vectors, trim, sign election and disjoint mean in one read of every input.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "pool.h"
#include "primitives.h"
#include "lanes.h"
#include "sieve.h"
#include "storage_lanes.h"

namespace merge_engine {
namespace ME_ISA {
namespace {

// The numbers of one entry, rounded as the arithmetic demands.
template <class Real>
struct Scale {
    Real rescale, weight, vote, retain;
};

template <DType Working, class Rounding>
class Merger {
  public:
    using Real = typename RealOf<Working>::Type;
    using Bits = typename Storage<Working>::Bits;
    using Vectors = StorageLanes<Working>;

    explicit Merger(const Consensus& op) : op_(op) {
        for (const Entry& entry : op.entries) {
            sieves_.emplace_back(entry.mask);
            scales_.push_back({Rounding::round(static_cast<Real>(by_probability(entry) ? 1 : entry.rescale)),
                               Rounding::round(static_cast<Real>(entry.weight)),
                               static_cast<Real>(1.0 + entry.vote_slack), static_cast<Real>(entry.retain_slack)});
            slack_votes_ |= entry.vote_slack != 0;
            retains_ |= entry.retain_slack != 0;
        }
        if constexpr (std::is_same_v<Rounding, Unrounded> && std::is_same_v<Real, float>) use_plain();
    }

    // Merges elements [first, last) of the chunk; index 0 of the chunk is element `start` of the tensor.
    void merge(uint64_t start, uint64_t first, uint64_t last, Counts* counts, uint64_t* non_finite) const {
        if (plain_) return (this->*plain_)(start, first, last, counts, non_finite);
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
                    sieves_[i].template read<Rounding>(entry.model, b, start + at, at, width, delta, stays);
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

    static bool by_probability(const Entry& entry) {
        return entry.mask.kind == MaskKind::Ranked && entry.mask.inverse_probability;
    }
    static ME_INLINE Real inverse(uint32_t threshold) {
        return static_cast<Real>(4294967296.0 / static_cast<double>(threshold));
    }
    static void divide_by_probability(const uint32_t* ME_RESTRICT thresholds, int width, Real* ME_RESTRICT delta,
                                      const uint32_t* ME_RESTRICT kept) {
        for (int j = 0; j < width; ++j) {
            delta[j] = kept[j] ? Rounding::round(delta[j] * inverse(thresholds[j])) : Real(0);
        }
    }

    // Chooses merge_plainly where it will do: in float32, without rounding in between, slack or votes by count, and among
    // few models.
    void use_plain() {
        if (op_.election == Election::Count || slack_votes_ || retains_ || op_.output.dtype != Working) return;
        switch (op_.entries.size()) {
            case 0: return;
            case 1: return use_plain_for<1>();
            case 2: return use_plain_for<2>();
            case 3: return use_plain_for<3>();
            case 4: return use_plain_for<4>();
        }
        if (op_.entries.size() <= MANY) use_plain_for<MANY>();
    }
    static constexpr int MANY = 16;  // models, for which there are no loops of their own

    template <int N>
    void use_plain_for() {
        const bool elects = op_.election == Election::Sum;
        plain_ = elects ? op_.normalize ? &Merger::template merge_plainly<N, true, true>
                                        : &Merger::template merge_plainly<N, true, false>
                 : op_.normalize ? &Merger::template merge_plainly<N, false, true>
                                 : &Merger::template merge_plainly<N, false, false>;
    }

    // Everything from inputs to output in registers, with no more kept of a tile than which ties and draws stay.
    template <int N, bool Elects, bool Normalize>
    void merge_plainly(uint64_t start, uint64_t first, uint64_t last, Counts* counts, uint64_t* non_finite) const {
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
            if (width < TILE) {
                std::memcpy(static_cast<Bits*>(op_.output.data) + at, merged, static_cast<size_t>(width) * sizeof(Bits));
            }
        }
        for (size_t i = 0; i < n; ++i) counts[i].kept += total(survived[i]), counts[i].lost += total(lost[i]);
    }
    // What the task vector of a model is multiplied with: one factor, or one for each element of the tile.
    struct Factors {
        float factor[TILE];
        bool differ;

        ME_INLINE Floats lanes(int j) const { return load<Floats>(factor + (differ ? j : 0)); }
    };
    void set_factors(size_t i, uint64_t offset, int width, Factors& factors) const {
        const Entry& entry = op_.entries[i];
        factors.differ = by_probability(entry);
        if (!factors.differ) return store(factors.factor, Floats{} + scales_[i].rescale);
        for (int j = 0; j < width; ++j) factors.factor[j] = inverse(entry.mask.thresholds[offset + j]);
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
        Real delta[TILE];
        if (sieve.ties()) {
            for (int j = 0; j < TILE; j += LANES) {
                store(delta + j, Vectors::load(model + j) - Vectors::load(base + j));
            }
        }
        return sieve.staying(delta, index, offset, width);
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
        for (int i = 0; i < n; ++i) weight[i] = zero + scales_[i].weight, band[i] = sieves_[i].band();
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

    // Steps 5 to 8 in general.
    void merge_tile(Real* deltas, const uint32_t* kept, const Real* b, int width, Real* merged, Counts* counts) const {
        Real divisor[TILE];
        for (size_t i = 0; i < scales_.size(); ++i) weigh(i, kept + i * TILE, width, deltas + i * TILE, counts[i]);
        if (op_.election == Election::None) {
            sum_all(deltas, width, merged, divisor);
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

    // Step 5: v = w * (r * d) where the mask keeps the element, else 0. It takes the place of d.
    void weigh(size_t i, const uint32_t* ME_RESTRICT kept, int width, Real* ME_RESTRICT value, Counts& counts) const {
        const Scale<Real> scale = scales_[i];
        uint32_t survived = 0;
        for (int j = 0; j < width; ++j) {
            const Real scaled = Rounding::round(value[j] * scale.rescale);
            survived += kept[j] & static_cast<uint32_t>(scaled != 0);
            value[j] = kept[j] ? Rounding::round(scaled * scale.weight) : Real(0);
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
            mean[j] += retained ? v : Real(0);
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
        for (int j = 0; j < width; ++j) mean[j] = Rounding::round(mean[j]);
        if (op_.normalize) {
            for (int j = 0; j < width; ++j) mean[j] = Rounding::round(mean[j] / divisor[j]);
        }
        if (lambda != 1) {
            for (int j = 0; j < width; ++j) mean[j] = Rounding::round(mean[j] * lambda);
        }
        for (int j = 0; j < width; ++j) mean[j] = Rounding::round(b[j] + mean[j]);
    }

    const Consensus& op_;
    std::vector<Sieve<Working>> sieves_;
    std::vector<Scale<Real>> scales_;
    void (Merger::*plain_)(uint64_t, uint64_t, uint64_t, Counts*, uint64_t*) const = nullptr;
    bool slack_votes_ = false, retains_ = false;
    // Where magnitudes begin that are infinite in the working dtype.
    uint32_t infinity_ = static_cast<uint32_t>(Sieve<Working>::first_of(magnitude_key<Working>(INFINITY)));
};

template <DType Working, class Rounding>
void consensus_as(const Consensus& op, uint64_t start, uint64_t count, int threads, Counts* counts,
                  uint64_t* non_finite) {
    const Merger<Working, Rounding> merger(op);
    const size_t n = op.entries.size();
    const size_t workers = static_cast<size_t>(std::max(threads, 1));
    std::vector<Counts> counted(workers * n);
    std::vector<uint64_t> found(workers * (n + 2));
    parallel_for((count + BLOCK - 1) / BLOCK, threads, [&](uint64_t block, int worker) {
        const size_t w = static_cast<size_t>(worker);
        merger.merge(start, block * BLOCK, std::min(count, (block + 1) * BLOCK), counted.data() + w * n,
                     found.data() + w * (n + 2));
    });
    for (size_t w = 0; w < workers; ++w) {
        for (size_t i = 0; i < n; ++i) {
            counts[i].kept += counted[w * n + i].kept;
            counts[i].lost += counted[w * n + i].lost;
            counts[i].saved += counted[w * n + i].saved;
        }
        for (size_t i = 0; i <= n + 1; ++i) non_finite[i] += found[w * (n + 2) + i];
    }
}

}  // namespace

void consensus(const Consensus& op, uint64_t start, uint64_t count, int threads, Counts* counts,
               uint64_t* non_finite) {
    with_dtype(op.working, [&](auto dtype) {
        if (op.storage_rounding) {
            consensus_as<dtype(), RoundedTo<dtype()>>(op, start, count, threads, counts, non_finite);
        } else {
            consensus_as<dtype(), Unrounded>(op, start, count, threads, counts, non_finite);
        }
    });
}

}  // namespace ME_ISA
}  // namespace merge_engine
