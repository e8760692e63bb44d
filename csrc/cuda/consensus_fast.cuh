// Most merges: 2 to 8 models in one dtype of 16 bits, trimmed by magnitude or drawn.
//
// The same bytes as the general way, with fewer instructions:
//   - A thread works on pairs of elements (see halves.cuh), and keeps nothing but the elements themselves: what a mask
//     drops becomes equal to the base.
//   - Neighbouring threads share a block of draws: each draws for another model, and they exchange what they drew.
//   - Divisors are sums of the weights of a subset of the models: 2^n of them, with their reciprocals, are computed once.
// Packs for which one of these does not hold (a value that is not finite, a tiny quotient) are merged in the general
// way, by the whole warp.
#pragma once

#include "consensus.cuh"
#include "division.cuh"
#include "fast_masks.cuh"

namespace merge_engine {

// What is computed beside the masks. Without a slack every vote counts once.
enum class Mixing { Sum, Elect, Slack };

struct alignas(16) FastModel {
    FastMask mask;
    float rescale, weight, vote, retain;
};

// What follows from which models' votes are retained: what their sum is divided by, and a byte for each model, 1 if its
// vote is.
template <int N>
struct alignas(16) Subset {
    static constexpr int WORDS = (N + 3) / 4;
    Divisor divisor;
    uint32_t retained[WORDS];
};

// What blocks compute before they merge.
template <int N>
struct FastTables {
    Subset<N> subsets[1 << N];  // without an election only the first
    FastModel models[N];
    float lambda;
    int n;       // how many models there are
    bool draws;  // whether some ties are decided by draws
    bool well;   // whether this way gives the general one's bytes: weights may be too small or too large for it

    // By all threads of a block.
    __device__ void set_up(const Job& job, const Model* of_job) {
        if (threadIdx.x == 0) {
            draws = false;
            well = true;
            n = static_cast<int>(job.models);
            lambda = static_cast<float>(job.lambda);
        }
        __syncthreads();
        if (threadIdx.x < job.models) {
            const Model& model = of_job[threadIdx.x];
            const float weight = static_cast<float>(model.weight);
            FastModel& fast = models[threadIdx.x];
            fast.rescale = static_cast<float>(model.rescale), fast.weight = weight;
            fast.vote = static_cast<float>(model.vote), fast.retain = static_cast<float>(model.retain);
            fast.mask = fast_mask(model.mask);
            if (fast.mask.draws()) draws = true;
            if (weight != 0 && magnitude_of(weight) < 0x1p-16f) well = false;  // a vote may be rounded to 0
        } else if (threadIdx.x < N) {
            FastModel& none = models[threadIdx.x];  // its votes are 0
            none.rescale = none.weight = none.vote = none.retain = 0;
        }
        __syncthreads();
        if (threadIdx.x >= 1u << N) return;
        float sum = job.election == Election::None ? static_cast<float>(job.divisor) : 0.0f;
        for (int i = 0; i < n && job.election != Election::None; ++i) {
            sum += threadIdx.x >> i & 1 ? models[i].weight : 0.0f;
        }
        if (sum == 0 || !job.normalize) sum = 1;
        Subset<N>& subset = subsets[threadIdx.x];
        subset.divisor = Divisor::of(sum);
        for (int w = 0; w < Subset<N>::WORDS; ++w) {
            const uint32_t models_of_word = threadIdx.x >> (4 * w);
            subset.retained[w] = 0;
            for (int i = 0; i < 4; ++i) subset.retained[w] |= (models_of_word >> i & 1) << (8 * i);
        }
        if (!divides_well(sum)) well = false;
    }
};

// What is counted: of each model the halves kept, and the votes that a slack saved; of all models the retained votes, in
// fields of 16 bits for the models 0, 2, 1, 3 and then 4, 6, 5, 7.
template <int N>
struct Tallies {
    static constexpr int WORDS = Subset<N>::WORDS;
    uint32_t kept[N] = {}, saved[N] = {}, retained[2 * WORDS] = {};

    // Retained votes of up to 255 elements.
    __device__ void add(const uint32_t (&more)[WORDS]) {
#pragma unroll
        for (int w = 0; w < WORDS; ++w) {
            retained[2 * w] += more[w] & 0x00FF00FFu;
            retained[2 * w + 1] += more[w] >> 8 & 0x00FF00FFu;
        }
    }
    __device__ uint32_t retained_of(int i) const { return retained[i / 4 * 2 + i % 2] >> (i % 4 / 2 * 16) & 0xFFFFu; }
};

// One element of all models: votes, and what becomes of them.
template <DType Working, Mixing How, int N>
struct Element {
    float base, vote[N], plain = 0, sum = 0, spread = 0, mean = 0;
    uint32_t subset = 0;  // the place of its row in the table

    // Steps 1, 5 and 6. A sum that begins with 0 is not -0.
    __device__ void vote_of(int i, float x, const FastModel& model) {
        vote[i] = (x - base) * model.rescale * model.weight;
        plain += vote[i];
        if constexpr (How == Mixing::Slack) {
            sum += vote[i] * model.vote;
            spread += magnitude_of(vote[i]);
        }
    }
    // Step 7.
    __device__ void mix(const FastModel (&models)[N], bool retains, uint32_t (&saved)[N]) {
        // Votes for the elected sign become positive, so that one comparison tells them from others and from zeros.
        const uint32_t sign = bits_of<uint32_t>(How == Mixing::Slack ? sum : plain) & 0x80000000u;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const float agreeing = bits_of<float>(bits_of<uint32_t>(vote[i]) ^ sign);
            bool retained = agreeing > 0;
            if constexpr (How == Mixing::Slack) {
                const FastModel& model = models[i];
                const bool narrow = magnitude_of(sum) < model.retain * spread || model.retain >= 1;
                retained = retained || (retains && narrow && vote[i] != 0);
                saved[i] += retained && (vote[i] > 0) != (plain >= 0);
            }
            mean = i == 0 ? (retained ? agreeing : 0) : retained ? mean + agreeing : mean;
            subset += retained ? static_cast<uint32_t>(sizeof(Subset<N>)) << i : 0;
        }
        // The mean is not -0: without a retained vote there is none at all, and the sum is 0.
        mean = bits_of<float>(bits_of<uint32_t>(mean) ^ sign);
    }
    // Step 8. `least` becomes the smallest dividend, see `order_of_dividend`.
    __device__ float merged(const FastTables<N>& tables, uint32_t (&retained)[Subset<N>::WORDS], uint32_t& least) const {
        const auto& row = *reinterpret_cast<const Subset<N>*>(reinterpret_cast<const char*>(tables.subsets) + subset);
        const float dividend = How == Mixing::Sum ? plain : mean;
        least = min(least, order_of_dividend(dividend));
#pragma unroll
        for (int w = 0; w < Subset<N>::WORDS; ++w) retained[w] += row.retained[w];
        return base + quotient(dividend, row.divisor) * tables.lambda;
    }
};

// A pair of elements of all models, those that masks drop equal to the base.
template <DType Working, Mixing How, int N>
__device__ uint32_t merge_pair(uint32_t base, const uint32_t (&x)[N], const FastTables<N>& tables, bool retains,
                               uint32_t (&saved)[N], uint32_t (&retained)[Subset<N>::WORDS], uint32_t& least) {
    using H = Halves<Working>;
    Element<Working, How, N> low, high;
    low.base = H::low(base), high.base = H::high(base);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        low.vote_of(i, H::low(x[i]), tables.models[i]);
        high.vote_of(i, H::high(x[i]), tables.models[i]);
    }
    if constexpr (How != Mixing::Sum) {
        low.mix(tables.models, retains, saved);
        high.mix(tables.models, retains, saved);
    }
    return H::stored(low.merged(tables, retained, least), high.merged(tables, retained, least));
}

// Merges eight elements of a chunk. False, and nothing is done, if the warp has an element that the general way must
// merge. All lanes of a warp enter.
template <DType Working, Mixing How, int N>
__device__ bool merge_fast(const Job& job, const Model* models, const FastTables<N>& tables, uint32_t octet, bool active,
                           Tallies<N>& tallies) {
    Octet in[N + 1] = {};
    if (active) {
        in[0] = Octet::load(job.base.data, octet);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (i < tables.n) in[1 + i] = Octet::load(models[i].array.data, octet);
        }
    }
    const uint64_t index = job.start + uint64_t{octet} * 8;
    bool well = all_finite<Working>(in);
    uint32_t kept[N] = {};
#pragma unroll
    for (int first = 0; first < N; first += 2) {
        uint32_t bytes[2][2] = {};
        if (tables.draws && first < tables.n) {
            const int drawn = min(first + static_cast<int>(threadIdx.x & 1), tables.n - 1);
            draw_two(tables.models[drawn].mask.round_keys, index, bytes);
        }
#pragma unroll
        for (int i = first; i < first + 2; ++i) {
            if (i < tables.n) {
                kept[i] = keep<Working>(tables.models[i].mask, bytes[i - first], index, in[0], in[1 + i]);
            } else {
                in[1 + i] = in[0];
            }
        }
    }
    uint32_t saved[N] = {}, retained[Subset<N>::WORDS] = {}, least = ~0u;
    Octet merged[1];
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) {
        uint32_t x[N];
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] = in[1 + i].word[p];
        merged[0].word[p] = merge_pair<Working, How>(in[0].word[p], x, tables, job.retains, saved, retained,
                                                                   least);
    }
    well = well && all_finite<Working>(merged) && least >= order_of_dividend(SMALLEST_DIVIDEND);
    if (__any_sync(EVERY_LANE, active && !well)) return false;
    if (!active) return true;
    merged[0].store(job.output.data, octet);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        tallies.kept[i] += kept[i];
        tallies.saved[i] += saved[i];
    }
    tallies.add(retained);
    return true;
}

}  // namespace merge_engine
