// DELLA's keep probabilities from ranks. Step 9 of docs/arithmetic.md.
#pragma once

#include "numeric.h"

namespace merge_engine {

// How a mean rank becomes a threshold, floor(2^32 * p). `twice_rank` is twice the mean rank counted from 0:
// 2 * smaller + equal - 1.
struct Probability {
    double density, epsilon;
    uint64_t length;

    ME_INLINE uint32_t threshold(uint64_t twice_rank) const {
        const double scaled =
            length > 1 ? static_cast<double>(twice_rank) / static_cast<double>(2 * (length - 1)) : 0.5;
        return threshold_of(scaled);
    }
    // Of a mean rank that is scaled to 0..1.
    ME_INLINE uint32_t threshold_of(double scaled) const {
        const double probability = (density - epsilon) + 2 * epsilon * scaled;
        const double scaled_up = probability * 4294967296.0;  // rounding may lift a probability to exactly 1
        return static_cast<uint32_t>(scaled_up < 4294967295.0 ? scaled_up : 4294967295.0);
    }
};

}  // namespace merge_engine
