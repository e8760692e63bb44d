// Which thread of a block holds the n-th of things that the threads have counted.
#pragma once

#include "runtime.h"

namespace merge_engine {

// `before` is how many the threads in front counted, `total` how many all did. `memory` is shared, one word a thread.
struct BlockSum {
    uint64_t before, total;
};

__device__ inline BlockSum sum_over_block(uint64_t own, uint64_t* memory) {
    memory[threadIdx.x] = own;
    __syncthreads();
    for (unsigned step = 1; step < blockDim.x; step *= 2) {
        const uint64_t left = threadIdx.x >= step ? memory[threadIdx.x - step] : 0;
        __syncthreads();
        memory[threadIdx.x] += left;
        __syncthreads();
    }
    const BlockSum result{memory[threadIdx.x] - own, memory[blockDim.x - 1]};
    __syncthreads();
    return result;
}

// Counts of bins, of which each thread of a block takes a run, from the top. `count_of` gives the count of a bin, and
// `memory` is shared, one word a thread. All threads of a block make it.
template <class CountOf>
class BinRuns {
  public:
    __device__ BinRuns(const CountOf& count_of, uint64_t bins, uint64_t* memory)
        : count_of_(count_of), top_(bins - threadIdx.x * (bins / blockDim.x)) {
        for (uint64_t i = 1; i <= bins / blockDim.x; ++i) own_ += count_of_(top_ - i);
        sum_ = sum_over_block(own_, memory);
    }
    __device__ uint64_t total() const { return sum_.total; }

    // Calls take(bin, above, equal) in the thread of the bin where the `rank`-th largest lies, from 1, if there is one.
    template <class Take>
    __device__ void find(uint64_t rank, Take&& take) const {
        uint64_t above = sum_.before;
        if (rank <= above || rank > above + own_) return;
        uint64_t bin = top_ - 1;
        for (; above + count_of_(bin) < rank; --bin) above += count_of_(bin);
        take(bin, above, count_of_(bin));
    }

  private:
    const CountOf& count_of_;
    uint64_t top_, own_ = 0;
    BlockSum sum_;
};

}  // namespace merge_engine
