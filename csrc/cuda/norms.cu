// Norms and inner products: exact products of inputs, summed in double in a fixed order.
//
// A thread is a lane of the fixed order: it adds every SUM_LANES-th element of a SUM_BLOCK. Lanes are added pairwise,
// and the sums of blocks by whoever fetches them. See docs/arithmetic.md, step 11.
#include "elements.cuh"
#include "jobs.cuh"
#include "primitives.h"

namespace merge_engine {
namespace {

constexpr unsigned LANES = SUM_LANES;

struct Model {
    Array array;
    Mask mask;
};

// The norms of a chunk, and the place of its models in the list of all.
struct NormJob {
    Array base;
    size_t first_model, models;
    uint64_t start, count;
    double* sums;
    Blocks blocks;
};

// The inner products of a chunk, and the place of its inputs in the list of all.
struct GramJob {
    size_t first_input, inputs;
    uint64_t count;
    double* sums;
    Blocks blocks;
};

// The lanes of all threads, added pairwise; every thread gets the sum. `memory` is shared, one double a lane.
__device__ double sum_lanes(double lane, double* memory) {
    memory[threadIdx.x] = lane;
    __syncthreads();
    for (unsigned half = LANES / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) memory[threadIdx.x] += memory[threadIdx.x + half];
        __syncthreads();
    }
    const double sum = memory[0];
    __syncthreads();
    return sum;
}

template <DType Working, bool Stored>
__global__ void __launch_bounds__(LANES, 1)
    l1_blocks(const List<NormJob> jobs, size_t n, const List<Model> models) {
    using Real = RealOf<Working>;
    const NormJob& job = job_of_block(jobs, n, shared_memory<NormJob>());
    double* memory = behind<double>(shared_memory<NormJob>());
    const uint64_t sum_blocks = (job.count + SUM_BLOCK - 1) / SUM_BLOCK;
    for (uint64_t block = blockIdx.x - job.blocks.first; block < sum_blocks; block += job.blocks.count) {
        const uint64_t last = min(job.count, (block + 1) * SUM_BLOCK);
        for (size_t m = 0; m < job.models; ++m) {
            const Array model = models[job.first_model + m].array;
            const Mask mask = resolved(models[job.first_model + m].mask);
            double all = 0, surviving = 0;
            for (uint64_t at = block * SUM_BLOCK + threadIdx.x; at < last; at += LANES) {
                const auto b = load_pack<Working, 1>(job.base, at);
                const auto x = load_pack<Working, 1>(model, at);
                Real delta[] = {x.template value<Real>(0) - b.template value<Real>(0)};
                if constexpr (Stored) delta[0] = RoundedTo<Working>::round(delta[0]);
                const double magnitude = static_cast<double>(delta[0] < 0 ? -delta[0] : delta[0]);
                all += magnitude;
                surviving += kept_bits<Working>(mask, delta, job.start + at, at) ? magnitude : 0.0;
            }
            const double before = sum_lanes(all, memory), after = sum_lanes(surviving, memory);
            if (threadIdx.x == 0) {
                job.sums[(block * job.models + m) * 2] = before;
                job.sums[(block * job.models + m) * 2 + 1] = after;
            }
        }
    }
}

template <DType Working>
__global__ void __launch_bounds__(LANES, 1) gram_blocks(const List<GramJob> jobs, size_t n, const List<Array> inputs) {
    using Real = RealOf<Working>;
    const GramJob& job = job_of_block(jobs, n, shared_memory<GramJob>());
    double* memory = behind<double>(shared_memory<GramJob>());
    const uint64_t sum_blocks = (job.count + SUM_BLOCK - 1) / SUM_BLOCK;
    const size_t pairs = job.inputs * (job.inputs + 1) / 2;
    for (uint64_t block = blockIdx.x - job.blocks.first; block < sum_blocks; block += job.blocks.count) {
        const uint64_t last = min(job.count, (block + 1) * SUM_BLOCK);
        double* sums = job.sums + block * pairs;
        for (size_t i = 0; i < job.inputs; ++i) {
            for (size_t k = i; k < job.inputs; ++k) {
                double lane = 0;
                for (uint64_t at = block * SUM_BLOCK + threadIdx.x; at < last; at += LANES) {
                    const auto x = load_pack<Working, 1>(inputs[job.first_input + i], at);
                    const auto y = load_pack<Working, 1>(inputs[job.first_input + k], at);
                    lane += static_cast<double>(x.template value<Real>(0)) *
                            static_cast<double>(y.template value<Real>(0));
                }
                const double sum = sum_lanes(lane, memory);
                if (threadIdx.x == 0) *sums = sum;
                ++sums;
            }
        }
    }
}

// Blocks of threads for the sums of a chunk.
unsigned blocks_of(uint64_t count, const Queue& queue) { return blocks_for(count, SUM_BLOCK, 16, queue.device); }

}  // namespace

void l1_norms(const Queue& queue, const std::vector<NormCall>& calls) {
    const OnDevice on(queue.device);
    Launches<NormJob, List<Model>> norms;
    std::vector<Model> models;
    for (const NormCall& call : calls) {
        const NormJob job{call.base, models.size(), call.models.size(), call.start, call.count, call.sums, {}};
        for (size_t m = 0; m < call.models.size(); ++m) models.push_back({call.models[m], call.masks[m]});
        with_dtype(call.working, [&](auto dtype) {
            const auto kernel = call.storage_rounding ? l1_blocks<dtype(), true> : l1_blocks<dtype(), false>;
            norms.add(kernel, job, blocks_of(call.count, queue), LANES * sizeof(double));
        });
    }
    const Listed<Model> listed(queue, models);
    norms.launch(queue, LANES, listed.list);
}

void gram(const Queue& queue, const std::vector<GramCall>& calls) {
    const OnDevice on(queue.device);
    Launches<GramJob, List<Array>> products;
    std::vector<Array> inputs;
    for (const GramCall& call : calls) {
        const GramJob job{inputs.size(), call.inputs.size(), call.count, call.sums, {}};
        inputs.insert(inputs.end(), call.inputs.begin(), call.inputs.end());
        with_dtype(call.working, [&](auto dtype) {
            products.add(gram_blocks<dtype()>, job, blocks_of(call.count, queue), LANES * sizeof(double));
        });
    }
    const Listed<Array> listed(queue, inputs);
    products.launch(queue, LANES, listed.list);
}

}  // namespace merge_engine
