// The arithmetic that every device agrees on: storage types, rounding and magnitude keys.
//
// Written once, compiled by the host compiler and by nvcc. Conversions use integer operations only, so
// that no device's own rounding, denormal handling or NaN rule can differ. Floating-point contraction
// must be off wherever this is compiled (-ffp-contract=off, -fmad=false).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define ME_INLINE __host__ __device__ __forceinline__
#else
#define ME_INLINE inline __attribute__((always_inline))
#endif

namespace merge_engine {

enum class DType : int { BF16, F16, F32, F64 };

template <class To, class From>
ME_INLINE To bits_of(From value) {
    static_assert(sizeof(To) == sizeof(From), "a bit pattern keeps its size");
    To result;
    std::memcpy(&result, &value, sizeof(To));
    return result;
}

// float from double with the rounding error kept in the last bit ("round to odd"), so that a second
// rounding to 16 bits gives what one rounding from double would have given.
ME_INLINE float sticky_float(double value) {
    const float nearest = static_cast<float>(value);
    if (static_cast<double>(nearest) == value || value != value) return nearest;
    uint32_t bits = bits_of<uint32_t>(nearest);
    const double near_magnitude = nearest < 0 ? -static_cast<double>(nearest) : nearest;
    const double magnitude = value < 0 ? -value : value;
    if (near_magnitude > magnitude) bits -= 1;
    return bits_of<float>(bits | 1u);
}

// A storage type: `load` widens exactly to Real, `store` rounds to nearest even. Real is what the
// arithmetic runs in: float for everything up to 32 bits, double for 64.
template <DType>
struct Storage;

template <>
struct Storage<DType::BF16> {
    using Bits = uint16_t;
    template <class Real>
    static ME_INLINE Real load(Bits bits) {
        return static_cast<Real>(bits_of<float>(static_cast<uint32_t>(bits) << 16));
    }
    static ME_INLINE Bits store(float value) {
        const uint32_t bits = bits_of<uint32_t>(value);
        const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
        return static_cast<Bits>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
    }
    static ME_INLINE Bits store(double value) { return store(sticky_float(value)); }
};

template <>
struct Storage<DType::F16> {
    using Bits = uint16_t;
    template <class Real>
    static ME_INLINE Real load(Bits bits) {
        const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
        const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7FFFu) << 13;
        // The exponent moves from bias 15 to 127; the multiplication also normalises denormals, exactly.
        const uint32_t scaled = bits_of<uint32_t>(bits_of<float>(magnitude) * 0x1p112f);
        const uint32_t special = magnitude | 0x7F800000u;
        return static_cast<Real>(bits_of<float>((magnitude >= 0x0F800000u ? special : scaled) | sign));
    }
    static ME_INLINE Bits store(float value) {
        const uint32_t bits = bits_of<uint32_t>(value);
        const uint32_t sign = (bits >> 16) & 0x8000u;
        const uint32_t magnitude = bits & 0x7FFFFFFFu;
        const uint32_t normal = (magnitude + 0xC8000FFFu + ((magnitude >> 13) & 1u)) >> 13;
        // Below 2^-14 the addition of 0.5 shifts the denormal mantissa into place and rounds it.
        const uint32_t denormal = bits_of<uint32_t>(bits_of<float>(magnitude) + 0.5f) - 0x3F000000u;
        const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
        const uint32_t finite = magnitude < 0x38800000u ? denormal : normal;
        return static_cast<Bits>((magnitude >= 0x477FF000u ? special : finite) |
                                 (magnitude > 0x7F800000u ? 0u : sign));
    }
    static ME_INLINE Bits store(double value) { return store(sticky_float(value)); }
};

template <>
struct Storage<DType::F32> {
    using Bits = uint32_t;
    template <class Real>
    static ME_INLINE Real load(Bits bits) {
        return static_cast<Real>(bits_of<float>(bits));
    }
    static ME_INLINE Bits store(float value) {
        const uint32_t bits = bits_of<uint32_t>(value);
        return (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC00000u : bits;
    }
    static ME_INLINE Bits store(double value) { return store(static_cast<float>(value)); }
};

template <>
struct Storage<DType::F64> {
    using Bits = uint64_t;
    template <class Real>
    static ME_INLINE Real load(Bits bits) {
        return static_cast<Real>(bits_of<double>(bits));
    }
    template <class Real>
    static ME_INLINE Bits store(Real value) {
        return value != value ? 0x7FF8000000000000ull : bits_of<uint64_t>(static_cast<double>(value));
    }
};

// Rounding of intermediate results. The default arithmetic keeps full float (or double) precision;
// mergekit's rounds after every operation to the working dtype.
struct Unrounded {
    template <class Real>
    static ME_INLINE Real round(Real value) {
        return value;
    }
};

template <DType D>
struct RoundedTo {
    template <class Real>
    static ME_INLINE Real round(Real value) {
        return Storage<D>::template load<Real>(Storage<D>::store(value));
    }
};

// The bits of RN(|delta|) in the working dtype, without the sign: integers that order as magnitudes do.
template <DType Working, class Real>
ME_INLINE auto magnitude_key(Real delta) -> typename Storage<Working>::Bits {
    using Bits = typename Storage<Working>::Bits;
    constexpr Bits without_sign = static_cast<Bits>(~Bits{0}) >> 1;
    return static_cast<Bits>(Storage<Working>::store(delta) & without_sign);
}

// The key of RN(Real(1 - slack) * magnitude(key)).
template <DType Working, class Real>
ME_INLINE uint64_t relaxed_key(uint64_t key, double slack) {
    using Bits = typename Storage<Working>::Bits;
    const Real magnitude = Storage<Working>::template load<Real>(static_cast<Bits>(key));
    return magnitude_key<Working>(static_cast<Real>(1.0 - slack) * magnitude);
}

template <class Real>
ME_INLINE bool is_finite(Real value) {
    return value - value == 0;
}

}  // namespace merge_engine
