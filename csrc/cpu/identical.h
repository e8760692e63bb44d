// Whether arrays hold the same.
#pragma once

#include <cstdint>
#include <vector>

namespace merge_engine {

// Whether all arrays hold the same bytes. With `element_bytes` set, an array of floats that holds a negative zero does
// not qualify: adding a zero task vector would turn it into a positive one.
bool identical(const std::vector<const void*>& arrays, uint64_t bytes, int element_bytes);

}  // namespace merge_engine
