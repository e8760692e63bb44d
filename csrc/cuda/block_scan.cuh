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

}  // namespace merge_engine
