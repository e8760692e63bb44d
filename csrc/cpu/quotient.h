// Quotients in double, without a division where processors multiply and add at once.
#pragma once

#include <cstdint>

#include "../numeric.h"

namespace merge_engine {
namespace ME_ISA {

// x / number. `inverse` is 1 / number, or very near. One step takes away the error of x * inverse, and no quotient of small
// whole numbers, or of a float and a small one, lies so near the middle of two numbers that more is needed.
static ME_INLINE double quotient(double x, double number, double inverse) {
#if defined(__FMA__)
    const double near = x * inverse;
    return __builtin_fma(__builtin_fma(-near, number, x), inverse, near);
#else
    (void)inverse;
    return x / number;
#endif
}

// 1 / number, for a whole number above 0.
static ME_INLINE double reciprocal(uint32_t number) {
    const double whole = number;
#if defined(__FMA__)
    const double guess = 1.0f / static_cast<float>(number);  // 22 bits, and then twice as many
    return quotient(1.0, whole, __builtin_fma(__builtin_fma(-guess, whole, 1.0), guess, guess));
#else
    return 1.0 / whole;
#endif
}

}  // namespace ME_ISA
}  // namespace merge_engine
