// DELLA's keep probabilities from ranks. Step 9 of docs/arithmetic.md.
#pragma once

#include "numeric.h"

namespace merge_engine {

// floor(2^32 * p) of an element with twice the mean rank `twice_rank` (counted from 0) in a line.
ME_INLINE uint32_t keep_threshold(uint64_t twice_rank, uint64_t length, double density, double epsilon) {
    const double scaled =
        length > 1 ? static_cast<double>(twice_rank) / static_cast<double>(2 * (length - 1)) : 0.5;
    const double probability = (density - epsilon) + 2 * epsilon * scaled;
    const double scaled_up = probability * 4294967296.0;  // rounding may lift a probability to exactly 1
    return static_cast<uint32_t>(scaled_up < 4294967295.0 ? scaled_up : 4294967295.0);
}

}  // namespace merge_engine
