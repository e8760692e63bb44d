// Philox for sixteen counters at a time.
//
// Compilers turn the 32 x 32 -> 64 bit products of the plain formula into full 64-bit multiplications, which
// cost more than twice the time; the instruction for just this product has to be named.
#pragma once

#include "../philox.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace merge_engine {
namespace ME_ISA {

constexpr int PHILOX_LANES = 16;

#if defined(__AVX512F__) || defined(__AVX2__)

// `highs` and `lows` put the halves of products back in order; `even` holds those of the even lanes.
#if defined(__AVX512F__)
using Lanes = __m512i;
static inline Lanes load_lanes(const uint32_t* p) { return _mm512_loadu_si512(p); }
static inline void store_lanes(uint32_t* p, Lanes v) { _mm512_storeu_si512(p, v); }
static inline Lanes same(uint32_t v) { return _mm512_set1_epi32(static_cast<int>(v)); }
static inline Lanes sum(Lanes a, Lanes b) { return _mm512_add_epi32(a, b); }
static inline Lanes exclusive_or(Lanes a, Lanes b, Lanes c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
static inline Lanes product(Lanes a, Lanes b) { return _mm512_mul_epu32(a, b); }  // of the even lanes
static inline Lanes odd_to_even(Lanes v) { return _mm512_srli_epi64(v, 32); }
static inline Lanes highs(Lanes even, Lanes odd) { return _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB); }
static inline Lanes lows(Lanes even, Lanes odd) { return _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA); }
#else
using Lanes = __m256i;
static inline Lanes load_lanes(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const Lanes*>(p)); }
static inline void store_lanes(uint32_t* p, Lanes v) { _mm256_storeu_si256(reinterpret_cast<Lanes*>(p), v); }
static inline Lanes same(uint32_t v) { return _mm256_set1_epi32(static_cast<int>(v)); }
static inline Lanes sum(Lanes a, Lanes b) { return _mm256_add_epi32(a, b); }
static inline Lanes exclusive_or(Lanes a, Lanes b, Lanes c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
static inline Lanes product(Lanes a, Lanes b) { return _mm256_mul_epu32(a, b); }  // of the even lanes
static inline Lanes odd_to_even(Lanes v) { return _mm256_srli_epi64(v, 32); }
static inline Lanes highs(Lanes even, Lanes odd) { return _mm256_blend_epi32(odd_to_even(even), odd, 0xAA); }
static inline Lanes lows(Lanes even, Lanes odd) { return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA); }
#endif

static inline void multiply(Lanes value, Lanes constant, Lanes& high, Lanes& low) {
    const Lanes even = product(value, constant), odd = product(odd_to_even(value), constant);
    high = highs(even, odd);
    low = lows(even, odd);
}

static inline void philox_lanes(uint64_t key, const uint32_t* low, const uint32_t* high,
                                uint32_t words[4][PHILOX_LANES]) {
    constexpr int WIDTH = sizeof(Lanes) / sizeof(uint32_t);
    for (int at = 0; at < PHILOX_LANES; at += WIDTH) {
        Lanes c0 = load_lanes(low + at), c1 = load_lanes(high + at), c2 = same(0), c3 = same(0);
        Lanes k0 = same(static_cast<uint32_t>(key)), k1 = same(static_cast<uint32_t>(key >> 32));
        for (int round = 0; round < 10; ++round) {
            Lanes even_high, even_low, odd_high, odd_low;
            multiply(c0, same(0xD2511F53u), even_high, even_low);
            multiply(c2, same(0xCD9E8D57u), odd_high, odd_low);
            c0 = exclusive_or(odd_high, c1, k0);
            c2 = exclusive_or(even_high, c3, k1);
            c1 = odd_low;
            c3 = even_low;
            k0 = sum(k0, same(0x9E3779B9u));
            k1 = sum(k1, same(0xBB67AE85u));
        }
        store_lanes(words[0] + at, c0);
        store_lanes(words[1] + at, c1);
        store_lanes(words[2] + at, c2);
        store_lanes(words[3] + at, c3);
    }
}

#else

static inline void philox_lanes(uint64_t key, const uint32_t* low, const uint32_t* high,
                                uint32_t words[4][PHILOX_LANES]) {
    for (int lane = 0; lane < PHILOX_LANES; ++lane) {
        const PhiloxWords drawn = philox(key, static_cast<uint64_t>(high[lane]) << 32 | low[lane]);
        for (int word = 0; word < 4; ++word) words[word][lane] = drawn.word[word];
    }
}

#endif

}  // namespace ME_ISA
}  // namespace merge_engine
