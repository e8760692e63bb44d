// Two neighbouring elements of 16 bits in one word, for what a GPU does with both at once.
//
// Magnitude keys have 15 bits. With bit 15 set beside them, the bounds of both halves are subtracted at once: no borrow
// leaves a half, and bit 15 stays set where the key reaches the bound. Truths about elements are told by these bits;
// the others then mean nothing.
//
// The instructions below round as numeric.h does. NaN they give other patterns: callers keep it out.
#pragma once

#include "elements.cuh"

namespace merge_engine {

constexpr uint32_t HALVES = 0x00010001u;  // times a number: it in both halves
constexpr uint32_t TRUTHS = 0x8000u * HALVES;
constexpr uint32_t BEYOND_KEYS = 0x8000u;  // a bound that no key reaches

// Bytes of x (0 to 3) and y (4 to 7), the lowest first; with bit 3 set, the sign of the byte instead.
template <uint32_t SELECTION>
__device__ uint32_t selected_bytes(uint32_t x, uint32_t y) {
    uint32_t result = 0;
#ifdef __CUDA_ARCH__
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(x), "r"(y), "n"(SELECTION));
#else
    for (int i = 0; i < 4; ++i) {
        const uint32_t from = SELECTION >> (4 * i);
        const uint32_t byte = (from & 4 ? y : x) >> (8 * (from & 3)) & 0xFF;
        result |= (from & 8 ? (byte >> 7) * 0xFFu : byte) << (8 * i);
    }
#endif
    return result;
}

// All ones in the halves of which something is true.
__device__ inline uint32_t whole_halves(uint32_t truths) { return selected_bytes<0xBB99>(truths, 0); }
// The truths about a pair of neighbours, from a bit for each of a pack.
__device__ inline uint32_t truths_of(uint32_t bits, int pair) {
    return (bits << (15 - 2 * pair) & 0x8000u) | (bits << (30 - 2 * pair) & 0x80000000u);
}
__device__ inline uint32_t bits_of_truths(uint32_t truths, int pair) {
    return (truths >> 15 & 1u) << (2 * pair) | truths >> 31 << (2 * pair + 1);
}
// How many truths were counted by subtracting whole halves, at most 2^16 - 1 a half. The lower half counts its own, the
// upper one those of both halves less the lower's.
__device__ inline uint32_t counted_halves(uint32_t sum) {
    const uint32_t low = sum & 0xFFFFu;
    return low + ((sum >> 16) + low & 0xFFFFu);
}

template <DType Working>
struct Halves;

template <>
struct Halves<DType::BF16> {
    static constexpr uint32_t EXPONENT = 0x7F80u, LOWEST_OF_EXPONENT = 0x0080u;

    // RN(x - y).
    static __device__ uint32_t difference(uint32_t x, uint32_t y) {
#ifdef __CUDA_ARCH__
        uint32_t result;
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(y), "r"(0xBF80u * HALVES), "r"(x));
        return result;
#else
        return stored(low(x) - low(y), high(x) - high(y));
#endif
    }
    static __device__ float low(uint32_t word) { return bits_of<float>(word << 16); }
    static __device__ float high(uint32_t word) { return bits_of<float>(word & 0xFFFF0000u); }
    static __device__ uint32_t stored(float low, float high) {
#ifdef __CUDA_ARCH__
        uint32_t result;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
        return result;
#else
        return Storage<DType::BF16>::store(low) | uint32_t{Storage<DType::BF16>::store(high)} << 16;
#endif
    }
};

template <>
struct Halves<DType::F16> {
    static constexpr uint32_t EXPONENT = 0x7C00u, LOWEST_OF_EXPONENT = 0x0400u;

    static __device__ uint32_t difference(uint32_t x, uint32_t y) {
#ifdef __CUDA_ARCH__
        uint32_t result;
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(y), "r"(0xBC00u * HALVES), "r"(x));
        return result;
#else
        return stored(low(x) - low(y), high(x) - high(y));
#endif
    }
    static __device__ float low(uint32_t word) { return loaded(static_cast<uint16_t>(word)); }
    static __device__ float high(uint32_t word) { return loaded(static_cast<uint16_t>(word >> 16)); }
    static __device__ uint32_t stored(float low, float high) {
#ifdef __CUDA_ARCH__
        uint32_t result;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
        return result;
#else
        return Storage<DType::F16>::store(low) | uint32_t{Storage<DType::F16>::store(high)} << 16;
#endif
    }

  private:
    static __device__ float loaded(uint16_t bits) {
#ifdef __CUDA_ARCH__
        float result;
        asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(bits));
        return result;
#else
        return Storage<DType::F16>::load<float>(bits);
#endif
    }
};

// Eight neighbours, as they are stored. They are found by their number: a chunk has fewer than 2^32.
constexpr int PAIRS = 4;
struct Octet {
    uint32_t word[PAIRS];

    static __device__ Octet load(const void* data, uint32_t number) {
        // The address may come from shared memory; __ldg says that it leads to global memory nevertheless.
        const uint4 words = __ldg(static_cast<const uint4*>(data) + number);
        return {{words.x, words.y, words.z, words.w}};
    }
    // Nothing reads the output again: it need not push inputs out of the cache.
    __device__ void store(void* data, uint32_t number) const {
        __stcs(static_cast<uint4*>(data) + number, uint4{word[0], word[1], word[2], word[3]});
    }
};

// Whether all elements of some octets are finite. Exponents are first looked at together: those of weights below 2
// have their highest bit clear.
template <DType Working, int N>
__device__ bool all_finite(const Octet (&octets)[N]) {
    using H = Halves<Working>;
    uint32_t any = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        any |= octets[i].word[0] | octets[i].word[1];
        any |= octets[i].word[2] | octets[i].word[3];
    }
    const auto at_end = [](uint32_t word) {
        return (word & H::EXPONENT * HALVES) + H::LOWEST_OF_EXPONENT * HALVES & TRUTHS;
    };
    if (at_end(any) == 0) return true;
    uint32_t found = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll
        for (int p = 0; p < PAIRS; ++p) found |= at_end(octets[i].word[p]);
    }
    return found == 0;
}

}  // namespace merge_engine
