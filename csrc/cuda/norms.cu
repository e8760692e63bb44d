// Norms and inner products: exact products of inputs, summed in double in a fixed order.
//
// A thread is a lane of the fixed order: it adds every SUM_LANES-th element of a SUM_BLOCK. Lanes are added pairwise,
// blocks one after the other by a last kernel. See docs/arithmetic.md, step 11.
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

// The norms of a chunk by blocks, and the place of its models in the list of all.
struct NormJob {
    Array base;
    size_t first_model, models;
    uint64_t start, count;
    double* block_sums;
    Blocks blocks;
};

// Adds the rows of block_sums[sum_blocks][width] to what was there before, if anything.
struct Addition {
    uint64_t sum_blocks;
    size_t width;
    const double* block_sums;
    const double* before;
    double* sums;
    Blocks blocks;
};

uint64_t sum_blocks_of(uint64_t count) { return (count + SUM_BLOCK - 1) / SUM_BLOCK; }

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
                job.block_sums[(block * job.models + m) * 2] = before;
                job.block_sums[(block * job.models + m) * 2 + 1] = after;
            }
        }
    }
}

template <DType Working>
__global__ void __launch_bounds__(LANES, 1) gram_blocks(const List<Array> inputs, size_t n, uint64_t count, double* block_sums) {
    using Real = RealOf<Working>;
    double* memory = shared_memory<double>();
    const uint64_t blocks = (count + SUM_BLOCK - 1) / SUM_BLOCK;
    for (uint64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
        const uint64_t last = min(count, (block + 1) * SUM_BLOCK);
        for (size_t i = 0; i < n; ++i) {
            for (size_t k = i; k < n; ++k) {
                double lane = 0;
                for (uint64_t at = block * SUM_BLOCK + threadIdx.x; at < last; at += LANES) {
                    const auto x = load_pack<Working, 1>(inputs[i], at);
                    const auto y = load_pack<Working, 1>(inputs[k], at);
                    lane += static_cast<double>(x.template value<Real>(0)) * static_cast<double>(y.template value<Real>(0));
                }
                const double sum = sum_lanes(lane, memory);
                if (threadIdx.x == 0) block_sums[(block * n + i) * n + k] = sum;
            }
        }
    }
}

// One thread a sum.
__global__ void add_blocks(const List<Addition> jobs, size_t n) {
    const Addition& job = job_of_block(jobs, n, shared_memory<Addition>());
    const size_t i = (blockIdx.x - job.blocks.first) * blockDim.x + threadIdx.x;
    if (i >= job.width) return;
    double total = job.before ? job.before[i] : 0;
    for (uint64_t block = 0; block < job.sum_blocks; ++block) total += job.block_sums[block * job.width + i];
    job.sums[i] = total;
}

unsigned blocks_of(uint64_t sum_blocks, const Queue& queue) { return blocks_for(sum_blocks, 1, 16, queue.device); }

void add(Launches<Addition>& launches, const Addition& addition) {
    launches.add(add_blocks, addition, static_cast<unsigned>((addition.width + WARP - 1) / WARP), 0);
}

}  // namespace

void l1_norms(const Queue& queue, const std::vector<NormCall>& calls) {
    const OnDevice on(queue.device);
    size_t held = 0;
    for (const NormCall& call : calls) held += sum_blocks_of(call.count) * 2 * call.models.size();
    const Scratch<double> block_sums(queue, held);
    double* free = block_sums.data;
    Launches<NormJob, List<Model>> norms;
    Launches<Addition> additions;
    std::vector<Model> models;
    for (const NormCall& call : calls) {
        const size_t n = call.models.size();
        const uint64_t sum_blocks = sum_blocks_of(call.count);
        const NormJob job{call.base, models.size(), n, call.start, call.count, free, {}};
        for (size_t m = 0; m < n; ++m) models.push_back({call.models[m], call.masks[m]});
        with_dtype(call.working, [&](auto dtype) {
            const auto kernel = call.storage_rounding ? l1_blocks<dtype(), true> : l1_blocks<dtype(), false>;
            norms.add(kernel, job, blocks_of(sum_blocks, queue), LANES * sizeof(double));
        });
        add(additions, {sum_blocks, 2 * n, free, call.before, call.sums, {}});
        free += sum_blocks * 2 * n;
    }
    const Listed<Model> listed(queue, models);
    norms.launch(queue, LANES, listed.list);
    additions.launch(queue, WARP);
}

void gram(const Queue& queue, const std::vector<Array>& inputs, DType working, uint64_t count, double* sums) {
    const OnDevice on(queue.device);
    const Listed<Array> arrays(queue, inputs);
    const size_t n = inputs.size();
    const uint64_t sum_blocks = sum_blocks_of(count);
    const Scratch<double> block_sums(queue, sum_blocks * n * n);
    // Below the diagonal nothing is written: what is added there must be zero.
    check(cudaMemsetAsync(block_sums.data, 0, sum_blocks * n * n * sizeof(double), stream_of(queue)), "clearing sums");
    with_dtype(working, [&](auto dtype) {
        launch(gram_blocks<dtype()>, blocks_of(sum_blocks, queue), LANES, LANES * sizeof(double), queue, arrays.list, n,
               count, block_sums.data);
    });
    Launches<Addition> additions;
    add(additions, {sum_blocks, n * n, block_sums.data, sums, sums, {}});
    additions.launch(queue, WARP);
}

}  // namespace merge_engine
