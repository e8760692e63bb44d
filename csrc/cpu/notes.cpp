// Notes of what a mask keeps.
#include "mask_kernel.h"
#include "pool.h"
#include "primitives.h"

namespace merge_engine {
namespace ME_ISA {
namespace {

// The elements of a tile that a band keeps.
template <DType Working>
TileBits kept_of_tile(const MaskKernel<Working>& mask, const Array& base, const Array& model, uint64_t start, uint64_t at,
                      int n) {
    TileBits kept;
    if constexpr (Working == DType::F64) {
        double b[TILE], deltas[TILE];
        uint32_t stays[TILE];
        load_tile<Working>(base, at, n, b);
        mask.template read<Unrounded>(model, b, start + at, at, n, deltas, stays);
        return bits_where(n, [&](int j) { return less(Words{}, load<Words>(stays + j)); });
    } else {
        typename Storage<Working>::Bits base_room[TILE], model_room[TILE];
        Ints largest = {};
        mask.keep(whole_groups<Working>(model, at, n, model_room), whole_groups<Working>(base, at, n, base_room),
                  start + at, at, n, kept, largest);
        return in_natural_order<Working>(kept);
    }
}

}  // namespace

void note_band(const Array& base, const Array& model, const Mask& mask, DType working, uint64_t start, uint64_t count,
               int threads, uint64_t* notes) {
    with_dtype(working, [&](auto dtype) {
        const MaskKernel<dtype()> kernel(mask);
        parallel_for((count + BLOCK - 1) / BLOCK, threads, [&](uint64_t block, int) {
            const uint64_t last = std::min(count, (block + 1) * BLOCK);
            for (uint64_t at = block * BLOCK; at < last; at += TILE) {
                const int n = static_cast<int>(std::min<uint64_t>(TILE, last - at));
                note(kept_of_tile<dtype()>(kernel, base, model, start, at, n), at, notes);
            }
        });
    });
}

}  // namespace ME_ISA
}  // namespace merge_engine
