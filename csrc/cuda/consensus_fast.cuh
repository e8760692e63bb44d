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

// A model's numbers, and two words that tell of its weight: `negative` has the signs of both halves, `votes` all bits.
struct alignas(16) FastModel {
    FastMask mask;
    float rescale, weight;
    uint32_t negative, votes;
    float vote, retain;
};

// What blocks compute before they merge.
template <int N>
struct FastTables {
    Divisor divisors[1 << N];  // by subset; without an election only the first
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
            fast.negative = weight < 0 ? TRUTHS : 0;
            fast.votes = weight != 0 ? ~0u : 0;
            fast.mask = fast_mask(model.mask);
            if (fast.mask.draws()) draws = true;
            if (weight != 0 && magnitude_of(weight) < 0x1p-16f) well = false;  // a vote may be rounded to 0
        }
        __syncthreads();
        if (threadIdx.x >= 1u << N) return;
        float sum = job.election == Election::None ? static_cast<float>(job.divisor) : 0.0f;
        for (int i = 0; i < n && job.election != Election::None; ++i) {
            sum += threadIdx.x >> i & 1 ? models[i].weight : 0.0f;
        }
        if (sum == 0 || !job.normalize) sum = 1;
        divisors[threadIdx.x] = Divisor::of(sum);
        if (!divides_well(sum)) well = false;
    }
};

// What is counted of a model: the halves kept and those retained, and how many a slack saved.
struct Tallies {
    uint32_t kept = 0, retained = 0, saved = 0;
};

// One half of a pair: votes, and what becomes of them. `place` says which half.
template <DType Working, Mixing How, int N>
struct Element {
    using H = Halves<Working>;
    float base, vote[N], plain = 0, sum = 0, spread = 0, mean = 0;

    // Steps 1, 5 and 6.
    __device__ void vote_of(int i, float x, const FastModel& model) {
        vote[i] = (x - base) * model.rescale * model.weight;
        // A sum that may be the result must not be -0; with an election there is a voter whenever it matters.
        plain = How == Mixing::Elect && i == 0 ? vote[i] : plain + vote[i];
        if constexpr (How == Mixing::Slack) {
            sum += vote[i] * model.vote;
            spread += magnitude_of(vote[i]);
        }
    }
    // Step 7 without slack. A vote of zero may be added: it changes nothing.
    __device__ void mix(int i) {
        const float more = i == 0 ? vote[i] : mean + vote[i];
        mean = (vote[i] > 0) == (plain >= 0) ? more : mean;
    }
    // Step 7 with slack: whether the vote is retained.
    __device__ bool mix(int i, const FastModel& model, bool retains, Tallies& tallies) {
        const bool positive = vote[i] > 0;
        const bool narrow = magnitude_of(sum) < model.retain * spread || model.retain >= 1;
        const bool retained = vote[i] != 0 && (positive == (sum >= 0) || (retains && narrow));
        mean = retained ? mean + vote[i] : mean;
        tallies.saved += retained && positive != (plain >= 0);
        return retained;
    }
    // Step 8. `least` becomes the smallest dividend, see `order_of_dividend`.
    __device__ float merged(const Divisor& divisor, float lambda, uint32_t& least) const {
        const float dividend = How == Mixing::Sum ? plain : mean;
        least = min(least, order_of_dividend(dividend));
        return base + quotient(dividend, divisor) * lambda;
    }
};

// A pair of elements of all models, those that masks drop equal to the base.
template <DType Working, Mixing How, int N>
__device__ uint32_t merge_pair(uint32_t base, const uint32_t (&x)[N], const FastTables<N>& tables, bool retains,
                               Tallies (&tallies)[N], uint32_t& least) {
    using H = Halves<Working>;
    static_assert(sizeof(Divisor) == 8, "a subset is eight times its number");
    Element<Working, How, N> low, high;
    low.base = H::low(base), high.base = H::high(base);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        low.vote_of(i, H::low(x[i]), tables.models[i]);
        high.vote_of(i, H::high(x[i]), tables.models[i]);
    }
    uint32_t subsets = 0;  // of both halves: eight times their numbers
    if constexpr (How == Mixing::Elect) {
        // The upper halves of two floats hold their signs.
        const uint32_t elected = selected_bytes<0x7632>(bits_of<uint32_t>(low.plain), bits_of<uint32_t>(high.plain));
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const FastModel& model = tables.models[i];
            const uint32_t difference = H::difference(x[i], base);
            const uint32_t voted = (difference | TRUTHS) - HALVES & model.votes;
            const uint32_t retained = whole_halves(voted & ~(difference ^ elected ^ model.negative));
            subsets |= retained & (8u << i) * HALVES;
            tallies[i].retained -= retained;
            low.mix(i), high.mix(i);
        }
    }
    if constexpr (How == Mixing::Slack) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const bool one = low.mix(i, tables.models[i], retains, tallies[i]);
            const bool other = high.mix(i, tables.models[i], retains, tallies[i]);
            const uint32_t retained = (one ? 0xFFFFu : 0u) | (other ? 0xFFFF0000u : 0u);
            subsets |= retained & (8u << i) * HALVES;
            tallies[i].retained -= retained;
        }
    }
    const auto divisor = [&](uint32_t subset) -> const Divisor& {
        return *reinterpret_cast<const Divisor*>(reinterpret_cast<const char*>(tables.divisors) + subset);
    };
    return H::stored(low.merged(divisor(subsets & 0xFFFFu), tables.lambda, least),
                     high.merged(divisor(subsets >> 16), tables.lambda, least));
}

// Merges eight elements of a chunk. False, and nothing is done, if the warp has an element that the general way must
// merge. All lanes of a warp enter.
template <DType Working, Mixing How, int N>
__device__ bool merge_fast(const Job& job, const Model* models, const FastTables<N>& tables, uint32_t octet, bool active,
                           Tallies (&tallies)[N]) {
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
            draw_two(tables.models[drawn].mask.random_key, index, bytes);
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
    Tallies new_tallies[N];
    uint32_t least = ~0u;
    Octet merged[1];
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) {
        uint32_t x[N];
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] = in[1 + i].word[p];
        merged[0].word[p] = merge_pair<Working, How>(in[0].word[p], x, tables, job.retains, new_tallies, least);
    }
    well = well && all_finite<Working>(merged) && least >= order_of_dividend(SMALLEST_DIVIDEND);
    if (__any_sync(EVERY_LANE, active && !well)) return false;
    if (!active) return true;
    merged[0].store(job.output.data, octet);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        tallies[i].kept += kept[i];
        tallies[i].retained += new_tallies[i].retained;
        tallies[i].saved += new_tallies[i].saved;
    }
    return true;
}

}  // namespace merge_engine
