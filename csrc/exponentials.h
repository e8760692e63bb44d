// Exponentials and logarithms of operations that IEEE defines: the same bits from every compiler and device.
//
// Compiled inside loops, these have no branches, so that compilers vectorise them. Step 24 of docs/arithmetic.md.
#pragma once

#include "numeric.h"

namespace merge_engine {

constexpr double SOFTENED = 1e-8;           // added to every probability
constexpr double LOWEST_EXPONENT = -700;    // exp of what is below counts as 0
constexpr double LOG2_E = 1.4426950408889634;
constexpr double LN2_HIGH = 0.6931471803691238;  // 32 bits, so that the product with a small whole number is exact
constexpr double LN2_LOW = 1.9082149292705877e-10;
constexpr double TO_NEAREST = 6755399441055744.0;  // 1.5 * 2^52: a sum with it has the nearest whole number in its last bits

namespace series {

constexpr double factorial(int k) { return k < 2 ? 1 : k * factorial(k - 1); }

// The terms of exp from the K-th, and those of log, by Horner's rule.
template <int K, int Last>
struct Exp {
    static constexpr double TERM = 1 / factorial(K);
    static ME_INLINE double sum(double x) { return Exp<K + 1, Last>::sum(x) * x + TERM; }
};
template <int Last>
struct Exp<Last, Last> {
    static constexpr double TERM = 1 / factorial(Last);
    static ME_INLINE double sum(double) { return TERM; }
};
template <int K, int Last>
struct Log {
    static ME_INLINE double sum(double x) { return Log<K + 1, Last>::sum(x) * x + 1.0 / (2 * K + 1); }
};
template <int Last>
struct Log<Last, Last> {
    static ME_INLINE double sum(double) { return 1.0 / (2 * Last + 1); }
};

}  // namespace series

// exp of what is at most 0, within 2 ulp.
ME_INLINE double exponential(double x) {
    const double shifted = x * LOG2_E + TO_NEAREST, whole = shifted - TO_NEAREST;
    const double rest = (x - whole * LN2_HIGH) - whole * LN2_LOW;
    const double power = series::Exp<0, 13>::sum(rest);
    const double scaled = bits_of<double>(bits_of<uint64_t>(power) + (bits_of<uint64_t>(shifted) << 52));
    const double found = x < LOWEST_EXPONENT ? 0.0 : scaled;
    return x != x ? x : found;
}

// The same for at least NEAR_ZERO, or NaN: the whole number is 0 there.
constexpr double NEAR_ZERO = -0.34;
ME_INLINE double exponential_near_zero(double x) { return series::Exp<0, 13>::sum(x); }

// log of a positive normal number, within 3 ulp.
ME_INLINE double logarithm(double x) {
    constexpr uint64_t SQRT_HALF = 0x3FE6A09E667F3BCDull, BIAS = 1024, WHOLE = 0x4330000000000000ull;
    const uint64_t bits = bits_of<uint64_t>(x);
    // x = 2^exponent * m, with m from sqrt(1/2) to sqrt(2). Whole numbers are converted by putting them behind 2^52.
    const uint64_t biased = (bits - SQRT_HALF + (BIAS << 52)) >> 52;
    const double whole = bits_of<double>(biased | WHOLE) - (4503599627370496.0 + BIAS);
    const double above_one = bits_of<double>(bits - ((biased - BIAS) << 52)) - 1;
    const double ratio = above_one / (above_one + 2), square = ratio * ratio;
    const double found = whole * LN2_HIGH + (whole * LN2_LOW + 2 * ratio * series::Log<0, 10>::sum(square));
    return x != x ? x : found;
}

}  // namespace merge_engine
