// Philox for a vector of counters.
//
// Each counter has a slot of 64 bits to itself, so that its products stay where they are: a round is multiplications,
// shifts and exclusive ors, without a shuffle. What is left in the upper halves of slots is never read.
#pragma once

#include "../philox.h"
#include "lanes.h"

namespace merge_engine {
namespace ME_ISA {

constexpr int SLOTS = VECTOR_BYTES / 8;

// The products of the lower halves. Compilers would make full 64-bit multiplications of the plain formula.
static ME_INLINE Slots product(Slots a, uint32_t b) {
#if defined(__AVX512F__)
    return (Slots)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
    return (Slots)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
    return (Slots)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
    return (a & 0xFFFFFFFFu) * b;
#endif
}

// A vector of counters in two of slots, and two of words from slots as one again, in the same order.
static ME_INLINE void split(Words counters, Slots& a, Slots& b) {
#if defined(__AVX512F__)
    a = (Slots)_mm512_unpacklo_epi32((__m512i)counters, __m512i{});
    b = (Slots)_mm512_unpackhi_epi32((__m512i)counters, __m512i{});
#elif defined(__AVX2__)
    a = (Slots)_mm256_unpacklo_epi32((__m256i)counters, __m256i{});
    b = (Slots)_mm256_unpackhi_epi32((__m256i)counters, __m256i{});
#elif defined(__SSE2__)
    a = (Slots)_mm_unpacklo_epi32((__m128i)counters, __m128i{});
    b = (Slots)_mm_unpackhi_epi32((__m128i)counters, __m128i{});
#else
    a = (Slots)counters & 0xFFFFFFFFu;
    b = (Slots)counters >> 32;
#endif
}
static ME_INLINE Words joined(Slots a, Slots b) {
#if defined(__AVX512F__)
    return (Words)_mm512_shuffle_ps((__m512)a, (__m512)b, 0x88);
#elif defined(__AVX2__)
    return (Words)_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88);
#elif defined(__SSE2__)
    return (Words)_mm_shuffle_ps((__m128)a, (__m128)b, 0x88);
#else
    return (Words)((a & 0xFFFFFFFFu) | b << 32);
#endif
}

struct SlotWords {
    Slots word[4];  // in the lower halves
};

// The keys of the rounds.
struct RoundKeys {
    uint64_t k0[10], k1[10];

    explicit RoundKeys(uint64_t key) {
        for (uint32_t round = 0; round < 10; ++round) {
            k0[round] = static_cast<uint32_t>(key) + round * 0x9E3779B9u;
            k1[round] = static_cast<uint32_t>(key >> 32) + round * 0xBB67AE85u;
        }
    }
};

// Several vectors of counters at a time, because multiplications take long but need not wait for one another.
template <int N>
static ME_INLINE void philox_slots(const RoundKeys& keys, const Slots (&counters)[N], SlotWords (&words)[N]) {
    Slots c0[N], c1[N], c2[N], c3[N];
    for (int n = 0; n < N; ++n) {  // the first round, when two words are still 0
        c3[n] = product(counters[n], 0xD2511F53u);
        c0[n] = counters[n] >> 32 ^ (Slots{} + keys.k0[0]);
        c2[n] = c3[n] >> 32 ^ (Slots{} + keys.k1[0]);
        c1[n] = Slots{};
    }
#pragma GCC unroll 9
    for (int round = 1; round < 10; ++round) {
        for (int n = 0; n < N; ++n) {
            const Slots even = product(c0[n], 0xD2511F53u), odd = product(c2[n], 0xCD9E8D57u);
            c0[n] = odd >> 32 ^ c1[n] ^ (Slots{} + keys.k0[round]);
            c2[n] = even >> 32 ^ c3[n] ^ (Slots{} + keys.k1[round]);
            c1[n] = odd;
            c3[n] = even;
        }
    }
    for (int n = 0; n < N; ++n) words[n] = {{c0[n], c1[n], c2[n], c3[n]}};
}

}  // namespace ME_ISA
}  // namespace merge_engine
