// Storage types of 16 and 32 bits, a vector at a time: the formulas of Storage in numeric.h, where they are explained.
//
// Magnitudes are compared as signed numbers, for which more processors have instructions.
#pragma once

#include "lanes.h"

namespace merge_engine {
namespace ME_ISA {

template <DType>
struct StorageLanes;

template <>
struct StorageLanes<DType::BF16> {
    static ME_INLINE Floats load(const uint16_t* bits) {
        return (Floats)(widened(ME_ISA::load<Halves>(bits)) << 16);
    }
    static ME_INLINE void store(Floats values, uint16_t* to) {
        const Words bits = (Words)values;
        const Words rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
        const Words canonical = (Ints)(bits & 0x7FFFFFFFu) > 0x7F800000 ? Words{} + 0x7FC0u : rounded;
        ME_ISA::store(to, narrowed(canonical));
    }
};

template <>
struct StorageLanes<DType::F16> {
    static ME_INLINE Floats load(const uint16_t* bits) {
        const Words wide = widened(ME_ISA::load<Halves>(bits));
        const Words sign = (wide & 0x8000u) << 16, magnitude = (wide & 0x7FFFu) << 13;
        const Words scaled = (Words)((Floats)magnitude * 0x1p112f);
        return (Floats)(((Ints)magnitude >= 0x0F800000 ? magnitude | 0x7F800000u : scaled) | sign);
    }
    static ME_INLINE void store(Floats values, uint16_t* to) {
        const Words bits = (Words)values, sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
        const Words normal = (magnitude + 0xC8000FFFu + (magnitude >> 13 & 1u)) >> 13;
        const Words denormal = (Words)((Floats)magnitude + 0.5f) - 0x3F000000u;
        const Words finite = (Ints)magnitude < 0x38800000 ? denormal : normal;
        const Words rounded = ((Ints)magnitude >= 0x477FF000 ? Words{} + 0x7C00u : finite) | sign;
        const Words canonical = (Ints)magnitude > 0x7F800000 ? Words{} + 0x7E00u : rounded;
        ME_ISA::store(to, narrowed(canonical));
    }
};

template <>
struct StorageLanes<DType::F32> {
    static ME_INLINE Floats load(const uint32_t* bits) { return ME_ISA::load<Floats>(bits); }
    static ME_INLINE void store(Floats values, uint32_t* to) {
        const Words bits = (Words)values;
        ME_ISA::store(to, (Ints)(bits & 0x7FFFFFFFu) > 0x7F800000 ? Words{} + 0x7FC00000u : bits);
    }
};

}  // namespace ME_ISA
}  // namespace merge_engine
