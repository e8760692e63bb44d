// Keys in terms of magnitudes that are not rounded yet.
#pragma once

#include "numeric.h"

namespace merge_engine {

// The bits of the smallest float whose magnitude key in the working dtype is at least `key`. Rounding is monotone, so
// the floats of a key are a range. The first lies half-way between the key's number and the one below, where rounding
// to even decides: it is that number's own key if the key is even.
template <DType Working>
ME_INLINE uint32_t first_magnitude(uint64_t key);

template <>
ME_INLINE uint32_t first_magnitude<DType::BF16>(uint64_t key) {
    if (key == 0) return 0;
    const uint32_t bits = static_cast<uint32_t>(key < 0x8000 ? key : 0x8000) << 16;
    return bits - 0x8000u + static_cast<uint32_t>(key & 1);
}

template <>
ME_INLINE uint32_t first_magnitude<DType::F16>(uint64_t key) {
    constexpr uint64_t infinity = 0x7C00;
    if (key == 0) return 0;
    if (key > infinity) return 0x80000000u;
    const auto number = [](uint64_t of) { return Storage<DType::F16>::load<float>(static_cast<uint16_t>(of)); };
    const float upper = key == infinity ? 65536.0f : number(key);
    return bits_of<uint32_t>((number(key - 1) + upper) * 0.5f) + static_cast<uint32_t>(key & 1);
}

}  // namespace merge_engine
