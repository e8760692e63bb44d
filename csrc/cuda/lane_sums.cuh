// The fixed order of sums. See docs/arithmetic.md, step 11.
#pragma once

#include "runtime.h"

namespace merge_engine {

// Adds the lanes of a SUM_BLOCK pairwise, with `threads` of them; `memory` is shared, one double a lane. All threads of a
// block enter, each with those of its own SUM_BLOCK.
__device__ inline double sum_lanes(double* memory, unsigned thread, unsigned threads) {
    for (unsigned half = SUM_LANES / 2; half > 0; half /= 2) {
        __syncthreads();
        for (unsigned i = thread; i < half; i += threads) memory[i] += memory[i + half];
    }
    __syncthreads();
    const double sum = memory[0];
    __syncthreads();
    return sum;
}

}  // namespace merge_engine
