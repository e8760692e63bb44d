// Linear combinations of whole models.
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "pool.h"
#include "primitives.h"
#include "storage_lanes.h"
#include "tile.h"

namespace merge_engine {
namespace ME_ISA {
namespace {

// A linear combination of any inputs.
template <DType Working, bool Fused>
class Combiner {
  public:
    explicit Combiner(const Combine& op) : op_(op), divisor_(static_cast<Real>(op.divisor)) {
        for (double value : op.coefficients) coefficients_.push_back(static_cast<Real>(value));
    }

    // Merges elements [first, last), and adds to non_finite[input], and to the last one for the output.
    void combine(uint64_t first, uint64_t last, uint64_t* non_finite) const {
        for (uint64_t at = first; at < last; at += TILE) {
            const int width = static_cast<int>(std::min<uint64_t>(TILE, last - at));
            if (op_.output.dtype != Working || !combine_lanes(at, width)) combine_tile(at, width, non_finite);
        }
    }

  private:
    using Real = typename RealOf<Working>::Type;
    using Bits = typename Storage<Working>::Bits;

    void combine_tile(uint64_t at, int width, uint64_t* non_finite) const {
        const size_t n = op_.inputs.size();
        Real x[TILE], sum[TILE];
        // -0 is what a sum starts from: adding it changes nothing, the sign of a zero included.
        for (int j = 0; j < width; ++j) sum[j] = Fused ? Real{0} : -Real{0};
        for (size_t i = 0; i < n; ++i) {
            non_finite[i] += load_tile<Working>(op_.inputs[i], at, width, x);
            const Real c = coefficients_[i];
            if (Fused) {
                for (int j = 0; j < width; ++j) sum[j] = std::fma(x[j], c, sum[j]);
            } else {
                for (int j = 0; j < width; ++j) sum[j] += c * x[j];
            }
        }
        if (op_.divides) {
            for (int j = 0; j < width; ++j) sum[j] /= divisor_;
        }
        if (Fused) {
            for (int j = 0; j < width; ++j) sum[j] = RoundedTo<Working>::round(sum[j]);
        }
        non_finite[n] += store_tile(op_.output, at, width, sum);
    }

    // The same in registers. False if a result is not finite, as it is where an input is not.
    bool combine_lanes(uint64_t at, int width) const {
        if constexpr (Fused || Working == DType::F64) {
            return false;
        } else {
            using Vectors = StorageLanes<Working>;
            constexpr size_t MANY = 32;
            const size_t n = op_.inputs.size();
            if (width % GROUP != 0 || n > MANY) return false;
            Bits room[MANY][TILE];
            const Bits* inputs[MANY];
            for (size_t i = 0; i < n; ++i) inputs[i] = tile_of<Working>(op_.inputs[i], at, width, room[i]);
            const auto combined = [&](auto half, int group, int j) {
                Floats sum = -Floats{};
                for (size_t i = 0; i < n; ++i) {
                    sum += every(coefficients_[i]) * Vectors::template load<half()>(inputs[i] + group, j);
                }
                return op_.divides ? sum / every(divisor_) : sum;
            };
            typename Vectors::Magnitudes largest = {};
            Bits* output = static_cast<Bits*>(op_.output.data) + at;
            for (int group = 0; group < width; group += GROUP) {
                for (int j = 0; j < HALF; j += LANES) {
                    const Floats first = combined(std::integral_constant<int, 0>{}, group, j);
                    const Floats second = combined(std::integral_constant<int, 1>{}, group, j);
                    largest = larger(largest, Vectors::store(first, second, output + group, j));
                }
            }
            return !any_at_least(largest, Vectors::INFINITE);
        }
    }

    const Combine& op_;
    std::vector<Real> coefficients_;
    const Real divisor_;
};

template <DType Working, bool Fused>
void combine_as(const Combine& op, uint64_t count, int threads, uint64_t* non_finite) {
    const size_t slots = op.inputs.size() + 1;
    const Combiner<Working, Fused> combiner(op);
    std::vector<uint64_t> found(static_cast<size_t>(std::max(threads, 1)) * slots);
    parallel_for((count + BLOCK - 1) / BLOCK, threads, [&](uint64_t block, int worker) {
        const uint64_t first = block * BLOCK, last = std::min(count, first + BLOCK);
        combiner.combine(first, last, found.data() + static_cast<size_t>(worker) * slots);
    });
    for (size_t slot = 0; slot < found.size(); ++slot) non_finite[slot % slots] += found[slot];
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
