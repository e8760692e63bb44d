#include "identical.h"

#include <algorithm>
#include <cstring>

namespace merge_engine {
namespace {

template <class Bits>
bool has_negative_zero(const void* data, uint64_t bytes) {
    constexpr Bits negative = static_cast<Bits>(Bits{1} << (8 * sizeof(Bits) - 1));
    const Bits* values = static_cast<const Bits*>(data);
    uint64_t found = 0;
    for (uint64_t j = 0; j < bytes / sizeof(Bits); ++j) found += values[j] == negative;
    return found != 0;
}

}  // namespace

bool identical(const std::vector<const void*>& arrays, uint64_t bytes, int element_bytes) {
    const void* first = arrays.at(0);
    const auto differs = [&](const void* other) { return std::memcmp(first, other, bytes) != 0; };
    if (std::any_of(arrays.begin() + 1, arrays.end(), differs)) return false;
    switch (element_bytes) {
        case 2: return !has_negative_zero<uint16_t>(first, bytes);
        case 4: return !has_negative_zero<uint32_t>(first, bytes);
        case 8: return !has_negative_zero<uint64_t>(first, bytes);
        default: return true;
    }
}

}  // namespace merge_engine
