// On which side of a few edges magnitudes lie.
//
// An edge costs a comparison of every element. Those between two edges can be handed over meanwhile.
#pragma once

#include <algorithm>
#include <array>
#include <functional>
#include <type_traits>
#include <vector>

#include "mask_kernel.h"

namespace merge_engine {
namespace ME_ISA {

// Counts task vector entries of one model. They are looked at before rounding, as a MaskKernel does it.
template <DType Working>
class EdgeCounter {
  public:
    using Magnitude = typename MaskKernel<Working>::Magnitude;

    // The edges are keys. They ascend, some may be equal, and their number is even.
    explicit EdgeCounter(const std::vector<uint64_t>& edges) : in_lanes_(edges.size()), at_least_(edges.size()) {
        for (const uint64_t edge : edges) edges_.push_back(MaskKernel<Working>::first_of(edge));
    }

    // Counts the elements [first, last). Hands over the magnitudes of those at or above an odd number of edges, many at a
    // time and in any order, if there is a `take`.
    static constexpr int MOST_PASSED = 2 * TILE;
    using Take = std::function<void(const Magnitude* magnitudes, size_t size)>;
    void add(const Array& base, const Array& model, uint64_t first, uint64_t last, const Take& take = {}) {
        Magnitude passed[MOST_PASSED + LANES], *end = passed;
        for (uint64_t at = first; at < last; at += TILE) {
            const int count = static_cast<int>(std::min<uint64_t>(TILE, last - at));
            Bits base_room[TILE], model_room[TILE];
            end = add_tile(tile_of<Working>(base, at, count, base_room), tile_of<Working>(model, at, count, model_room),
                           count, take ? end : nullptr);
            if (!take || (end <= passed + TILE && at + TILE < last)) continue;
            take(passed, static_cast<size_t>(end - passed));
            end = passed;
        }
    }
    // For each edge, how many elements were at or above it.
    std::vector<uint64_t> at_least() const {
        std::vector<uint64_t> sums = at_least_;
        for (size_t e = 0; e < sums.size(); ++e) sums[e] += total(load<Ints>(in_lanes_[e].data()));
        return sums;
    }

  private:
    using Bits = typename Storage<Working>::Bits;
    static constexpr size_t AT_A_TIME = 8;
    static constexpr int AHEAD = 4 * TILE;

    // Writes the magnitudes of those that pass, with up to LANES others behind them, and returns their end; writes none
    // if `passed` is nullptr.
    Magnitude* add_tile(const Bits* base, const Bits* model, int count, Magnitude* passed) {
        int counted = 0;
        if constexpr (Working != DType::F64) {
            counted = count / GROUP * GROUP;
            for (size_t first = 0; first < edges_.size(); first += AT_A_TIME) {
                with_number(edges_.size() - first, [&](auto number) {
                    passed = count_groups<number()>(base, model, counted, first, passed);
                });
            }
        }
        using Real = typename RealOf<Working>::Type;
        Magnitude rest[TILE];
        for (int j = counted; j < count; ++j) {
            const Real delta =
                Storage<Working>::template load<Real>(model[j]) - Storage<Working>::template load<Real>(base[j]);
            rest[j] = bits_of<Magnitude>(delta) & ~MaskKernel<Working>::SIGN;
        }
        for (size_t e = 0; e < edges_.size(); ++e) {
            uint64_t above = 0;
            for (int j = counted; j < count; ++j) above += rest[j] >= edges_[e];
            at_least_[e] += above;
        }
        for (int j = counted; passed && j < count; ++j) {
            bool odd = false;
            for (const Magnitude edge : edges_) odd ^= rest[j] >= edge;
            *passed = rest[j];
            passed += odd;
        }
        return passed;
    }

    template <class F>
    static void with_number(size_t number, F&& f) {
        switch (number) {
            case 2: return f(std::integral_constant<int, 2>{});
            case 4: return f(std::integral_constant<int, 4>{});
            case 6: return f(std::integral_constant<int, 6>{});
            default: return f(std::integral_constant<int, int{AT_A_TIME}>{});
        }
    }

    // For the edges [first, first + E). Their counts are in registers.
    template <int E>
    Magnitude* count_groups(const Bits* base, const Bits* model, int count, size_t first, Magnitude* passed) {
        using Vectors = StorageLanes<Working>;
        Ints below[E], counts[E];
        for (int e = 0; e < E; ++e) {
            // Signed comparisons will do, because no magnitude has a sign.
            below[e] = Ints{} + static_cast<int32_t>(edges_[first + e] - 1);
            counts[e] = load<Ints>(in_lanes_[first + e].data());
        }
        const auto look = [&](auto half, int at, int j) {
            const Floats delta =
                Vectors::template load<half()>(model + at, j) - Vectors::template load<half()>(base + at, j);
            const Ints magnitudes = (Ints)delta & 0x7FFFFFFF;
            Truth odd = {};
            for (int e = 0; e < E; ++e) {
                const Truth above = less(below[e], magnitudes);
                counts[e] = ME_ISA::count(counts[e], above);
                odd = odd ^ above;
            }
            if (passed) passed += compress(odd, magnitudes, reinterpret_cast<int32_t*>(passed));
        };
        for (int at = 0; at < count; at += GROUP) {
            prefetch_group(base + at + AHEAD);
            prefetch_group(model + at + AHEAD);
#pragma GCC unroll 8
            for (int j = 0; j < HALF; j += LANES) {
                look(std::integral_constant<int, 0>{}, at, j);
                look(std::integral_constant<int, 1>{}, at, j);
            }
        }
        for (int e = 0; e < E; ++e) store(in_lanes_[first + e].data(), counts[e]);
        return passed;
    }

    std::vector<Magnitude> edges_;
    std::vector<std::array<int32_t, LANES>> in_lanes_;  // counts of elements in whole groups
    std::vector<uint64_t> at_least_;                    // of others
};

}  // namespace ME_ISA
}  // namespace merge_engine
