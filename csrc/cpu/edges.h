// Counting how many magnitudes lie at or above each of a few edges.
//
// An edge costs a comparison, but not of every element: once few elements reach an edge, they are compacted, and only
// they are compared with the next edges.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "mask_kernel.h"

namespace merge_engine {
namespace ME_ISA {

// Counts task vector entries of one model. They are looked at before rounding, as a MaskKernel does it.
template <DType Working>
class EdgeCounter {
  public:
    using Bits = typename Storage<Working>::Bits;
    using Magnitude = typename MaskKernel<Working>::Magnitude;

    // The edges ascend.
    explicit EdgeCounter(std::vector<Magnitude> edges) : edges_(std::move(edges)), found_(edges_.size()) {
        if (edges_.size() > AT_A_TIME) compacted_.resize(ROOM + LANES);
    }

    // Elements of a tile.
    void add(const Bits* base, const Bits* model, int count) {
        int counted = 0;
        if constexpr (Working != DType::F64) {
            counted = count / GROUP * GROUP;
            if (size_ + counted > ROOM || !rare(of_all_ - 1)) {
                compare_compacted();
                for (of_all_ = AT_A_TIME; of_all_ < edges_.size() && !rare(of_all_ - 1);) of_all_ += AT_A_TIME;
            }
            for (size_t first = 0; first < std::min(of_all_, edges_.size()); first += AT_A_TIME) {
                with_number(edges_.size() - first, [&](auto number) {
                    if (first + AT_A_TIME == of_all_ && of_all_ < edges_.size()) {
                        count_groups<number(), true>(base, model, counted, first);
                    } else {
                        count_groups<number(), false>(base, model, counted, first);
                    }
                });
            }
            seen_ += static_cast<uint64_t>(counted);
        }
        using Real = typename RealOf<Working>::Type;
        for (int j = counted; j < count; ++j) {
            const Real delta =
                Storage<Working>::template load<Real>(model[j]) - Storage<Working>::template load<Real>(base[j]);
            const Magnitude magnitude = bits_of<Magnitude>(delta) & ~MaskKernel<Working>::SIGN;
            for (size_t e = 0; e < edges_.size(); ++e) found_[e] += magnitude >= edges_[e];
        }
    }
    // For each edge, how many were at or above it.
    const std::vector<uint64_t>& found() {
        compare_compacted();
        return found_;
    }

  private:
    static constexpr size_t AT_A_TIME = 4;  // fit registers
    static constexpr int ROOM = 8 * TILE;

    template <class F>
    static void with_number(size_t number, F&& f) {
        switch (number) {
            case 1: return f(std::integral_constant<int, 1>{});
            case 2: return f(std::integral_constant<int, 2>{});
            case 3: return f(std::integral_constant<int, 3>{});
            default: return f(std::integral_constant<int, int{AT_A_TIME}>{});
        }
    }

    bool rare(size_t edge) const {
        return edge >= edges_.size() || found_[edge] * WORTH_COMPRESSING <= seen_;
    }

    // The edges [first, first + E) and their counts, in registers. With `Compact`, elements that reach the last of them
    // are compacted.
    template <int E, bool Compact>
    class Registers {
      public:
        explicit Registers(EdgeCounter& counter, size_t first) : counter_(counter), first_(first) {
            // Signed comparisons will do, because no magnitude has a sign.
            for (size_t e = 0; e < E; ++e) below_[e] = Ints{} + static_cast<int32_t>(counter.edges_[first + e] - 1);
        }
        ~Registers() {
            for (size_t e = 0; e < E; ++e) counter_.found_[first_ + e] += total(counted_[e]);
        }
        ME_INLINE void look(Ints magnitudes) {
            Truth above;
            for (int e = 0; e < E; ++e) {
                above = less(below_[e], magnitudes);
                counted_[e] = count(counted_[e], above);
            }
            if (Compact) {
                counter_.size_ += compress(above, magnitudes, counter_.compacted_.data() + counter_.size_);
            }
        }

      private:
        EdgeCounter& counter_;
        size_t first_;
        Ints below_[E], counted_[E] = {};
    };

    template <int E, bool Compact>
    void count_groups(const Bits* base, const Bits* model, int count, size_t first) {
        using Vectors = StorageLanes<Working>;
        Registers<E, Compact> registers(*this, first);
        const auto look = [&](auto half, int at, int j) {
            const Floats delta =
                Vectors::template load<half()>(model + at, j) - Vectors::template load<half()>(base + at, j);
            registers.look((Ints)delta & 0x7FFFFFFF);
        };
        for (int at = 0; at < count; at += GROUP) {
#pragma GCC unroll 8
            for (int j = 0; j < HALF; j += LANES) {
                look(std::integral_constant<int, 0>{}, at, j);
                look(std::integral_constant<int, 1>{}, at, j);
            }
        }
    }
    // Compares what was compacted with the rest of the edges, and compacts it on. Zeros fill its last vector: only the
    // first edge may be as low.
    void compare_compacted() {
        for (size_t first = of_all_; first < edges_.size() && size_; first += AT_A_TIME) {
            const int compacted = std::exchange(size_, 0);
            store(compacted_.data() + compacted, Ints{});
            with_number(edges_.size() - first, [&](auto number) {
                Registers<number(), true> registers(*this, first);
                for (int at = 0; at < compacted; at += LANES) registers.look(load<Ints>(compacted_.data() + at));
            });
        }
        size_ = 0;
    }

    std::vector<Magnitude> edges_;
    std::vector<uint64_t> found_;
    size_t of_all_ = AT_A_TIME;   // edges that all elements are compared with
    uint64_t seen_ = 0;           // elements
    std::vector<int32_t> compacted_;  // and room for a vector
    int size_ = 0;                    // elements in it
};

}  // namespace ME_ISA
}  // namespace merge_engine
