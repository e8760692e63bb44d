// Magnitude keys of a model, a tile at a time.
#pragma once

#include <algorithm>
#include <vector>

#include "tile.h"

namespace merge_engine {
namespace ME_ISA {

// The keys of whole groups; false if there are values that are not finite, whose keys are others then.
template <DType Working>
bool read_groups(const typename Storage<Working>::Bits* base, const typename Storage<Working>::Bits* model, int count,
                 typename Storage<Working>::Bits* keys) {
    using Vectors = StorageLanes<Working>;
    const auto magnitudes = [](Floats delta) { return (Floats)((Words)delta & 0x7FFFFFFFu); };
    typename Vectors::Magnitudes largest = {};
    for (int at = 0; at < count; at += GROUP) {
#pragma GCC unroll 8
        for (int j = 0; j < HALF; j += LANES) {
            const Floats first = Vectors::template load<0>(model + at, j) - Vectors::template load<0>(base + at, j);
            const Floats second = Vectors::template load<1>(model + at, j) - Vectors::template load<1>(base + at, j);
            largest = larger(largest, Vectors::store(magnitudes(first), magnitudes(second), keys + at, j));
        }
    }
    return !any_at_least(largest, Vectors::INFINITE);
}

// The keys of elements [first, first + count), as wide as the elements of the working dtype.
template <DType Working>
void read_keys(const Array& base, const Array& model, uint64_t first, uint64_t count,
               typename Storage<Working>::Bits* keys) {
    using Real = typename RealOf<Working>::Type;
    typename Storage<Working>::Bits base_room[TILE], model_room[TILE];
    for (uint64_t at = 0; at < count; at += TILE) {
        const int n = static_cast<int>(std::min<uint64_t>(TILE, count - at));
        const auto* b = tile_of<Working>(base, first + at, n, base_room);
        const auto* x = tile_of<Working>(model, first + at, n, model_room);
        if constexpr (Working != DType::F64) {
            if (n % GROUP == 0 && read_groups<Working>(b, x, n, keys + at)) continue;
        }
        const auto real = [](auto bits) { return Storage<Working>::template load<Real>(bits); };
        for (int j = 0; j < n; ++j) {
            keys[at + static_cast<uint64_t>(j)] = magnitude_key<Working>(real(x[j]) - real(b[j]));
        }
    }
}

// Calls visit(keys, n) for each tile of elements [first, last).
template <DType Working, class Visit>
void for_each_key_tile(const Array& base, const Array& model, uint64_t first, uint64_t last, Visit&& visit) {
    typename Storage<Working>::Bits keys[TILE];
    for (uint64_t at = first; at < last; at += TILE) {
        const int n = static_cast<int>(std::min<uint64_t>(TILE, last - at));
        read_keys<Working>(base, model, at, static_cast<uint64_t>(n), keys);
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
