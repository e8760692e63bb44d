// Magnitude keys of a model, a tile at a time.
#pragma once

#include <algorithm>
#include <vector>

#include "tile.h"

namespace merge_engine {
namespace ME_ISA {

// Writes the keys of a tile. They are as wide as the elements of the working dtype.
template <DType Working>
void keys_of_tile(const Array& base, const Array& model, uint64_t at, int n,
                  typename Storage<Working>::Bits* ME_RESTRICT keys) {
    using Real = typename RealOf<Working>::Type;
    Real b[TILE], x[TILE];
    load_tile<Working>(base, at, n, b);
    load_tile<Working>(model, at, n, x);
    for (int j = 0; j < n; ++j) keys[j] = magnitude_key<Working>(x[j] - b[j]);
}

// Calls visit(keys, n) for each tile of elements [first, last).
template <DType Working, class Visit>
void for_each_key_tile(const Array& base, const Array& model, uint64_t first, uint64_t last, Visit&& visit) {
    typename Storage<Working>::Bits keys[TILE];
    for (uint64_t at = first; at < last; at += TILE) {
        const int n = static_cast<int>(std::min<uint64_t>(TILE, last - at));
        keys_of_tile<Working>(base, model, at, n, keys);
        visit(keys, n);
    }
}

// Appends the keys of elements [first, last).
template <DType Working>
void list_keys(const Array& base, const Array& model, uint64_t first, uint64_t last,
               std::vector<typename Storage<Working>::Bits>& keys) {
    for_each_key_tile<Working>(base, model, first, last, [&](const auto* of_tile, int n) {
        keys.insert(keys.end(), of_tile, of_tile + n);
    });
}

// Whether keys that are shifted so far have no bits above their bins.
template <DType Working>
constexpr bool is_first_level(int shift) {
    return shift + FIRST_BITS == 8 * static_cast<int>(sizeof(typename Storage<Working>::Bits)) - 1;
}

}  // namespace ME_ISA
}  // namespace merge_engine
