// L1 norms: magnitudes summed in double in a fixed order. A thread is as many neighbouring lanes as it loads elements at a
// time.
#include "elements.cuh"
#include "jobs.cuh"
#include "primitives.h"
#include "sums.cuh"

namespace merge_engine {
namespace {

struct Model {
    Array array;
    Mask mask;
};

// The norms of a chunk, and the place of its models in the list of all.
struct NormJob {
    Array base;
    size_t first_model, models;
    bool squared;
    uint64_t start, count;
    double* sums;
    Blocks blocks;
};

// The sums of V lanes: of all magnitudes or squares, and of those that a mask keeps.
template <DType Working, bool Stored, int V>
struct LaneSums {
    using Real = RealOf<Working>;
    double all[V] = {}, kept[V] = {};

    // Elements [at, at + P), the first in lane j.
    template <int P>
    __device__ void add(const NormJob& job, const Array& model, const Mask& mask, uint64_t at, int first) {
        const auto base = load_pack<Working, P>(job.base, at);
        const auto x = load_pack<Working, P>(model, at);
        Real delta[P];
#pragma unroll
        for (int j = 0; j < P; ++j) {
            delta[j] = x.template value<Real>(j) - base.template value<Real>(j);
            if constexpr (Stored) delta[j] = RoundedTo<Working>::round(delta[j]);
        }
        const uint32_t bits = kept_bits<Working>(mask, delta, job.start + at, at);
#pragma unroll
        for (int j = 0; j < P; ++j) {
            double term = static_cast<double>(delta[j] < 0 ? -delta[j] : delta[j]);
            if (job.squared) term = Stored ? RoundedTo<Working>::round(delta[j] * delta[j]) : term * term;
#pragma unroll
            for (int lane = 0; lane < V; ++lane) {
                if (lane != (P == V ? j : first)) continue;
                all[lane] += term;
                kept[lane] += bits >> j & 1 ? term : 0.0;
            }
        }
    }
};

template <DType Working, bool Stored, int V>
__global__ void __launch_bounds__(LANES, 1)
    l1_blocks(const List<NormJob> jobs, size_t n, const List<Model> models) {
    const NormJob& job = job_of_block(jobs, n, shared_memory<NormJob>());
    constexpr unsigned THREADS = LANES / V;  // to a SUM_BLOCK
    const unsigned thread = threadIdx.x % THREADS;
    double* memory = behind<double>(shared_memory<NormJob>()) + threadIdx.x / THREADS * LANES;
    const uint64_t sum_blocks = (job.count + SUM_BLOCK - 1) / SUM_BLOCK;
    for (uint64_t first = uint64_t{blockIdx.x - job.blocks.first} * V; first < sum_blocks; first += job.blocks.count * V) {
        const uint64_t block = first + threadIdx.x / THREADS;  // there may be none
        const uint64_t last = min(job.count, (block + 1) * SUM_BLOCK);
        for (size_t m = 0; m < job.models; ++m) {
            const Array model = models[job.first_model + m].array;
            const Mask mask = resolved(models[job.first_model + m].mask);
            LaneSums<Working, Stored, V> sums;
            for (uint64_t at = block * SUM_BLOCK + thread * V; at < last; at += LANES) {
                if (at + V <= last) {
                    sums.template add<V>(job, model, mask, at, 0);
                } else {
                    for (uint64_t j = 0; at + j < last; ++j) {
                        sums.template add<1>(job, model, mask, at + j, static_cast<int>(j));
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < V; ++j) memory[thread * V + j] = sums.all[j];
            const double before = sum_lanes(memory, thread, THREADS);
#pragma unroll
            for (int j = 0; j < V; ++j) memory[thread * V + j] = sums.kept[j];
            const double after = sum_lanes(memory, thread, THREADS);
            if (thread == 0 && block < sum_blocks) {
                job.sums[(block * job.models + m) * 2] = before;
                job.sums[(block * job.models + m) * 2 + 1] = after;
            }
        }
    }
}

constexpr unsigned BLOCKS_PER_PROCESSOR = 16;

using NormLaunches = Launches<NormJob, List<Model>>;

template <DType Working, int V>
void add_norms(NormLaunches& launches, const NormJob& job, bool stored, int device) {
    const auto kernel = stored ? l1_blocks<Working, true, V> : l1_blocks<Working, false, V>;
    const unsigned blocks = blocks_for(job.count, SUM_BLOCK * V, BLOCKS_PER_PROCESSOR, device);
    launches.add(kernel, job, blocks, V * LANES * sizeof(double));
}

}  // namespace

void l1_norms(const Queue& queue, const std::vector<NormCall>& calls) {
    const OnDevice on(queue.device);
    NormLaunches norms;
    std::vector<Model> models;
    for (const NormCall& call : calls) {
        const NormJob job{call.base,  models.size(), call.models.size(), call.squared,
                          call.start, call.count,    call.sums,          {}};
        bool vectors = fits_vectors(call.base, call.working);
        for (size_t m = 0; m < call.models.size(); ++m) {
            models.push_back({call.models[m], call.masks[m]});
            vectors &= fits_vectors(call.models[m], call.working);
        }
        with_dtype(call.working, [&](auto dtype) {
            if (vectors) {
                add_norms<dtype(), VECTOR<dtype()>>(norms, job, call.storage_rounding, queue.device);
            } else {
                add_norms<dtype(), 1>(norms, job, call.storage_rounding, queue.device);
            }
        });
    }
    const Listed<Model> listed(queue, models);
    norms.launch(queue, LANES, listed.list);
}

}  // namespace merge_engine
