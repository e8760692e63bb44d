// Norms and inner products: exact products of inputs, summed in double in a fixed order.
#include <algorithm>
#include <type_traits>

#include "primitives.h"
#include "sieve.h"
#include "storage_lanes.h"
#include "sums.h"

namespace merge_engine {
namespace ME_ISA {
namespace {

// |d| of a tile's elements, and the same with zeros where the mask does not keep them. `stay` are those that a mask
// without a band keeps.
template <DType Working, class Rounding>
struct Magnitudes {
    using Real = typename RealOf<Working>::Type;
    using Bits = typename Storage<Working>::Bits;
    Real all[TILE], surviving[TILE];
    TileBits stay;

    void read(const Array& base, const Array& model, const Sieve<Working>& sieve, uint64_t index, uint64_t offset,
              int count) {
        if constexpr (std::is_same_v<Real, float> && std::is_same_v<Rounding, Unrounded>) {
            Bits base_room[TILE], model_room[TILE];
            if (count == TILE) {
                return read_lanes(tile_of<Working>(base, offset, count, base_room),
                                  tile_of<Working>(model, offset, count, model_room), sieve, index, offset);
            }
        }
        Real b[TILE];
        uint32_t kept[TILE];
        load_tile<Working>(base, offset, count, b);
        sieve.template read<Rounding>(model, b, index, offset, count, all, kept);
        stay = bits_where(count, [&](int j) { return less(Words{}, load<Words>(kept + j)); });
        for (int j = 0; j < count; ++j) {
            all[j] = all[j] < 0 ? -all[j] : all[j];
            surviving[j] = kept[j] ? all[j] : Real(0);
        }
    }

  private:
    void read_lanes(const Bits* base, const Bits* model, const Sieve<Working>& sieve, uint64_t index,
                    uint64_t offset) {
        (void)base,(void)model,(void)sieve,(void)index,(void)offset;
    }
};

template <DType Working, class Rounding>
void l1_norms_of(const Array& base, const std::vector<Array>& models, const std::vector<Mask>& masks,
                 const std::vector<uint64_t*>& notes, uint64_t start, uint64_t count, int threads, double* sums) {
    const std::vector<Sieve<Working>> sieves(masks.begin(), masks.end());
    add_block_sums(count, 2 * models.size(), threads, sums, [&](uint64_t first, uint64_t last, double* out) {
        Magnitudes<Working, Rounding> magnitudes;
        for (size_t m = 0; m < models.size(); ++m) {
            LaneSum before, after;
            for (uint64_t at = first; at < last; at += TILE) {
                const int n = static_cast<int>(std::min<uint64_t>(TILE, last - at));
                magnitudes.read(base, models[m], sieves[m], start + at, at, n);
                if (notes[m]) note(magnitudes.stay, at, notes[m]);
                before.add(n, [&](int j) { return static_cast<double>(magnitudes.all[j]); });
                after.add(n, [&](int j) { return static_cast<double>(magnitudes.surviving[j]); });
            }
            out[2 * m] = before.total();
            out[2 * m + 1] = after.total();
        }
    });
}

}  // namespace

void l1_norms(const Array& base, const std::vector<Array>& models, const std::vector<Mask>& masks,
              const std::vector<uint64_t*>& notes, DType working, bool storage_rounding, uint64_t start,
              uint64_t count, int threads, double* sums) {
    with_dtype(working, [&](auto dtype) {
        if (storage_rounding) {
            l1_norms_of<dtype(), RoundedTo<dtype()>>(base, models, masks, notes, start, count, threads, sums);
        } else {
            l1_norms_of<dtype(), Unrounded>(base, models, masks, notes, start, count, threads, sums);
        }
    });
}

void gram(const std::vector<Array>& inputs, DType working, uint64_t count, int threads, double* sums) {
    const size_t n = inputs.size();
    with_dtype(working, [&](auto dtype) {
        add_block_sums(count, n * n, threads, sums, [&](uint64_t first, uint64_t last, double* out) {
            std::vector<double> values(n * TILE);
            std::vector<LaneSum> products(n * n);
            for (uint64_t at = first; at < last; at += TILE) {
                const int width = static_cast<int>(std::min<uint64_t>(TILE, last - at));
                for (size_t i = 0; i < n; ++i) {
                    typename RealOf<dtype()>::Type tile[TILE];
                    load_tile<dtype()>(inputs[i], at, width, tile);
                    for (int j = 0; j < width; ++j) values[i * TILE + static_cast<size_t>(j)] = tile[j];
                }
                for (size_t i = 0; i < n; ++i) {
                    for (size_t k = i; k < n; ++k) {
                        const double* left = values.data() + i * TILE;
                        const double* right = values.data() + k * TILE;
                        products[i * n + k].add(width, [&](int j) { return left[j] * right[j]; });
                    }
                }
            }
            for (size_t i = 0; i < n; ++i) {
                for (size_t k = i; k < n; ++k) out[i * n + k] = products[i * n + k].total();
            }
        });
    });
}

}  // namespace ME_ISA
}  // namespace merge_engine
