// Vectors as wide as the registers, for loops that compilers do not vectorise by themselves.
#pragma once

#include <cstdint>
#include <cstring>

#include "../numeric.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace merge_engine {
namespace ME_ISA {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

using Floats = float __attribute__((vector_size(VECTOR_BYTES)));
using Ints = int32_t __attribute__((vector_size(VECTOR_BYTES)));
using Words = uint32_t __attribute__((vector_size(VECTOR_BYTES)));
using Shorts = int16_t __attribute__((vector_size(VECTOR_BYTES)));
using Doubles = double __attribute__((vector_size(VECTOR_BYTES)));
using Halves = uint16_t __attribute__((vector_size(VECTOR_BYTES / 2)));
using Slots = uint64_t __attribute__((vector_size(VECTOR_BYTES)));
using Bytes = uint8_t __attribute__((vector_size(VECTOR_BYTES)));
constexpr int LANES = VECTOR_BYTES / 4;

template <class Vector>
static ME_INLINE Vector load(const void* from) {
    Vector result;
    std::memcpy(&result, from, sizeof(result));
    return result;
}
template <class Vector>
static ME_INLINE void store(void* to, Vector value) {
    std::memcpy(to, &value, sizeof(value));
}
static inline uint64_t total(Ints counts) {
    uint64_t sum = 0;
    for (int lane = 0; lane < LANES; ++lane) sum += static_cast<uint64_t>(counts[lane]);
    return sum;
}

// The same number in all lanes. (0 + x would lose the sign of a zero.)
static ME_INLINE Floats every(float x) { return x - Floats{}; }

// The number of each lane.
static ME_INLINE Words lane_numbers() {
    Words numbers;
    for (int lane = 0; lane < LANES; ++lane) numbers[lane] = static_cast<uint32_t>(lane);
    return numbers;
}

// The sum of the lanes up to each.
static ME_INLINE Words running_sums(Words v) {
#if defined(__AVX512F__)
    const __m512i none = {};
    v += (Words)_mm512_alignr_epi32((__m512i)v, none, 15);
    v += (Words)_mm512_alignr_epi32((__m512i)v, none, 14);
    v += (Words)_mm512_alignr_epi32((__m512i)v, none, 12);
    v += (Words)_mm512_alignr_epi32((__m512i)v, none, 8);
#elif defined(__AVX2__)
    v += (Words)_mm256_slli_si256((__m256i)v, 4);
    v += (Words)_mm256_slli_si256((__m256i)v, 8);
    const __m256i first = _mm256_permute2x128_si256((__m256i)v, (__m256i)v, 0x08);  // half, as the last
    v += (Words)_mm256_shuffle_epi32(first, 0xFF);
#else
    for (int lane = 1; lane < LANES; ++lane) v[lane] += v[lane - 1];
#endif
    return v;
}

// As many 16-bit numbers as a vector has lanes. Compilers go through half vectors when left to themselves.
static ME_INLINE Words widened(Halves v) {
#if defined(__AVX512F__)
    return (Words)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
    return (Words)_mm256_cvtepu16_epi32((__m128i)v);
#elif defined(__SSE2__)
    return (Words)_mm_unpacklo_epi16(_mm_cvtsi64_si128((long long)v), _mm_setzero_si128());
#else
    return __builtin_convertvector(v, Words);
#endif
}
static ME_INLINE Halves narrowed(Words v) {
#if defined(__AVX512F__)
    return (Halves)_mm512_cvtepi32_epi16((__m512i)v);
#elif defined(__SSE2__) && !defined(__AVX2__)
    const __m128i extended = _mm_srai_epi32(_mm_slli_epi32((__m128i)v, 16), 16);
    return (Halves)_mm_cvtsi128_si64(_mm_packs_epi32(extended, extended));
#else
    return __builtin_convertvector(v, Halves);
#endif
}

// The first and the last half of the lanes in double precision.
static ME_INLINE Doubles low_doubles(Floats v) {
#if defined(__AVX512F__)
    return (Doubles)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v));
#elif defined(__AVX2__)
    return (Doubles)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v));
#elif defined(__SSE2__)
    return (Doubles)_mm_cvtps_pd((__m128)v);
#else
    return Doubles{v[0], v[1]};
#endif
}
static ME_INLINE Doubles high_doubles(Floats v) {
#if defined(__AVX512F__)
    return (Doubles)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1));
#elif defined(__AVX2__)
    return (Doubles)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1));
#elif defined(__SSE2__)
    return (Doubles)_mm_cvtps_pd(_mm_movehl_ps((__m128)v, (__m128)v));
#else
    return Doubles{v[2], v[3]};
#endif
}

// sum + a * b, where the product is exact, so that it does not matter whether it is rounded.
static ME_INLINE Doubles add_exact_product(Doubles sum, Doubles a, Doubles b) {
#if defined(__AVX512F__)
    return (Doubles)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)sum);
#elif defined(__FMA__)
    return (Doubles)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)sum);
#else
    return sum + a * b;
#endif
}

// In which lanes something holds. The operators & | ^ ~ work on it.
#if defined(__AVX512F__)
using Truth = __mmask16;
static ME_INLINE Truth differ(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ); }
static ME_INLINE Truth less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
static ME_INLINE Truth at_least(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
static ME_INLINE Truth not_at_most(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
static ME_INLINE Truth of_one_sign(Truth among, Floats a, Floats b) {
    return _mm512_mask_cmpge_epi32_mask(among, (__m512i)((Ints)a ^ (Ints)b), __m512i{});
}
static ME_INLINE Truth less(Words a, Words b) { return _mm512_cmplt_epu32_mask((__m512i)a, (__m512i)b); }
static ME_INLINE Truth less(Ints a, Ints b) { return _mm512_cmplt_epi32_mask((__m512i)a, (__m512i)b); }
static ME_INLINE Truth less_among(Truth among, Words a, Words b) {
    return _mm512_mask_cmplt_epu32_mask(among, (__m512i)a, (__m512i)b);
}
static ME_INLINE Truth at_least(Words a, Words b) { return _mm512_cmpge_epu32_mask((__m512i)a, (__m512i)b); }
static ME_INLINE Floats where(Truth truth, Floats a, Floats b) { return _mm512_mask_blend_ps(truth, b, a); }
static ME_INLINE Ints count(Ints counts, Truth truth) {
    return (Ints)_mm512_mask_add_epi32((__m512i)counts, truth, (__m512i)counts, _mm512_set1_epi32(1));
}
static ME_INLINE uint64_t bits_of_lanes(Truth truth) { return truth; }
static ME_INLINE Truth lanes_of_bits(uint32_t bits) { return static_cast<Truth>(bits); }
#else
using Truth = Ints;  // -1 where it holds, else 0
static ME_INLINE Truth differ(Floats a, Floats b) { return a != b; }
static ME_INLINE Truth less(Floats a, Floats b) { return a < b; }
static ME_INLINE Truth at_least(Floats a, Floats b) { return a >= b; }
static ME_INLINE Truth not_at_most(Floats a, Floats b) { return ~(a <= b); }
static ME_INLINE Truth of_one_sign(Truth among, Floats a, Floats b) { return among & (((Ints)a ^ (Ints)b) >= 0); }
static ME_INLINE Truth less(Words a, Words b) { return a < b; }
static ME_INLINE Truth less(Ints a, Ints b) { return a < b; }
static ME_INLINE Truth less_among(Truth among, Words a, Words b) { return among & (a < b); }
static ME_INLINE Truth at_least(Words a, Words b) { return a >= b; }
static ME_INLINE Floats where(Truth truth, Floats a, Floats b) { return truth ? a : b; }
static ME_INLINE Ints count(Ints counts, Truth truth) { return counts - truth; }
static ME_INLINE uint64_t bits_of_lanes(Truth truth) {
#if defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_ps((__m256)truth));
#elif defined(__SSE2__)
    return static_cast<uint32_t>(_mm_movemask_ps((__m128)truth));
#else
    uint64_t bits = 0;
    for (int lane = 0; lane < LANES; ++lane) bits |= static_cast<uint64_t>(truth[lane] & 1) << lane;
    return bits;
#endif
}
static ME_INLINE Truth lanes_of_bits(uint32_t bits) {
    const Words own = (Words{} + 1) << lane_numbers();
    return ((Words{} + bits) & own) == own;
}
using ByteTruth = int8_t __attribute__((vector_size(VECTOR_BYTES)));  // -1 where it holds, else 0
static ME_INLINE uint64_t bits_of_bytes(ByteTruth truth) {
#if defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_epi8((__m256i)truth));
#elif defined(__SSE2__)
    return static_cast<uint32_t>(_mm_movemask_epi8((__m128i)truth));
#else
    uint64_t bits = 0;
    for (int byte = 0; byte < VECTOR_BYTES; ++byte) bits |= static_cast<uint64_t>(truth[byte] & 1) << byte;
    return bits;
#endif
}
#endif

// A bit for each byte, set where a is less than b, or equal.
static ME_INLINE uint64_t bits_less(Bytes a, Bytes b) {
#if defined(__AVX512BW__)
    return _mm512_cmplt_epu8_mask((__m512i)a, (__m512i)b);
#else
    return bits_of_bytes(a < b);
#endif
}
static ME_INLINE uint64_t bits_equal(Bytes a, Bytes b) {
#if defined(__AVX512BW__)
    return _mm512_cmpeq_epi8_mask((__m512i)a, (__m512i)b);
#else
    return bits_of_bytes(a == b);
#endif
}

// The places of a byte's bits, lowest first, and how many there are.
using Places = uint8_t __attribute__((vector_size(8)));
struct PlacesOfByte {
    alignas(8) uint8_t places[256][8] = {};
    uint8_t size[256] = {};

    constexpr PlacesOfByte() {
        for (uint32_t bits = 0; bits < 256; ++bits) {
            for (uint8_t bit = 0; bit < 8; ++bit) {
                if (bits >> bit & 1) places[bits][size[bits]++] = bit;
            }
        }
    }
};

// Stores the numbers of those lanes side by side, and returns how many there are. Always writes a full vector.
static ME_INLINE int compress(Truth those, Ints numbers, int32_t* to) {
#if defined(__AVX512F__)
    store(to, (Ints)_mm512_maskz_compress_epi32(those, (__m512i)numbers));
    return __builtin_popcount(those);
#elif defined(__AVX2__)
    static constexpr PlacesOfByte of_byte;
    const uint64_t byte = bits_of_lanes(those);
    const __m256i places = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(of_byte.places[byte])));
    store(to, (Ints)_mm256_permutevar8x32_epi32((__m256i)numbers, places));
    return of_byte.size[byte];
#else
    int32_t lanes[LANES];
    store(lanes, numbers);
    int stored = 0;
    for (uint64_t bits = bits_of_lanes(those); bits; bits &= bits - 1) to[stored++] = lanes[__builtin_ctzll(bits)];
    return stored;
#endif
}

// Adds those in double precision.
static ME_INLINE void add_among(Truth among, Floats values, Doubles& low, Doubles& high) {
#if defined(__AVX512F__)
    const __mmask8 first = static_cast<__mmask8>(among), last = static_cast<__mmask8>(among >> 8);
    low = (Doubles)_mm512_mask_add_pd((__m512d)low, first, (__m512d)low, (__m512d)low_doubles(values));
    high = (Doubles)_mm512_mask_add_pd((__m512d)high, last, (__m512d)high, (__m512d)high_doubles(values));
#else
    const Floats those = where(among, values, Floats{});
    low += low_doubles(those);
    high += high_doubles(those);
#endif
}

// Signed numbers of any size.
template <class Vector>
static ME_INLINE Vector larger(Vector a, Vector b) {
    return a > b ? a : b;
}
template <class Number, class Vector>
static ME_INLINE bool any_at_least(Vector v, Number least) {
    Number lanes[sizeof(Vector) / sizeof(Number)], largest = 0;
    store(lanes, v);
    for (const Number lane : lanes) largest = lane > largest ? lane : largest;
    return largest >= least;
}

}  // namespace ME_ISA
}  // namespace merge_engine
