// The kernels of consensus_fast.cu, for those that launch them.
#pragma once

#include "consensus.cuh"

namespace merge_engine {

// Whether the models of a chunk can be merged in the fast way, if all arrays have one dtype of 16 bits and are aligned.
bool merges_fast(const ConsensusCall& call);

// Adds the kernels for the elements [0, last) of a chunk; `last` is the end of a pack of eight.
template <DType Working>
void add_fast_range(MergeLaunches& launches, Job job, uint64_t last, int device);

}  // namespace merge_engine
