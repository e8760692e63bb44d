// Vectors as wide as the registers, for loops that compilers do not vectorise by themselves.
#pragma once

#include <cstdint>
#include <cstring>

namespace merge_engine {
namespace ME_ISA {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

// Comparisons give Ints: -1 where they hold, else 0.
using Floats = float __attribute__((vector_size(VECTOR_BYTES)));
using Ints = int32_t __attribute__((vector_size(VECTOR_BYTES)));
constexpr int LANES = VECTOR_BYTES / 4;

template <class Vector>
static inline Vector load(const void* from) {
    Vector result;
    std::memcpy(&result, from, sizeof(result));
    return result;
}
template <class Vector>
static inline void store(void* to, Vector value) {
    std::memcpy(to, &value, sizeof(value));
}
static inline uint64_t total(Ints counts) {
    uint64_t sum = 0;
    for (int lane = 0; lane < LANES; ++lane) sum += static_cast<uint64_t>(counts[lane]);
    return sum;
}

}  // namespace ME_ISA
}  // namespace merge_engine
