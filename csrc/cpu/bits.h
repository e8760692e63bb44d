// Bits moved about in words.
#pragma once

#include <cstdint>

#include "../numeric.h"

#if defined(__BMI2__)
#include <immintrin.h>
#endif

namespace merge_engine {
namespace ME_ISA {

constexpr uint64_t EVEN_PLACES = 0x5555555555555555u;

// The bits at even places, as the lowest 32.
static ME_INLINE uint64_t even_bits(uint64_t bits) {
#if defined(__BMI2__)
    return _pext_u64(bits, EVEN_PLACES);
#else
    bits &= EVEN_PLACES;
    bits = (bits | bits >> 1) & 0x3333333333333333u;
    bits = (bits | bits >> 2) & 0x0F0F0F0F0F0F0F0Fu;
    bits = (bits | bits >> 4) & 0x00FF00FF00FF00FFu;
    bits = (bits | bits >> 8) & 0x0000FFFF0000FFFFu;
    return (bits | bits >> 16) & 0x00000000FFFFFFFFu;
#endif
}
// The reverse.
static ME_INLINE uint64_t at_even_bits(uint64_t bits) {
#if defined(__BMI2__)
    return _pdep_u64(bits, EVEN_PLACES);
#else
    bits &= 0x00000000FFFFFFFFu;
    bits = (bits | bits << 16) & 0x0000FFFF0000FFFFu;
    bits = (bits | bits << 8) & 0x00FF00FF00FF00FFu;
    bits = (bits | bits << 4) & 0x0F0F0F0F0F0F0F0Fu;
    bits = (bits | bits << 2) & 0x3333333333333333u;
    return (bits | bits << 1) & EVEN_PLACES;
#endif
}

}  // namespace ME_ISA
}  // namespace merge_engine
