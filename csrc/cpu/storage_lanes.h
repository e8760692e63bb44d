// Storage types of 16 and 32 bits, vectors at a time: the formulas of Storage in numeric.h, where they are explained.
//
// A group of 64 elements is worked on in two halves. Those of bfloat16 are its even and its odd elements: a mask or a
// shift widens them, and another puts them together again, where neighbours would have to be shuffled. Otherwise they
// are the first and the last 32. Sets of elements in the order of these halves are called ordered.
//
// Magnitudes are compared as signed numbers, for which more processors have instructions.
#pragma once

#include "bits.h"
#include "lanes.h"

namespace merge_engine {
namespace ME_ISA {

constexpr int GROUP = 64, HALF = GROUP / 2;
static_assert(HALF % LANES == 0, "halves are whole vectors");

template <class Bits>
static ME_INLINE void prefetch_group(const Bits* group) {
    for (size_t byte = 0; byte < GROUP * sizeof(Bits); byte += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(group) + byte);
    }
}

// load<H>(group, at) widens the elements of half H that begin with its at-th. store rounds as many of either half, and
// returns their magnitudes. It knows no NaN: only the exponents that it stores for one are right. magnitudes reads as
// many of both halves as store writes.
template <DType>
struct StorageLanes;

template <>
struct StorageLanes<DType::BF16> {
    using Magnitudes = Shorts;
    static constexpr auto INFINITE = int16_t{0x7F80};
    template <int H>
    static ME_INLINE Floats load(const uint16_t* group, int at) {
        const Words both = ME_ISA::load<Words>(group + 2 * at);
        return (Floats)(H == 0 ? both << 16 : both & 0xFFFF0000u);
    }
    static ME_INLINE Magnitudes store(Floats even, Floats odd, uint16_t* group, int at) {
        const Words both = rounded((Words)even) >> 16 | (rounded((Words)odd) & 0xFFFF0000u);
        ME_ISA::store(group + 2 * at, both);
        return (Magnitudes)(both & 0x7FFF7FFFu);
    }
    static ME_INLINE Magnitudes magnitudes(const uint16_t* group, int at) {
        return ME_ISA::load<Magnitudes>(group + 2 * at) & 0x7FFF;
    }
    static constexpr int place(int ordered) { return ordered < HALF ? 2 * ordered : 2 * (ordered - HALF) + 1; }
    static ME_INLINE uint64_t ordered(uint64_t bits) { return even_bits(bits) | even_bits(bits >> 1) << HALF; }
    static ME_INLINE uint64_t unordered(uint64_t bits) {
        return at_even_bits(bits & 0xFFFFFFFFu) | at_even_bits(bits >> HALF) << 1;
    }

  private:
    static ME_INLINE Words rounded(Words bits) { return bits + 0x7FFFu + (bits >> 16 & 1u); }
};

// The halves are the first and the last elements of a group.
struct NaturalOrder {
    static constexpr int place(int ordered) { return ordered; }
    static ME_INLINE uint64_t ordered(uint64_t bits) { return bits; }
    static ME_INLINE uint64_t unordered(uint64_t bits) { return bits; }
};

// Processors convert float16 as Storage does, denormals included. A NaN stays one, but may keep sign and payload.
#if defined(__AVX512F__)
static ME_INLINE Floats floats_of(Halves v) { return (Floats)_mm512_maskz_cvtph_ps(0xFFFF, (__m256i)v); }
static ME_INLINE Halves halves_of(Floats v) {
    return (Halves)_mm512_maskz_cvtps_ph(0xFFFF, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(__F16C__)
static ME_INLINE Floats floats_of(Halves v) { return (Floats)_mm256_cvtph_ps((__m128i)v); }
static ME_INLINE Halves halves_of(Floats v) { return (Halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
static ME_INLINE Floats floats_of(Halves v) {
    const Words wide = widened(v), sign = (wide & 0x8000u) << 16, magnitude = (wide & 0x7FFFu) << 13;
    const Words scaled = (Words)((Floats)magnitude * 0x1p112f);
    return (Floats)(((Ints)magnitude >= 0x0F800000 ? magnitude | 0x7F800000u : scaled) | sign);
}
static ME_INLINE Halves halves_of(Floats v) {
    const Words bits = (Words)v, sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    const Words normal = (magnitude + 0xC8000FFFu + (magnitude >> 13 & 1u)) >> 13;
    const Words denormal = (Words)((Floats)magnitude + 0.5f) - 0x3F000000u;
    const Words finite = (Ints)magnitude < 0x38800000 ? denormal : normal;
    const Words special = (Ints)magnitude > 0x7F800000 ? Words{} + 0x7E00u : Words{} + 0x7C00u;
    return narrowed(((Ints)magnitude >= 0x477FF000 ? special : finite) | sign);
}
#endif

template <>
struct StorageLanes<DType::F16> : NaturalOrder {
    using Magnitudes = int16_t __attribute__((vector_size(VECTOR_BYTES / 2)));
    static constexpr auto INFINITE = int16_t{0x7C00};
    template <int H>
    static ME_INLINE Floats load(const uint16_t* group, int at) {
        return floats_of(ME_ISA::load<Halves>(group + H * HALF + at));
    }
    static ME_INLINE Magnitudes store(Floats first, Floats last, uint16_t* group, int at) {
        ME_ISA::store(group + at, halves_of(first));
        ME_ISA::store(group + HALF + at, halves_of(last));
        return magnitudes(group, at);
    }
    static ME_INLINE Magnitudes magnitudes(const uint16_t* group, int at) {
        return larger(ME_ISA::load<Magnitudes>(group + at) & 0x7FFF, ME_ISA::load<Magnitudes>(group + HALF + at) & 0x7FFF);
    }
};

template <>
struct StorageLanes<DType::F32> : NaturalOrder {
    using Magnitudes = Ints;
    static constexpr auto INFINITE = int32_t{0x7F800000};
    template <int H>
    static ME_INLINE Floats load(const uint32_t* group, int at) {
        return ME_ISA::load<Floats>(group + H * HALF + at);
    }
    static ME_INLINE Magnitudes store(Floats first, Floats last, uint32_t* group, int at) {
        ME_ISA::store(group + at, first);
        ME_ISA::store(group + HALF + at, last);
        return larger((Ints)first & 0x7FFFFFFF, (Ints)last & 0x7FFFFFFF);
    }
    static ME_INLINE Magnitudes magnitudes(const uint32_t* group, int at) {
        return larger(ME_ISA::load<Ints>(group + at) & 0x7FFFFFFF, ME_ISA::load<Ints>(group + HALF + at) & 0x7FFFFFFF);
    }
};

}  // namespace ME_ISA
}  // namespace merge_engine
