// Linear combinations of whole models.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "pool.h"
#include "primitives.h"
#include "tile.h"

namespace merge_engine {
namespace ME_ISA {
namespace {

template <DType Working, bool Fused>
void combine_as(const Combine& op, uint64_t count, int threads, uint64_t* non_finite) {
    using Real = typename RealOf<Working>::Type;
    const size_t n = op.inputs.size();
    const uint64_t blocks = (count + BLOCK - 1) / BLOCK;
    std::vector<Real> coefficients;
    for (double value : op.coefficients) coefficients.push_back(static_cast<Real>(value));
    const Real divisor = static_cast<Real>(op.divisor);
    std::vector<uint64_t> found(static_cast<size_t>(std::max(threads, 1)) * (n + 1));
    parallel_for(blocks, threads, [&](uint64_t block, int worker) {
        const uint64_t first = block * BLOCK, last = std::min(count, first + BLOCK);
        Real x[TILE], sum[TILE];
        for (uint64_t at = first; at < last; at += TILE) {
            const int width = static_cast<int>(std::min<uint64_t>(TILE, last - at));
            // -0 is what a sum starts from: adding it changes nothing, the sign of a zero included.
            for (int j = 0; j < width; ++j) sum[j] = Fused ? Real{0} : -Real{0};
            for (size_t i = 0; i < n; ++i) {
                found[static_cast<size_t>(worker) * (n + 1) + i] += load_tile<Working>(op.inputs[i], at, width, x);
                const Real c = coefficients[i];
                if (Fused) {
                    for (int j = 0; j < width; ++j) sum[j] = std::fma(x[j], c, sum[j]);
                } else {
                    for (int j = 0; j < width; ++j) sum[j] += c * x[j];
                }
            }
            if (op.divides) {
                for (int j = 0; j < width; ++j) sum[j] /= divisor;
            }
            if (Fused) {
                for (int j = 0; j < width; ++j) sum[j] = RoundedTo<Working>::round(sum[j]);
            }
            found[static_cast<size_t>(worker) * (n + 1) + n] += store_tile(op.output, at, width, sum);
        }
    });
    for (size_t slot = 0; slot < found.size(); ++slot) non_finite[slot % (n + 1)] += found[slot];
}

}  // namespace

void combine(const Combine& op, uint64_t count, int threads, uint64_t* non_finite) {
    with_dtype(op.working, [&](auto dtype) {
        if (op.fused) {
            combine_as<dtype(), true>(op, count, threads, non_finite);
        } else {
            combine_as<dtype(), false>(op, count, threads, non_finite);
        }
    });
}

}  // namespace ME_ISA
}  // namespace merge_engine
