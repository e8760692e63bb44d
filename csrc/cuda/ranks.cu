// DELLA's keep probabilities: magnitudes ranked within each line of a tensor.
//
// A block sorts the keys of a line (bitonic, in shared memory when they fit), then every element looks up how many
// keys are smaller and how many equal.
#include "../ranks.h"
#include "elements.cuh"
#include "primitives.h"

namespace merge_engine {
namespace {

constexpr unsigned THREADS = 256;
constexpr uint64_t SHARED_KEYS = 8192;  // 64 KiB, so that an SM holds more than one block

struct Lines {
    Array base, model;
    uint64_t length, stride, lines;
    Probability probability;
};

template <DType Working>
__device__ uint64_t key_at(const Lines& lines, uint64_t index) {
    using Real = RealOf<Working>;
    const auto b = load_pack<Working, 1>(lines.base, index);
    const auto x = load_pack<Working, 1>(lines.model, index);
    return magnitude_key<Working>(x.template value<Real>(0) - b.template value<Real>(0));
}

// How many of the sorted keys are smaller than `key`, or with `or_equal` not larger.
__device__ uint64_t keys_below(const uint64_t* sorted, uint64_t length, uint64_t key, bool or_equal) {
    uint64_t first = 0, last = length;
    while (first < last) {
        const uint64_t middle = (first + last) / 2;
        if (sorted[middle] < key || (or_equal && sorted[middle] == key)) {
            first = middle + 1;
        } else {
            last = middle;
        }
    }
    return first;
}

__device__ void sort_block(uint64_t* keys, uint64_t size) {
    for (uint64_t run = 2; run <= size; run *= 2) {
        for (uint64_t distance = run / 2; distance > 0; distance /= 2) {
            for (uint64_t pair = threadIdx.x; pair < size / 2; pair += blockDim.x) {
                const uint64_t left = pair / distance * 2 * distance + pair % distance, right = left + distance;
                const bool ascending = (left & run) == 0;
                if ((keys[left] > keys[right]) == ascending) {
                    const uint64_t swapped = keys[left];
                    keys[left] = keys[right];
                    keys[right] = swapped;
                }
            }
            __syncthreads();
        }
    }
}

// `padded` is the length rounded up to a power of two; `scratch` holds as many keys for each block, or is null when
// shared memory does.
template <DType Working>
__global__ void __launch_bounds__(THREADS, 1)
    rank_lines(const Lines lines, uint64_t padded, uint64_t* scratch, uint32_t* thresholds) {
    uint64_t* keys = scratch ? scratch + blockIdx.x * padded : shared_memory<uint64_t>();
    for (uint64_t line = blockIdx.x; line < lines.lines; line += gridDim.x) {
        const uint64_t first = line / lines.stride * lines.length * lines.stride + line % lines.stride;
        for (uint64_t j = threadIdx.x; j < padded; j += blockDim.x) {
            keys[j] = j < lines.length ? key_at<Working>(lines, first + j * lines.stride) : ~0ull;
        }
        __syncthreads();
        sort_block(keys, padded);
        for (uint64_t j = threadIdx.x; j < lines.length; j += blockDim.x) {
            const uint64_t index = first + j * lines.stride, key = key_at<Working>(lines, index);
            const uint64_t smaller = keys_below(keys, lines.length, key, false);
            const uint64_t equal = keys_below(keys, lines.length, key, true) - smaller;
            thresholds[index] = lines.probability.threshold(2 * smaller + equal - 1);
        }
        __syncthreads();
    }
}

}  // namespace

void rank_thresholds(const Queue& queue, const Array& base, const Array& model, DType working, uint64_t length,
                     uint64_t stride, double density, double epsilon, uint64_t count, uint32_t* thresholds) {
    if (length == 0 || stride == 0 || count == 0) return;
    const OnDevice on(queue.device);
    uint64_t padded = 1;
    while (padded < length) padded *= 2;
    const Lines lines{base, model, length, stride, count / length, {density, epsilon, length}};
    const bool shared = padded <= SHARED_KEYS;
    const unsigned blocks = blocks_for(lines.lines, 1, shared ? 4 : 2, queue.device);
    const Scratch<uint64_t> scratch(queue, shared ? 0 : blocks * padded);
    with_dtype(working, [&](auto dtype) {
        launch(rank_lines<dtype()>, blocks, THREADS, shared ? padded * sizeof(uint64_t) : 0, queue, lines, padded,
               scratch.data, thresholds);
    });
}

}  // namespace merge_engine
