// What the kernels of a consensus share, and the general way to merge: any masks, slacks, dtypes, and rounding.
//
// A thread merges 16 bytes of neighbours at a time, or one element. It holds the models' elements as they are stored,
// so that the second look, once the signs are elected, needs no second read; with more models than KEPT it reads again,
// from the cache.
#pragma once

#include "elements.cuh"
#include "jobs.cuh"
#include "primitives.h"

namespace merge_engine {

// One model, its numbers rounded as the arithmetic demands.
struct Model {
    Array array;
    Mask mask;
    double rescale, weight, vote, retain;
};

// Elements [first, last) of a chunk in whole packs, and the place of its models in the list of all.
struct Job {
    Array base, output;
    size_t first_model, models;
    Election election;
    bool normalize, slack_votes, retains, wide;
    double lambda, divisor;
    uint64_t start;
    Counts* counts;
    uint64_t* non_finite;
    uint64_t first, last;
    Blocks blocks;
};

using MergeLaunches = Launches<Job, List<Model>>;

constexpr unsigned MERGE_THREADS = 256;

// The models of a job in shared memory, and counters for each: kept, lost and saved.
struct Shared {
    const Job& job;
    Model* models;
    uint32_t* counters;
};
constexpr size_t shared_bytes(size_t models) { return models * (sizeof(Model) + 3 * sizeof(uint32_t)); }

// By all threads of a block.
__device__ inline Shared set_up(const List<Job>& jobs, size_t n, const List<Model>& list) {
    const Job& job = job_of_block(jobs, n, shared_memory<Job>());
    Model* models = behind<Model>(shared_memory<Job>());
    uint32_t* counters = reinterpret_cast<uint32_t*>(models + job.models);
    for (size_t i = threadIdx.x; i < job.models; i += blockDim.x) {
        models[i] = list[job.first_model + i];
        models[i].mask = resolved(models[i].mask);
    }
    for (size_t i = threadIdx.x; i < 3 * job.models; i += blockDim.x) counters[i] = 0;
    __syncthreads();
    return {job, models, counters};
}

__device__ inline void add_counters(const Shared& shared) {
    __syncthreads();
    auto* totals = reinterpret_cast<unsigned long long*>(shared.job.counts);
    for (size_t i = threadIdx.x; i < 3 * shared.job.models; i += blockDim.x) {
        if (shared.counters[i]) atomicAdd(totals + i, static_cast<unsigned long long>(shared.counters[i]));
    }
}
static_assert(sizeof(Counts) == 3 * sizeof(uint64_t), "counters and counts have the same order");

// Calls body(at, active) for the packs of V elements of this thread. Warps stay whole: those lanes that find nothing to
// merge still take part in the counting.
template <int V, class Body>
__device__ void for_each_pack(const Job& job, Body&& body) {
    const uint64_t stride = uint64_t{job.blocks.count} * blockDim.x * V;
    const uint64_t begin = job.first + uint64_t{blockIdx.x - job.blocks.first} * blockDim.x * V;
    for (uint64_t block = begin; block < job.last; block += stride) {
        const uint64_t at = block + uint64_t{threadIdx.x} * V;
        body(at, at < job.last);
    }
}

template <DType Working, bool Stored, class Real>
__device__ Real rounded(Real value) {
    if constexpr (Stored) return RoundedTo<Working>::round(value);
    return value;
}

// Adds to the counters of a model what the lanes of a warp counted.
__device__ inline void count_warp(uint32_t* counters, uint32_t kept, uint32_t lost, uint32_t saved) {
    // Ten bits each: a warp counts at most 32 * 8.
    const uint32_t packed = __reduce_add_sync(EVERY_LANE, kept | lost << 10 | saved << 20);
    if (threadIdx.x % WARP != 0 || packed == 0) return;
    atomicAdd(counters, packed & 1023);
    atomicAdd(counters + 1, packed >> 10 & 1023);
    atomicAdd(counters + 2, packed >> 20);
}

__device__ inline void count_non_finite(uint64_t* counter, int found) {
    if (found) atomicAdd(reinterpret_cast<unsigned long long*>(counter), static_cast<unsigned long long>(found));
}

// The elements [at, at + V) of a chunk, in one thread. All lanes of a warp enter; those that are not `active` have no
// elements, and only take part in the counting.
template <DType Working, int V, int KEPT, bool Slack, bool Stored>
__device__ void merge(const Job& job, const Model* models, uint32_t* counters, uint64_t at, bool active) {
    using Real = RealOf<Working>;
    const auto rn = [](Real value) { return rounded<Working, Stored>(value); };
    const auto rn_unless_wide = [&](Real value) { return job.wide ? value : rn(value); };
    const bool overlap = job.election == Election::Overlap, weighs_later = weighs_last(job.election);
    Pack<Working, V> base, held[KEPT > 0 ? KEPT : 1];
    uint32_t kept[KEPT > 0 ? KEPT : 1];
    Real plain[V], sum[V], magnitude[V];
#pragma unroll
    for (int j = 0; j < V; ++j) plain[j] = sum[j] = magnitude[j] = 0, base.bits[j] = 0;
    if (active) {
        base = load_pack<Working, V>(job.base, at);
        count_non_finite(job.non_finite, non_finite_in(base));
    }

    const auto mask_of = [&](const Model& model, const Pack<Working, V>& x) {
        Real delta[V];
#pragma unroll
        for (int j = 0; j < V; ++j) delta[j] = rn(x.template value<Real>(j) - base.template value<Real>(j));
        return kept_bits<Working>(model.mask, delta, job.start + at, at);
    };
    // Reads a model's elements, and says which of them its mask keeps.
    const auto take = [&](size_t i, Pack<Working, V>& x) -> uint32_t {
        if (!active) return 0;
        x = load_pack<Working, V>(models[i].array, at);
        return mask_of(models[i], x);
    };
    // Steps 1 and 5: v = w * (r * d) where the mask keeps the element, else 0; r * d if weights come later. `counted` when
    // d is not zero.
    const auto weighted = [&](const Model& model, const Pack<Working, V>& x, uint32_t bits, int j, uint32_t& counted) {
        const bool keep = bits >> j & 1;
        Real delta = rn(x.template value<Real>(j) - base.template value<Real>(j));
        if (model.mask.kind == MaskKind::Ranked && model.mask.inverse_probability) {
            const double threshold = keep ? static_cast<double>(model.mask.thresholds[at + j]) : 1.0;
            delta = keep ? rn(delta * static_cast<Real>(4294967296.0 / threshold)) : Real(0);
        } else if (model.rescale != 1) {
            delta = rn(delta * static_cast<Real>(model.rescale));
        }
        counted += keep && delta != 0;
        return keep ? rn(delta * (weighs_later ? Real(1) : static_cast<Real>(model.weight))) : Real(0);
    };
    const auto look = [&](size_t i, const Pack<Working, V>& x, uint32_t bits) {
        uint32_t counted = 0;
        if (active) {
            const Model& model = models[i];
            count_non_finite(job.non_finite + 1 + i, non_finite_in(x));
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const Real v = weighted(model, x, bits, j, counted);
                const Real sign = v > 0 ? Real(1) : v < 0 ? Real(-1) : Real(0);
                const Real vote = job.election == Election::Count ? sign : v;
                plain[j] += overlap ? (v != 0 ? Real(1) : Real(0)) : vote;
                if constexpr (Slack) {
                    sum[j] += vote * static_cast<Real>(model.vote);
                    magnitude[j] += vote < 0 ? -vote : vote;
                }
            }
        }
        count_warp(counters + 3 * i, counted, 0, 0);
    };
    if constexpr (KEPT > 0) {
#pragma unroll
        for (int i = 0; i < KEPT; ++i) {
            kept[i] = 0;
            if (static_cast<size_t>(i) >= job.models) continue;
            kept[i] = take(static_cast<size_t>(i), held[i]);
            look(static_cast<size_t>(i), held[i], kept[i]);
        }
    } else {
        for (size_t i = 0; i < job.models; ++i) {
            Pack<Working, V> x;
            const uint32_t bits = take(i, x);
            look(i, x, bits);
        }
    }

    Real mean[V], divisor[V];
    if (job.election == Election::None) {
#pragma unroll
        for (int j = 0; j < V; ++j) mean[j] = plain[j], divisor[j] = static_cast<Real>(job.divisor);
    } else {
        // Step 6. Without vote slack the two sums are one.
#pragma unroll
        for (int j = 0; j < V; ++j) {
            mean[j] = divisor[j] = 0;
            plain[j] = overlap ? plain[j] : rn(plain[j]);
            sum[j] = Slack && job.slack_votes ? rn(sum[j]) : plain[j];
        }
        // Step 7.
        const auto retain = [&](size_t i, const Pack<Working, V>& x, uint32_t bits) {
            uint32_t lost = 0, saved = 0, counted = 0;
            if (active) {
                const Model& model = models[i];
                const Real slack = static_cast<Real>(model.retain);
#pragma unroll
                for (int j = 0; j < V; ++j) {
                    const Real v = weighted(model, x, bits, j, counted);
                    const Real weight = static_cast<Real>(model.weight);
                    if (overlap) {  // step 21
                        const Real part = plain[j] > 1 ? rn(v / plain[j]) : rn_unless_wide(v * weight);
                        mean[j] += v != 0 ? part : Real(0);
                        continue;
                    }
                    const bool positive = v > 0, agrees = positive == (sum[j] >= 0);
                    bool retained = v != 0 && agrees;
                    if constexpr (Slack) {
                        const Real margin = sum[j] < 0 ? -sum[j] : sum[j];
                        const bool narrow = job.retains && (margin < slack * magnitude[j] || slack >= 1);
                        retained = v != 0 && (agrees || narrow);
                        saved += retained && positive != (plain[j] >= 0);
                    }
                    mean[j] += retained ? (weighs_later ? rn(v * weight) : v) : Real(0);
                    divisor[j] += retained ? weight : Real(0);
                    lost += v != 0 && !retained;
                }
            }
            count_warp(counters + 3 * i, 0, lost, saved);
        };
        if constexpr (KEPT > 0) {
#pragma unroll
            for (int i = 0; i < KEPT; ++i) {
                if (static_cast<size_t>(i) < job.models) retain(static_cast<size_t>(i), held[i], kept[i]);
            }
        } else {
            for (size_t i = 0; i < job.models; ++i) {
                Pack<Working, V> x;
                const uint32_t bits = take(i, x);
                retain(i, x, bits);
            }
        }
#pragma unroll
        for (int j = 0; j < V; ++j) {
            divisor[j] = rn(divisor[j]);
            divisor[j] = divisor[j] == 0 ? Real(1) : divisor[j];
        }
    }

    // Step 8: b + lambda * m.
    if (!active) return;
    const Real lambda = static_cast<Real>(job.lambda);
#pragma unroll
    for (int j = 0; j < V; ++j) {
        mean[j] = rn_unless_wide(mean[j]);
        if (job.normalize && !overlap) mean[j] = rn_unless_wide(mean[j] / divisor[j]);
        if (lambda != 1) mean[j] = rn_unless_wide(mean[j] * lambda);
        mean[j] = rn_unless_wide(base.template value<Real>(j) + mean[j]);
    }
    count_non_finite(job.non_finite + 1 + job.models, store_values<Working, V>(job.output, at, mean));
}

// The elements [at, at + V), one after the other: few instructions, for what is rare.
template <DType Working, int V, bool Slack>
__device__ __attribute__((noinline)) void merge_elements(const Job& job, const Model* models, uint32_t* counters,
                                                         uint64_t at, bool active) {
#pragma unroll 1
    for (int j = 0; j < V; ++j) merge<Working, 1, 0, Slack, false>(job, models, counters, at + j, active);
}

}  // namespace merge_engine
