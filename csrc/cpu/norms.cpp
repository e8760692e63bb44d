// Norms and inner products: exact products of inputs, summed in double in a fixed order.
#include <algorithm>
#include <type_traits>

#include "primitives.h"
#include "sieve.h"
#include "sums.h"

namespace merge_engine {
namespace ME_ISA {
namespace {

template <DType Working, class Rounding>
void l1_norms_of(const Array& base, const std::vector<Array>& models, const std::vector<Mask>& masks,
                 uint64_t start, uint64_t count, int threads, double* sums) {
    using Real = typename RealOf<Working>::Type;
    std::vector<Sieve<Working>> sieves(masks.begin(), masks.end());
    add_block_sums(count, 2 * models.size(), threads, sums, [&](uint64_t first, uint64_t last, double* out) {
        Real b[TILE], delta[TILE];
        uint32_t kept[TILE];
        double all[TILE], surviving[TILE];
        for (size_t m = 0; m < models.size(); ++m) {
            LaneSum before, after;
            for (uint64_t at = first; at < last; at += TILE) {
                const int n = static_cast<int>(std::min<uint64_t>(TILE, last - at));
                load_tile<Working>(base, at, n, b);
                sieves[m].template read<Rounding>(models[m], b, start + at, at, n, delta, kept);
                for (int j = 0; j < n; ++j) {
                    all[j] = static_cast<double>(delta[j] < 0 ? -delta[j] : delta[j]);
                    surviving[j] = kept[j] ? all[j] : 0.0;
                }
                before.add(n, [&](int j) { return all[j]; });
                after.add(n, [&](int j) { return surviving[j]; });
            }
            out[2 * m] = before.total();
            out[2 * m + 1] = after.total();
        }
    });
}

}  // namespace

void l1_norms(const Array& base, const std::vector<Array>& models, const std::vector<Mask>& masks, DType working,
              bool storage_rounding, uint64_t start, uint64_t count, int threads, double* sums) {
    with_dtype(working, [&](auto dtype) {
        if (storage_rounding) {
            l1_norms_of<dtype(), RoundedTo<dtype()>>(base, models, masks, start, count, threads, sums);
        } else {
            l1_norms_of<dtype(), Unrounded>(base, models, masks, start, count, threads, sums);
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
