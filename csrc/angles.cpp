// Series of Taylor on short intervals. They are longer than the best polynomials, and need no table that was fitted.
#include "angles.h"

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>

namespace merge_engine {
namespace {

constexpr double HALF_PI = 0x1.921fb54442d18p+0, HALF_PI_REST = 0x1.1a62633145c07p-54;
// The same in three parts. The first two have 33 bits, so that their products with numbers up to 2^20 are exact.
constexpr double PARTS[] = {0x1.921fb54400000p+0, 0x1.0b4611a600000p-34, 0x1.3198a2e037073p-69};
constexpr double INVERSE_HALF_PI = 0x1.45f306dc9c883p-1;

// asin(x) = x + x^3 * (A[0] + A[1] * x^2 + ...). Where |x| <= 1/2, a term is less than a quarter of the one before.
constexpr size_t ARC_TERMS = 26;
constexpr std::array<double, ARC_TERMS> arc_terms() {
    std::array<double, ARC_TERMS> terms{};
    double product = 1;  // 1 * 3 * 5 ... / (2 * 4 * 6 ...)
    for (size_t i = 0; i < ARC_TERMS; ++i) {
        const double odd = 2.0 * static_cast<double>(i) + 1;
        product *= odd / (odd + 1);
        terms[i] = product / (odd + 2);
    }
    return terms;
}

// The terms of sine (first = 3) and of cosine (first = 2) by the square, with their signs: -1/n!, 1/(n + 2)!, ...
constexpr size_t TERMS = 9;
constexpr std::array<double, TERMS> inverse_factorials(int first) {
    std::array<double, TERMS> terms{};
    double factorial = 1, sign = -1;
    int n = 1;
    for (size_t i = 0; i < TERMS; ++i, sign = -sign) {
        for (; n <= first + 2 * static_cast<int>(i); ++n) factorial *= n;
        terms[i] = sign / factorial;
    }
    return terms;
}

template <size_t N>
double series(const std::array<double, N>& terms, double x) {
    double sum = terms[N - 1];
    for (size_t i = N - 1; i-- > 0;) sum = sum * x + terms[i];
    return sum;
}

double arc_sine_of_small(double x) {
    static constexpr auto terms = arc_terms();
    const double square = x * x;
    return x + x * (square * series(terms, square));
}

// Of angles up to pi / 4.
double small_sine(double angle) {
    static constexpr auto terms = inverse_factorials(3);
    const double square = angle * angle;
    return angle + angle * (square * series(terms, square));
}
double small_cosine(double angle) {
    static constexpr auto terms = inverse_factorials(2);
    const double square = angle * angle;
    return 1 + square * series(terms, square);
}

// sin(angle + quarters * pi / 2)
double turned_sine(double angle, int64_t quarters) {
    if (!(std::fabs(angle) < 0x1p50)) return std::numeric_limits<double>::quiet_NaN();
    const double turns = angle * INVERSE_HALF_PI;
    const int64_t whole = static_cast<int64_t>(turns + (turns < 0 ? -0.5 : 0.5));
    const double n = static_cast<double>(whole);
    const double rest = ((angle - n * PARTS[0]) - n * PARTS[1]) - n * PARTS[2];
    switch ((whole + quarters) & 3) {
        case 0: return small_sine(rest);
        case 1: return small_cosine(rest);
        case 2: return -small_sine(rest);
        default: return -small_cosine(rest);
    }
}

}  // namespace

double arc_cosine(double x) {
    if (std::fabs(x) <= 0.5) return HALF_PI - (arc_sine_of_small(x) - HALF_PI_REST);
    const double half = arc_sine_of_small(std::sqrt((1 - std::fabs(x)) * 0.5));
    return x > 0 ? 2 * half : 2 * (HALF_PI - (half - HALF_PI_REST));
}

double sine(double angle) { return turned_sine(angle, 0); }

double cosine(double angle) { return turned_sine(angle, 1); }

}  // namespace merge_engine
