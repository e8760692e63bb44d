// Norms and inner products: exact products of inputs, summed in double in a fixed order.
#include <algorithm>
#include <type_traits>

#include "primitives.h"
#include "sums.h"

namespace merge_engine {
namespace ME_ISA {
namespace {

template <DType Working, class Rounding>
void l1_norms_of(const Array& base, const std::vector<Array>& models, const std::vector<Mask>& masks,
                 uint64_t start, uint64_t count, int threads, double* sums) {
    using Real = typename RealOf<Working>::Type;
    add_block_sums(count, 2 * models.size(), threads, sums, [&](uint64_t first, uint64_t last, double* out) {
        Real b[TILE], x[TILE], delta[TILE];
        uint32_t kept[TILE];
        double all[TILE], surviving[TILE];
        for (size_t m = 0; m < models.size(); ++m) {
            LaneSum before, after;
            for (uint64_t at = first; at < last; at += TILE) {
                const int n = static_cast<int>(std::min<uint64_t>(TILE, last - at));
                load_tile<Working>(base, at, n, b);
                load_tile<Working>(models[m], at, n, x);
                task_vector_tile<Rounding>(x, b, n, delta);
                mask_tile<Working>(masks[m], delta, start + at, at, n, kept);
                for (int j = 0; j < n; ++j) {
                    all[j] = static_cast<double>(delta[j] < 0 ? -delta[j] : delta[j]);
                    surviving[j] = kept[j] ? all[j] : 0.0;
                }
                before.add(all, n);
                after.add(surviving, n);
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
            std::vector<double> values(n * SUM_BLOCK);
            const int block = static_cast<int>(last - first);
            for (size_t i = 0; i < n; ++i) {
                for (int at = 0; at < block; at += TILE) {
                    typename RealOf<dtype()>::Type tile[TILE];
                    const int width = std::min(TILE, block - at);
                    load_tile<dtype()>(inputs[i], first + static_cast<uint64_t>(at), width, tile);
                    for (int j = 0; j < width; ++j) values[i * SUM_BLOCK + static_cast<size_t>(at + j)] = tile[j];
                }
            }
            double products[SUM_BLOCK];
            for (size_t i = 0; i < n; ++i) {
                for (size_t k = i; k < n; ++k) {
                    const double* ME_RESTRICT left = values.data() + i * SUM_BLOCK;
                    const double* ME_RESTRICT right = values.data() + k * SUM_BLOCK;
                    for (int j = 0; j < block; ++j) products[j] = left[j] * right[j];
                    LaneSum sum;
                    sum.add(products, block);
                    out[i * n + k] = sum.total();
                }
            }
        });
    });
}

}  // namespace ME_ISA
}  // namespace merge_engine
