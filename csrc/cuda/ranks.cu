// DELLA's keep probabilities: magnitudes ranked within each line of a tensor.
//
// A block takes a line at a time. It counts keys of 16 bits, so that every element reads off how many keys are smaller and
// how many equal. Other keys, and very long lines, it sorts (bitonic, in shared memory when they fit), and looks them up.
#include <memory>

#include "../ranks.h"
#include "block_scan.cuh"
#include "elements.cuh"
#include "jobs.cuh"
#include "key_counters.cuh"
#include "primitives.h"

namespace merge_engine {
namespace {

constexpr unsigned SORTING_THREADS = 256, COUNTING_THREADS = 512;
constexpr uint64_t WORTH_COUNTING = 1024;      // elements of a line: shorter ones are sorted sooner
constexpr uint64_t SHARED_KEYS = 8192;         // 64 KiB, so that an SM holds more than one block
constexpr uint64_t KEYS_AT_ONCE = 8ull << 20;  // of longer lines, in device memory

// `padded` is the length rounded up to a power of two; `scratch` holds as many keys for each block, or is null when
// shared memory does.
struct Lines {
    Array base, model;
    uint64_t length, stride, lines, padded;
    Probability probability;
    uint64_t* scratch;
    uint32_t* thresholds;
    Blocks blocks;
};

template <DType Working>
__device__ uint64_t key_at(const Lines& lines, uint64_t index) {
    using Real = RealOf<Working>;
    const auto b = load_pack<Working, 1>(lines.base, index);
    const auto x = load_pack<Working, 1>(lines.model, index);
    return magnitude_key<Working>(x.template value<Real>(0) - b.template value<Real>(0));
}

// The flat index of a line's first element.
__device__ inline uint64_t first_of_line(const Lines& lines, uint64_t line) {
    return line / lines.stride * lines.length * lines.stride + line % lines.stride;
}

template <DType Working>
__global__ void __launch_bounds__(COUNTING_THREADS, 2) count_lines(const List<Lines> jobs, size_t n) {
    const Lines& lines = job_of_block(jobs, n, shared_memory<Lines>());
    uint64_t* sums = behind<uint64_t>(shared_memory<Lines>());
    KeyCounters counters(sums + COUNTING_THREADS);
    constexpr uint32_t KEYS = KeyCounters::KEYS, RUN = KEYS / COUNTING_THREADS;
    for (uint64_t line = blockIdx.x - lines.blocks.first; line < lines.lines; line += lines.blocks.count) {
        const uint64_t first = first_of_line(lines, line);
        counters.clear();
        __syncthreads();
        for (uint64_t j = threadIdx.x; j < lines.length; j += blockDim.x) {
            counters.count(static_cast<uint32_t>(key_at<Working>(lines, first + j * lines.stride)));
        }
        __syncthreads();
        // Each counter becomes the number of smaller keys.
        const uint32_t run = threadIdx.x * RUN;
        uint64_t own = 0;
        for (uint32_t i = 0; i < RUN; ++i) own += counters[run + i];
        uint64_t smaller = sum_over_block(own, sums).before;
        for (uint32_t i = 0; i < RUN; ++i) {
            const uint32_t equal = counters[run + i];
            counters.set(run + i, static_cast<uint32_t>(smaller));
            smaller += equal;
        }
        __syncthreads();
        for (uint64_t j = threadIdx.x; j < lines.length; j += blockDim.x) {
            const uint64_t index = first + j * lines.stride;
            const uint32_t key = static_cast<uint32_t>(key_at<Working>(lines, index));
            const uint64_t up_to = key + 1 < KEYS ? counters[key + 1] : lines.length;
            // 2 * smaller + equal - 1
            lines.thresholds[index] = lines.probability.threshold(counters[key] + up_to - 1);
        }
        __syncthreads();
    }
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

template <DType Working>
__global__ void __launch_bounds__(SORTING_THREADS, 1) sort_lines(const List<Lines> jobs, size_t n) {
    const Lines& lines = job_of_block(jobs, n, shared_memory<Lines>());
    const uint64_t block = blockIdx.x - lines.blocks.first;
    uint64_t* keys = lines.scratch ? lines.scratch + block * lines.padded : behind<uint64_t>(shared_memory<Lines>());
    for (uint64_t line = block; line < lines.lines; line += lines.blocks.count) {
        const uint64_t first = first_of_line(lines, line);
        for (uint64_t j = threadIdx.x; j < lines.padded; j += blockDim.x) {
            keys[j] = j < lines.length ? key_at<Working>(lines, first + j * lines.stride) : ~0ull;
        }
        __syncthreads();
        sort_block(keys, lines.padded);
        for (uint64_t j = threadIdx.x; j < lines.length; j += blockDim.x) {
            const uint64_t index = first + j * lines.stride, key = key_at<Working>(lines, index);
            const uint64_t smaller = keys_below(keys, lines.length, key, false);
            const uint64_t equal = keys_below(keys, lines.length, key, true) - smaller;
            lines.thresholds[index] = lines.probability.threshold(2 * smaller + equal - 1);
        }
        __syncthreads();
    }
}

}  // namespace

void rank_thresholds(const Queue& queue, const std::vector<RankCall>& calls) {
    const OnDevice on(queue.device);
    Launches<Lines> counting, sorting;
    std::vector<std::unique_ptr<Scratch<uint64_t>>> scratch;  // until its jobs are launched
    uint64_t held = 0;
    for (const RankCall& call : calls) {
        if (call.length == 0 || call.stride == 0 || call.count == 0) continue;
        Lines lines{call.base, call.model, call.length, call.stride, call.count / call.length, 1, {}, nullptr,
                    call.thresholds, {}};
        lines.probability = {call.density, call.epsilon, call.length};
        const bool halves = call.working == DType::BF16 || call.working == DType::F16;
        if (halves && call.length >= WORTH_COUNTING && call.length <= KeyCounters::MOST) {
            const auto kernel = call.working == DType::BF16 ? count_lines<DType::BF16> : count_lines<DType::F16>;
            counting.add(kernel, lines, blocks_for(lines.lines, 1, 4, queue.device),
                         COUNTING_THREADS * sizeof(uint64_t) + KeyCounters::BYTES);
            continue;
        }
        while (lines.padded < call.length) lines.padded *= 2;
        const bool shared = lines.padded <= SHARED_KEYS;
        const unsigned blocks = blocks_for(lines.lines, 1, shared ? 4 : 2, queue.device);
        const uint64_t keys = shared ? 0 : blocks * lines.padded;
        if (held > 0 && held + keys > KEYS_AT_ONCE) {
            sorting.launch(queue, SORTING_THREADS);
            sorting = {};
            scratch.clear();
            held = 0;
        }
        held += keys;
        scratch.push_back(std::make_unique<Scratch<uint64_t>>(queue, keys));
        lines.scratch = scratch.back()->data;
        with_dtype(call.working, [&](auto dtype) {
            sorting.add(sort_lines<dtype()>, lines, blocks, shared ? lines.padded * sizeof(uint64_t) : 0);
        });
    }
    counting.launch(queue, COUNTING_THREADS);
    sorting.launch(queue, SORTING_THREADS);
}

}  // namespace merge_engine
