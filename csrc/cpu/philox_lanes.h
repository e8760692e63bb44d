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

// The numbers of blocks in slots, such that store_blocks stores them in order.
static ME_INLINE Slots block_numbers() {
    Slots numbers;
    for (int slot = 0; slot < SLOTS; ++slot) numbers[slot] = static_cast<uint64_t>(slot / 2 + slot % 2 * (SLOTS / 2));
    return numbers;
}

struct SlotWords {
    Slots word[4];  // in the lower halves
};

// Pairs of slots at even and at odd places.
static ME_INLINE Slots even_slots(Slots a, Slots b) {
#if defined(__AVX512F__)
    return (Slots)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (Slots)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
#else
    return Slots{a[0], b[0]};
#endif
}
static ME_INLINE Slots odd_slots(Slots a, Slots b) {
#if defined(__AVX512F__)
    return (Slots)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (Slots)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
#else
    return Slots{a[1], b[1]};
#endif
}

// Writes SLOTS blocks of four words each.
static ME_INLINE void store_blocks(const SlotWords& words, uint8_t* to) {
    const Slots first = (words.word[0] & 0xFFFFFFFFu) | words.word[1] << 32;
    const Slots last = (words.word[2] & 0xFFFFFFFFu) | words.word[3] << 32;
    store(to, even_slots(first, last));
    store(to + VECTOR_BYTES, odd_slots(first, last));
}

// The keys of the rounds.
struct RoundKeys {
    uint64_t key, k0[PHILOX_ROUNDS], k1[PHILOX_ROUNDS];

    explicit RoundKeys(uint64_t own) : key(own) {
        for (int round = 0; round < PHILOX_ROUNDS; ++round) {
            k0[round] = round_key(key, round).first;
            k1[round] = round_key(key, round).second;
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
    for (int round = 1; round < PHILOX_ROUNDS; ++round) {
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
