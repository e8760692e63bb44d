// Any merge, whatever its dtypes, slacks, rounding and values.
#pragma once

#include "primitives.h"

namespace merge_engine {
namespace ME_ISA {

// Merges elements [first, last) of the chunk; index 0 of the chunk is element `start` of the tensor.
void consensus_general(const Consensus& op, uint64_t start, uint64_t first, uint64_t last, Counts* counts,
               uint64_t* non_finite);

}  // namespace ME_ISA
}  // namespace merge_engine
