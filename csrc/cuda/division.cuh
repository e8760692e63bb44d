// Exact quotients by a divisor that many dividends share, without the many instructions of a division.
#pragma once

#include "../numeric.h"
#include "runtime.h"

namespace merge_engine {

struct Divisor {
    float value, reciprocal;

    static __device__ Divisor of(float value) { return {value, 1.0f / value}; }
};

__device__ inline float magnitude_of(float value) { return value < 0 ? -value : value; }

// Whether quotients by it are exact, see `quotient`.
__device__ inline bool divides_well(float divisor) {
    return magnitude_of(divisor) >= 0x1p-60f && magnitude_of(divisor) <= 0x1p20f;
}

// RN(dividend / divisor). With a correctly rounded reciprocal and an estimate that is off by less than one unit in the
// last place, one correction rounds correctly (Markstein 1990); the first correction makes such an estimate. Dividends
// below SMALLEST_DIVIDEND would have denormal corrections; a quotient that overflows on the way is not finite; that of
// -0 is 0.
constexpr float SMALLEST_DIVIDEND = 0x1p-100f;
__device__ inline float quotient(float dividend, const Divisor& divisor) {
    const float estimate = dividend * divisor.reciprocal;
    const float better = __fmaf_rn(__fmaf_rn(-estimate, divisor.value, dividend), divisor.reciprocal, estimate);
    return __fmaf_rn(__fmaf_rn(-better, divisor.value, dividend), divisor.reciprocal, better);
}

// Orders dividends by their magnitudes, but zero, whose quotients are exact, comes last.
__device__ inline uint32_t order_of_dividend(float dividend) { return 2 * bits_of<uint32_t>(dividend) - 1; }

}  // namespace merge_engine
