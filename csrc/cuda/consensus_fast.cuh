// Most merges: 2 to 8 models in one dtype of 16 bits, without slack, trimmed by magnitude or drawn.
//
// The same bytes as the general way, with fewer instructions:
//   - Keys are looked for in the bits of |d| before rounding (see magnitudes.h), so no difference is rounded.
//   - Neighbouring threads share a block of draws: each draws for another model, and they exchange what they drew.
//   - Divisors are sums of the weights of a subset of the models: 2^n of them, with their reciprocals, are computed once.
// Packs for which one of these does not hold (a value that is not finite, a quotient out of range) are merged in the
// general way, by the whole warp.
#pragma once

#include "../magnitudes.h"
#include "consensus.cuh"

namespace merge_engine {

constexpr int MOST_FAST = 8;

// Kernels are compiled for at most N = 2, 4 or 8 models. Elements of a thread: with more models fewer, or their values
// would not fit into registers.
template <int N>
constexpr int FAST_PACK = N == 2 ? 8 : 4;

// Whether a model can be merged in this way.
inline bool merges_fast(const Entry& entry) {
    const MaskKind kind = entry.mask.kind;
    const bool trimmed = kind == MaskKind::Dense || kind == MaskKind::Band || kind == MaskKind::Draw;
    return trimmed && entry.vote_slack == 0 && entry.retain_slack == 0 && entry.rescale >= 1;
}

// A model's numbers, and its mask in terms of magnitudes. Those in [low, low + span) are kept, but for the first
// `low_ties` and those from `high` on, which positions decide.
struct FastModel {
    float rescale, weight;
    uint32_t low, span, low_ties, high, high_ties;
    bool by_draw;
    uint64_t low_below, high_below;  // bounds of draws
};

template <DType Working>
__device__ FastModel fast_model(const Model& model) {
    constexpr uint32_t above_all = 0x7F800000u;  // merged in the general way
    const Mask& mask = model.mask;
    FastModel fast{static_cast<float>(model.rescale), static_cast<float>(model.weight), 1, above_all - 1, 0, 0, 0, true,
                   draws_below(mask.low_positions),   draws_below(mask.high_positions)};
    if (mask.kind == MaskKind::Draw) fast.low_ties = fast.span;
    if (mask.kind != MaskKind::Band) return fast;
    const auto first_of = [](uint64_t key) { return min(first_magnitude<Working>(key), above_all); };
    const auto first_above = [&](uint64_t key) { return key == ~0ull ? above_all : first_of(key + 1); };
    const auto open = [](const Range& range) { return range.first != 0 || range.last != ~0ull; };
    const uint32_t end = first_above(mask.high);
    fast.low = max(first_of(mask.low), 1u);  // zeros carry nothing
    fast.span = end > fast.low ? end - fast.low : 0;
    if (open(mask.low_positions)) fast.low_ties = max(first_above(mask.low), fast.low) - fast.low;
    if (open(mask.high_positions)) fast.high = first_of(mask.high), fast.high_ties = end - fast.high;
    fast.by_draw = mask.by_draw;
    return fast;
}

// A sum of weights. The reciprocal is 0 where quotients are left to the division.
struct Divisor {
    float value, reciprocal;
};

__device__ inline Divisor divisor_of(float value) {
    if (value == 0) value = 1;
    const float magnitude = value < 0 ? -value : value;
    const bool within = magnitude >= 0x1p-20f && magnitude <= 0x1p20f;
    return {value, within ? 1.0f / value : 0.0f};
}
__device__ inline Divisor divisor_of(const FastModel* models, int n, uint32_t subset) {
    float sum = 0;
    for (int i = 0; i < n; ++i) sum += subset >> i & 1 ? models[i].weight : 0.0f;
    return divisor_of(sum);
}

// What blocks compute before they merge.
template <int N>
struct FastTables {
    Divisor divisors[1 << N];  // by subset; without an election only the first
    FastModel models[N];
    float lambda;
    int n;       // how many models there are
    bool draws;  // whether some ties are decided by draws
    bool elects;

    // By all threads of a block.
    template <DType Working>
    __device__ void set_up(const Job& job, const Model* of_job) {
        if (threadIdx.x == 0) {
            draws = false;
            n = static_cast<int>(job.models);
            elects = job.election != Election::None;
            lambda = static_cast<float>(job.lambda);
        }
        __syncthreads();
        if (threadIdx.x < job.models) {
            const FastModel fast = models[threadIdx.x] = fast_model<Working>(of_job[threadIdx.x]);
            if (fast.by_draw && (fast.low_ties || fast.high_ties)) draws = true;
        }
        __syncthreads();
        if (threadIdx.x >= 1u << N) return;
        divisors[threadIdx.x] =
            elects ? divisor_of(models, n, threadIdx.x) : divisor_of(static_cast<float>(job.divisor));
    }
};

// Whether `quotient` is exact for this dividend: nothing on the way may be rounded as a denormal, or overflow.
__device__ inline bool divides_well(float dividend) {
    const float magnitude = dividend < 0 ? -dividend : dividend;
    return dividend == 0 || (magnitude >= 0x1p-60f && magnitude <= 0x1p60f);
}
// RN(dividend / divisor). With a correctly rounded reciprocal and an estimate that is off by less than one unit in the
// last place, one correction rounds correctly (Markstein 1990); the first correction makes such an estimate.
__device__ inline float quotient(float dividend, const Divisor& divisor) {
    if (divisor.reciprocal == 0) return dividend / divisor.value;
    const float estimate = dividend * divisor.reciprocal;
    const float better = __fmaf_rn(__fmaf_rn(-estimate, divisor.value, dividend), divisor.reciprocal, estimate);
    return __fmaf_rn(__fmaf_rn(-better, divisor.value, dividend), divisor.reciprocal, better);
}

// Swaps x of every lane with bit `of` set for y of its neighbour without.
__device__ inline void swap_lanes(uint32_t& x, uint32_t& y, unsigned of) {
    const bool upper = threadIdx.x & of;
    const uint32_t received = __shfl_xor_sync(EVERY_LANE, upper ? x : y, static_cast<int>(of));
    (upper ? x : y) = received;
}

// The top bytes of the draws of a pack's elements for all models, four a word. The threads that share a block draw for
// a model each. All lanes of a warp enter.
template <int N, int P>
__device__ void draw_pack(const Model* models, int n, uint64_t index, uint32_t (&bytes)[N][P / 4]) {
    constexpr int SHARE = DRAW_BLOCK / P;  // threads to a block
    const int mine = static_cast<int>(threadIdx.x % SHARE);
#pragma unroll
    for (int first = 0; first < N; first += SHARE) {
        if (first >= n) return;
        const int model = min(first + mine, n - 1);
        PhiloxWords drawn = top_bytes(models[model].mask.random_key, index);
        uint32_t (&word)[4] = drawn.word;
        if constexpr (SHARE == 2) {
            // Of both models, the even lanes take words 0 and 1, the odd ones 2 and 3.
            swap_lanes(word[0], word[2], 1);
            swap_lanes(word[1], word[3], 1);
            bytes[first][0] = word[0], bytes[first][1] = word[1];
            bytes[first + 1][0] = word[2], bytes[first + 1][1] = word[3];
        } else {
            // Transposed: lane l takes word l of each model.
            swap_lanes(word[0], word[1], 1);
            swap_lanes(word[2], word[3], 1);
            swap_lanes(word[0], word[2], 2);
            swap_lanes(word[1], word[3], 2);
#pragma unroll
            for (int i = 0; i < SHARE; ++i) bytes[first + i][0] = word[i];
        }
    }
}

// Of some elements those that stay: ties that their indices decide, or draws whose lower bits do, one in 256.
__device__ inline uint32_t stay_one_by_one(uint32_t some, bool by_draw, uint64_t below, const Range& positions,
                                                   uint64_t key, uint64_t index) {
    uint32_t stays = 0;
#pragma unroll 1
    for (uint32_t rest = some; rest != 0; rest &= rest - 1) {
        const uint64_t place = index + static_cast<uint64_t>(__ffs(static_cast<int>(rest)) - 1);
        const bool one = by_draw ? lower_bits(key, place) < (below & LOWER_DRAW) : inside(positions, place);
        stays |= one ? rest & -rest : 0;
    }
    return stays;
}

// Of the elements whose bits are set in `tied`, those that stay.
template <int P>
__device__ uint32_t stay(uint32_t tied, bool by_draw, uint64_t below, const Range& positions,
                         const uint32_t (&bytes)[P / 4], uint64_t key, uint64_t index) {
    uint32_t stays = 0, undecided = tied;
    if (by_draw) {
        const uint32_t top = static_cast<uint32_t>(below >> 24);
        undecided = 0;
#pragma unroll
        for (int j = 0; j < P; ++j) {
            const uint32_t byte = bytes[j / 4] >> (8 * (j % 4)) & 0xFF;
            stays |= static_cast<uint32_t>(byte < top) << j;
            undecided |= static_cast<uint32_t>(byte == top) << j;
        }
        stays &= tied;
        undecided &= tied;
    }
    return undecided ? stays | stay_one_by_one(undecided, by_draw, below, positions, key, index) : stays;
}

// P elements as they are stored.
template <DType Working, int P>
struct alignas(P * sizeof(typename Storage<Working>::Bits)) Elements {
    typename Storage<Working>::Bits bits[P];

    static __device__ Elements load(const void* data, uint64_t at) {
        using Words = std::conditional_t<sizeof(Elements) == 16, uint4, uint2>;
        const auto* from = static_cast<const typename Storage<Working>::Bits*>(data) + at;
        const Words words = __ldg(reinterpret_cast<const Words*>(from));
        Elements elements;
        memcpy(&elements, &words, sizeof(words));
        return elements;
    }
    __device__ void store(void* data, uint64_t at) const {
        using Words = std::conditional_t<sizeof(Elements) == 16, uint4, uint2>;
        Words words;
        memcpy(&words, bits, sizeof(words));
        __stcs(reinterpret_cast<Words*>(static_cast<typename Storage<Working>::Bits*>(data) + at), words);
    }
};

// Merges the elements [at, at + P) of a chunk, and adds to `counted` how many were kept and, 16 bits higher, how many of
// them lost the election. False, and nothing is done, if the warp has an element that the general way must merge.
template <DType Working, int N>
__device__ bool merge_fast(const Job& job, const Model* models, const FastTables<N>& tables, uint64_t at, bool active,
                           uint32_t (&counted)[N]) {
    constexpr int P = FAST_PACK<N>;
    using Pack = Elements<Working, P>;
    Pack base{}, x[N]{};
    if (active) {
        base = Pack::load(job.base.data, at);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (i < tables.n) x[i] = Pack::load(models[i].array.data, at);
        }
    }
    uint32_t bytes[N][P / 4];
    if (tables.draws) draw_pack<N, P>(models, tables.n, job.start + at, bytes);

    // Steps 1 to 5.
    float b[P], value[N][P];
    uint32_t kept[N], largest = 0;
#pragma unroll
    for (int j = 0; j < P; ++j) b[j] = Storage<Working>::template load<float>(base.bits[j]);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const FastModel& fast = tables.models[i];
        const Mask& mask = models[i].mask;
        uint32_t low_tied = 0, high_tied = 0;
        kept[i] = 0;
        if (i >= tables.n) {
#pragma unroll
            for (int j = 0; j < P; ++j) value[i][j] = 0;
            continue;
        }
#pragma unroll
        for (int j = 0; j < P; ++j) {
            value[i][j] = Storage<Working>::template load<float>(x[i].bits[j]) - b[j];
            const uint32_t magnitude = bits_of<uint32_t>(value[i][j]) & 0x7FFFFFFFu;
            largest = max(largest, magnitude);
            kept[i] |= static_cast<uint32_t>(magnitude - fast.low < fast.span) << j;
            low_tied |= static_cast<uint32_t>(magnitude - fast.low < fast.low_ties) << j;
            high_tied |= static_cast<uint32_t>(magnitude - fast.high < fast.high_ties) << j;
        }
        if (fast.low_ties) {
            kept[i] &= ~low_tied | stay<P>(low_tied, fast.by_draw, fast.low_below, mask.low_positions, bytes[i],
                                           mask.random_key, job.start + at);
        }
        if (fast.high_ties) {
            kept[i] &= ~high_tied | stay<P>(high_tied, fast.by_draw, fast.high_below, mask.high_positions, bytes[i],
                                            mask.random_key, job.start + at);
        }
#pragma unroll
        for (int j = 0; j < P; ++j) value[i][j] = kept[i] >> j & 1 ? value[i][j] * fast.rescale * fast.weight : 0.0f;
    }

    // Steps 6 to 8.
    bool well = largest < 0x7F800000u;
    uint32_t lost[N] = {};
    Pack merged;
#pragma unroll
    for (int j = 0; j < P; ++j) {
        float sum = value[0][j], mean = 0;
        uint32_t subset = 0;
#pragma unroll
        for (int i = 1; i < N; ++i) sum += value[i][j];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const bool voted = value[i][j] != 0;
            const bool retained = !tables.elects || (voted && (value[i][j] > 0) == (sum >= 0));
            mean += retained ? value[i][j] : 0.0f;
            subset |= static_cast<uint32_t>(retained) << i;
            lost[i] |= static_cast<uint32_t>(voted && !retained) << j;
        }
        if (job.normalize) {
            well &= divides_well(mean);
            mean = quotient(mean, tables.divisors[tables.elects ? subset : 0]);
        }
        const float result = b[j] + mean * tables.lambda;
        well &= is_finite(result);
        merged.bits[j] = Storage<Working>::store(result);
        well &= is_finite(Storage<Working>::template load<float>(merged.bits[j]));
    }
    if (__any_sync(EVERY_LANE, active && !well)) return false;
    if (active) merged.store(job.output.data, at);
#pragma unroll
    for (int i = 0; i < N; ++i) counted[i] += static_cast<uint32_t>(__popc(kept[i]) | __popc(lost[i]) << 16);
    return true;
}

}  // namespace merge_engine
