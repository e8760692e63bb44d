// Roundings of numeric.h, vectors at a time.
#pragma once

#include "storage_lanes.h"

namespace merge_engine {
namespace ME_ISA {

// Knows no NaN: only that what is not finite stays so.
template <class Rounding>
static ME_INLINE Floats round_lanes(Floats v) {
    if constexpr (std::is_same_v<Rounding, RoundedTo<DType::BF16>>) {
        const Words bits = (Words)v;
        return (Floats)((bits + 0x7FFFu + (bits >> 16 & 1u)) & 0xFFFF0000u);
    } else if constexpr (std::is_same_v<Rounding, RoundedTo<DType::F16>>) {
        return floats_of(halves_of(v));
    } else {
        return v;
    }
}

// The bits of the smallest magnitude that becomes infinite.
template <class Rounding>
static constexpr int32_t smallest_infinite() {
    if (std::is_same_v<Rounding, RoundedTo<DType::BF16>>) return 0x7F7F8000;
    return std::is_same_v<Rounding, RoundedTo<DType::F16>> ? 0x477FF000 : 0x7F800000;
}

}  // namespace ME_ISA
}  // namespace merge_engine
