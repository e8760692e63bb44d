// Norms and inner products: exact products of inputs, summed in double in a fixed order.
//
// A thread is a lane of the fixed order: it adds every SUM_LANES-th element of a SUM_BLOCK. Lanes are added pairwise,
// blocks one after the other by a last kernel. See docs/arithmetic.md, step 11.
#include "elements.cuh"
#include "primitives.h"

namespace merge_engine {
namespace {

constexpr unsigned LANES = SUM_LANES;

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
    l1_blocks(const Array base, const List<Array> models, const List<Mask> masks, size_t n, uint64_t start,
              uint64_t count, double* block_sums) {
    using Real = RealOf<Working>;
    double* memory = shared_memory<double>();
    const uint64_t blocks = (count + SUM_BLOCK - 1) / SUM_BLOCK;
    for (uint64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
        const uint64_t last = min(count, (block + 1) * SUM_BLOCK);
        for (size_t m = 0; m < n; ++m) {
            const Mask mask = resolved(masks[m]);
            double all = 0, surviving = 0;
            for (uint64_t at = block * SUM_BLOCK + threadIdx.x; at < last; at += LANES) {
                const auto b = load_pack<Working, 1>(base, at);
                const auto x = load_pack<Working, 1>(models[m], at);
                Real delta[] = {x.template value<Real>(0) - b.template value<Real>(0)};
                if constexpr (Stored) delta[0] = RoundedTo<Working>::round(delta[0]);
                const double magnitude = static_cast<double>(delta[0] < 0 ? -delta[0] : delta[0]);
                all += magnitude;
                surviving += kept_bits<Working>(mask, delta, start + at, at) ? magnitude : 0.0;
            }
            const double before = sum_lanes(all, memory), after = sum_lanes(surviving, memory);
            if (threadIdx.x == 0) {
                block_sums[(block * n + m) * 2] = before;
                block_sums[(block * n + m) * 2 + 1] = after;
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
__global__ void add_blocks(uint64_t blocks, size_t width, const double* block_sums, double* sums) {
    const size_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= width) return;
    double total = sums[i];
    for (uint64_t block = 0; block < blocks; ++block) total += block_sums[block * width + i];
    sums[i] = total;
}

// `fill` hands in the kernel that computes `width` sums for each block.
template <class Fill>
void add_up(const Queue& queue, uint64_t count, size_t width, double* sums, Fill&& fill) {
    const uint64_t blocks = (count + SUM_BLOCK - 1) / SUM_BLOCK;
    const Scratch<double> block_sums(queue, blocks * width);
    fill(blocks_for(blocks, 1, 16, queue.device), block_sums.data);
    launch(add_blocks, static_cast<unsigned>((width + WARP - 1) / WARP), WARP, 0, queue, blocks, width, block_sums.data,
           sums);
}

}  // namespace

void l1_norms(const Queue& queue, const Array& base, const std::vector<Array>& models, const std::vector<Mask>& masks,
              DType working, bool storage_rounding, uint64_t start, uint64_t count, double* sums) {
    const OnDevice on(queue.device);
    const Listed<Array> arrays(queue, models);
    const Listed<Mask> listed(queue, masks);
    const size_t n = models.size();
    add_up(queue, count, 2 * n, sums, [&](unsigned blocks, double* block_sums) {
        with_dtype(working, [&](auto dtype) {
            const auto kernel = storage_rounding ? l1_blocks<dtype(), true> : l1_blocks<dtype(), false>;
            launch(kernel, blocks, LANES, LANES * sizeof(double), queue, base, arrays.list, listed.list, n, start, count,
                   block_sums);
        });
    });
}

void gram(const Queue& queue, const std::vector<Array>& inputs, DType working, uint64_t count, double* sums) {
    const OnDevice on(queue.device);
    const Listed<Array> arrays(queue, inputs);
    const size_t n = inputs.size();
    // Below the diagonal nothing is written: what is added there must be zero.
    add_up(queue, count, n * n, sums, [&](unsigned blocks, double* block_sums) {
        const uint64_t sum_blocks = (count + SUM_BLOCK - 1) / SUM_BLOCK;
        check(cudaMemsetAsync(block_sums, 0, sum_blocks * n * n * sizeof(double), stream_of(queue)), "clearing sums");
        with_dtype(working, [&](auto dtype) {
            launch(gram_blocks<dtype()>, blocks, LANES, LANES * sizeof(double), queue, arrays.list, n, count, block_sums);
        });
    });
}

}  // namespace merge_engine
