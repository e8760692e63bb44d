// Element by element: how near a model is to the base, and how many models changed an element.
#include <algorithm>
#include <vector>

#include "mask_kernel.h"
#include "pool.h"
#include "primitives.h"

namespace merge_engine {
namespace ME_ISA {
namespace {

// Step 20 of docs/arithmetic.md.
template <DType Working, class Rounding>
class Swapper {
  public:
    using Real = typename RealOf<Working>::Type;

    explicit Swapper(const Nearswap& op)
        : op_(op), threshold_(static_cast<Real>(op.threshold)), nearest_(Rounding::round(static_cast<Real>(NEAREST))) {}

    void swap(uint64_t first, uint64_t last, uint64_t* non_finite) const {
        Real base[TILE], model[TILE], merged[TILE];
        for (uint64_t at = first; at < last; at += TILE) {
            const int n = static_cast<int>(std::min<uint64_t>(TILE, last - at));
            non_finite[0] += load_tile<Working>(op_.base, at, n, base);
            non_finite[1] += load_tile<Working>(op_.model, at, n, model);
            for (int j = 0; j < n; ++j) merged[j] = one(base[j], model[j]);
            non_finite[2] += store_tile(op_.output, at, n, merged);
        }
    }

  private:
    ME_INLINE Real one(Real base, Real model) const {
        const Real difference = model - base;
        const Real distance = Rounding::round(difference < 0 ? -difference : difference);
        const Real divisor = distance < nearest_ ? nearest_ : distance;
        const Real quotient = std::is_same_v<Rounding, Unrounded>
                                  ? threshold_ / divisor
                                  : Rounding::round(Rounding::round(1 / divisor) * threshold_);
        const Real weight = quotient > 1 ? Real(1) : quotient;
        const Real mixed =
            Rounding::round(Rounding::round(weight * model) + Rounding::round(Rounding::round(1 - weight) * base));
        return model == base ? base : mixed;
    }

    const Nearswap& op_;
    const Real threshold_, nearest_;
};

template <class Part>
void in_blocks(uint64_t count, size_t slots, int threads, uint64_t* totals, Part&& part) {
    std::vector<uint64_t> found(static_cast<size_t>(std::max(threads, 1)) * slots);
    parallel_for((count + BLOCK - 1) / BLOCK, threads, [&](uint64_t block, int worker) {
        part(block * BLOCK, std::min(count, (block + 1) * BLOCK), found.data() + static_cast<size_t>(worker) * slots);
    });
    for (size_t i = 0; i < found.size(); ++i) totals[i % slots] += found[i];
}

// The elements of a tile that each mask keeps.
template <DType Working>
void read_kept(const Array& base, const std::vector<Array>& models, const std::vector<MaskKernel<Working>>& masks,
               uint64_t start, uint64_t at, int n, TileBits* kept) {
    using Kernel = MaskKernel<Working>;
    if constexpr (Working != DType::F64) {
        typename Kernel::Bits base_room[TILE], model_room[TILE];
        const auto* b = whole_groups<Working>(base, at, n, base_room);
        Ints largest = {};
        for (size_t i = 0; i < models.size(); ++i) {
            const auto* x = whole_groups<Working>(models[i], at, n, model_room);
            masks[i].keep(x, b, start + at, at, n, kept[i], largest);
        }
    } else {
        typename Kernel::Real b[TILE], deltas[TILE];
        uint32_t stays[TILE];
        load_tile<Working>(base, at, n, b);
        for (size_t i = 0; i < models.size(); ++i) {
            masks[i].template read<Unrounded>(models[i], b, start + at, at, n, deltas, stays);
            kept[i] = bits_where(n, [&](int j) { return less(Words{}, load<Words>(stays + j)); });
        }
    }
}

}  // namespace

void nearswap(const Nearswap& op, uint64_t count, int threads, uint64_t* non_finite) {
    with_dtype(op.working, [&](auto dtype) {
        const auto swap_with = [&](const auto& swapper) {
            in_blocks(count, 3, threads, non_finite, [&](auto... part) { swapper.swap(part...); });
        };
        if (op.storage_rounding) {
            swap_with(Swapper<dtype(), RoundedTo<dtype()>>(op));
        } else {
            swap_with(Swapper<dtype(), Unrounded>(op));
        }
    });
}

void overlaps(const Array& base, const std::vector<Array>& models, const std::vector<Mask>& masks, DType working,
              uint64_t start, uint64_t count, int threads, uint64_t* counts) {
    const size_t n = models.size();
    with_dtype(working, [&](auto dtype) {
        const std::vector<MaskKernel<dtype()>> kernels(masks.begin(), masks.end());
        in_blocks(count, 2 * n, threads, counts, [&](uint64_t first, uint64_t last, uint64_t* found) {
            std::vector<TileBits> kept(n);
            for (uint64_t at = first; at < last; at += TILE) {
                const int width = static_cast<int>(std::min<uint64_t>(TILE, last - at));
                read_kept<dtype()>(base, models, kernels, start, at, width, kept.data());
                for (int w = 0; w < TileBits::WORDS; ++w) {
                    uint64_t any = 0, several = 0;
                    for (size_t i = 0; i < n; ++i) several |= any & kept[i].word[w], any |= kept[i].word[w];
                    for (size_t i = 0; i < n; ++i) {
                        const uint64_t own = kept[i].word[w];
                        found[2 * i] += static_cast<uint64_t>(__builtin_popcountll(own & ~several));
                        found[2 * i + 1] += static_cast<uint64_t>(__builtin_popcountll(own & several));
                    }
                }
            }
        });
    });
}

}  // namespace ME_ISA
}  // namespace merge_engine
