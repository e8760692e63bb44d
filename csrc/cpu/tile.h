// A tile is a short run of elements that stays in the first-level cache while one simple loop after the
// other passes over it. Each loop is plain C++ that compilers vectorise for whatever they compile for.
#pragma once

#include <limits>
#include <type_traits>

#include "../operations.h"
#include "storage_lanes.h"

#define ME_RESTRICT __restrict__

namespace merge_engine {
namespace ME_ISA {  // compiled once per instruction set; the names must not meet

constexpr int TILE = 1024;
constexpr uint64_t BLOCK = 65536;  // elements handed to a thread at a time
static_assert(SUM_BLOCK % TILE == 0 && BLOCK % SUM_BLOCK == 0, "blocks are whole tiles");

// The working type's arithmetic type.
template <DType Working>
struct RealOf {
    using Type = float;
};
template <>
struct RealOf<DType::F64> {
    using Type = double;
};

// Calls f with the working dtype as a compile-time constant.
template <class F>
void with_dtype(DType dtype, F&& f) {
    switch (dtype) {
        case DType::BF16: return f(std::integral_constant<DType, DType::BF16>{});
        case DType::F16: return f(std::integral_constant<DType, DType::F16>{});
        case DType::F32: return f(std::integral_constant<DType, DType::F32>{});
        case DType::F64: return f(std::integral_constant<DType, DType::F64>{});
    }
}

// How many of `count` elements are NaN or infinite.
template <DType D>
static uint64_t non_finite_in(const typename Storage<D>::Bits* ME_RESTRICT bits, int count) {
    using Bits = typename Storage<D>::Bits;
    constexpr Bits without_sign = static_cast<Bits>(~Bits{0}) >> 1;
    const Bits infinity = Storage<D>::store(std::numeric_limits<float>::infinity());
    Bits found = 0;
    static_assert(TILE <= 0xFFFF, "a tile is counted in 16 bits");
    for (int j = 0; j < count; ++j) found = static_cast<Bits>(found + ((bits[j] & without_sign) >= infinity));
    return found;
}

// Widens `count` elements.
template <DType From, class Real>
static void widen(const typename Storage<From>::Bits* ME_RESTRICT bits, int count, Real* ME_RESTRICT out) {
    int j = 0;
    if constexpr (From == DType::F16 && sizeof(Real) == sizeof(float)) {
        for (; j + LANES <= count; j += LANES) store(out + j, floats_of(load<Halves>(bits + j)));
    }
    for (; j < count; ++j) out[j] = Storage<From>::template load<Real>(bits[j]);
}

// Rounds `count` elements.
template <DType To, class Real>
static void round_to(const Real* ME_RESTRICT values, int count, typename Storage<To>::Bits* ME_RESTRICT out) {
    int j = 0;
    if constexpr (To == DType::F16 && sizeof(Real) == sizeof(float)) {
        const Floats nan = every(std::numeric_limits<float>::quiet_NaN());
        for (; j + LANES <= count; j += LANES) {
            const Floats v = load<Floats>(values + j);
            store(out + j, halves_of(where(differ(v, v), nan, v)));
        }
    }
    for (; j < count; ++j) out[j] = Storage<To>::store(values[j]);
}

// Widens `count` elements and returns how many are NaN or infinite.
template <DType From, class Real>
static uint64_t load_as(const void* data, uint64_t first, int count, Real* out) {
    const auto* bits = static_cast<const typename Storage<From>::Bits*>(data) + first;
    widen<From>(bits, count, out);
    return non_finite_in<From>(bits, count);
}

// Rounds and writes `count` elements and returns how many are then NaN or infinite.
template <DType To, class Real>
static uint64_t store_as(void* data, uint64_t first, int count, const Real* values) {
    auto* bits = static_cast<typename Storage<To>::Bits*>(data) + first;
    round_to<To>(values, count, bits);
    return non_finite_in<To>(bits, count);
}

// Elements [first, first + count) of an input that is computed, or rounded to the working dtype. Rarely needed, and much
// code.
template <DType Working>
static __attribute__((noinline)) const typename Storage<Working>::Bits* make_tile(
    const Array& array, uint64_t first, int count, typename Storage<Working>::Bits* ME_RESTRICT room) {
    if (array.computed) {
        return static_cast<const typename Storage<Working>::Bits*>(array.computed->read(first, count, room));
    }
    with_dtype(array.dtype, [&](auto from) {
        // What is exact in float is rounded from it.
        using Wide = std::conditional_t<from() == DType::F64 || Working == DType::F64, double, float>;
        Wide wide[TILE];
        widen<from()>(static_cast<const typename Storage<from()>::Bits*>(array.data) + first, count, wide);
        round_to<Working>(wide, count, room);
    });
    return room;
}

// Elements [first, first + count) of an input in the working dtype: where they are, or written to `room`. What is computed
// has this dtype.
template <DType Working>
static const typename Storage<Working>::Bits* tile_of(const Array& array, uint64_t first, int count,
                                                      typename Storage<Working>::Bits* room) {
    if (array.dtype == Working && array.data) {
        return static_cast<const typename Storage<Working>::Bits*>(array.data) + first;
    }
    return make_tile<Working>(array, first, count, room);
}

// Widens them, and returns how many are NaN or infinite.
template <DType Working, class Real>
static uint64_t load_tile(const Array& array, uint64_t first, int count, Real* ME_RESTRICT out) {
    typename Storage<Working>::Bits rounded[TILE];
    return load_as<Working>(tile_of<Working>(array, first, count, rounded), 0, count, out);
}

template <class Real>
static uint64_t store_tile(const Array& array, uint64_t first, int count, const Real* ME_RESTRICT values) {
    uint64_t non_finite = 0;
    with_dtype(array.dtype, [&](auto to) { non_finite = store_as<to()>(array.data, first, count, values); });
    return non_finite;
}

}  // namespace ME_ISA
}  // namespace merge_engine
