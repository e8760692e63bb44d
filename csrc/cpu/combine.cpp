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

// A linear combination of any inputs, or of task vectors.
template <DType Working, bool Fused>
class Combiner {
  public:
    explicit Combiner(const Combine& op) : op_(op), divisor_(static_cast<Real>(op.divisor)) {
        for (double value : op.coefficients) coefficients_.push_back(static_cast<Real>(value));
        if (op.line.along_first()) {
            for (size_t i = 0; i < op.terms(); ++i) {
                for (uint64_t line = 0; line < op.line.stride; ++line) {
                    coefficients_.push_back(static_cast<Real>(op.of_lines[line * op.terms() + i]));
                }
            }
        }
    }

    // Merges elements [first, last), and adds to non_finite[input], and to the last one for the output. The chunk begins
    // with element `start` of the tensor.
    void combine(uint64_t start, uint64_t first, uint64_t last, uint64_t* non_finite) const {
        const Line& line = op_.line;
        if (line.whole_tensor()) return combine_run(first, last, coefficients_.data(), non_finite);
        std::vector<Real> own(op_.terms());
        for (uint64_t at = first; at < last;) {
            uint64_t end = 0;
            if (line.along_first()) {
                const uint64_t column = (start + at) % line.stride;
                end = std::min({last, at + line.stride - column, at + TILE});
                const Real* of_columns = coefficients_.data() + column;
                combine_tile(at, static_cast<int>(end - at), non_finite,
                             [&](size_t i) { return of_columns + i * line.stride; });
            } else {
                const uint64_t number = (start + at) / line.length;
                end = std::min(last, at + line.length - (start + at) % line.length);
                for (size_t i = 0; i < own.size(); ++i) {
                    own[i] = static_cast<Real>(op_.of_lines[number * own.size() + i]);
                }
                combine_run(at, end, own.data(), non_finite);
            }
            at = end;
        }
    }

  private:
    using Real = typename RealOf<Working>::Type;
    using Bits = typename Storage<Working>::Bits;

    // The same number for all elements of a tile.
    struct Same {
        Real value;
        Real operator[](int) const { return value; }
    };

    void combine_run(uint64_t first, uint64_t last, const Real* coefficients, uint64_t* non_finite) const {
        for (uint64_t at = first; at < last;) {
            const int width = static_cast<int>(std::min<uint64_t>(TILE, last - at)), groups = width / GROUP * GROUP;
            int done = 0;
            if (groups > 0 && combine_lanes(at, groups, coefficients)) done = groups;
            if (done < width) {
                combine_tile(at + static_cast<uint64_t>(done), width - done, non_finite,
                             [&](size_t i) { return Same{coefficients[i]}; });
            }
            at += static_cast<uint64_t>(width);
        }
    }

    // coefficient(i)[j] is that of term i for the tile's element j.
    template <class Coefficient>
    void combine_tile(uint64_t at, int width, uint64_t* non_finite, Coefficient&& coefficient) const {
        const size_t n = op_.inputs.size(), first = op_.on_base ? 1 : 0;
        Real base[TILE], x[TILE], sum[TILE];
        // -0 is what a sum starts from: adding it changes nothing, the sign of a zero included.
        for (int j = 0; j < width; ++j) sum[j] = Fused ? Real{0} : -Real{0};
        if (op_.on_base) non_finite[0] += load_tile<Working>(op_.inputs[0], at, width, base);
        for (size_t i = first; i < n; ++i) {
            non_finite[i] += load_tile<Working>(op_.inputs[i], at, width, x);
            const auto c = coefficient(i - first);
            if (op_.on_base) {
                for (int j = 0; j < width; ++j) x[j] -= base[j];
                if (op_.stepwise) round_all(x, width);
            }
            if (op_.stepwise) {
                for (int j = 0; j < width; ++j) x[j] = c[j] * x[j];
                round_all(x, width);
                for (int j = 0; j < width; ++j) sum[j] += x[j];
                round_all(sum, width);
            } else if (Fused) {
                for (int j = 0; j < width; ++j) sum[j] = std::fma(x[j], c[j], sum[j]);
            } else {
                for (int j = 0; j < width; ++j) sum[j] += c[j] * x[j];
            }
        }
        if (op_.divides) {
            for (int j = 0; j < width; ++j) sum[j] /= divisor_;
            if (op_.stepwise) round_all(sum, width);
        }
        if (op_.on_base) {
            for (int j = 0; j < width; ++j) sum[j] = base[j] + sum[j];
        }
        if (Fused || op_.rounded || op_.stepwise) round_all(sum, width);
        non_finite[n] += store_tile(op_.output, at, width, sum);
    }

    static void round_all(Real* ME_RESTRICT values, int count) {
        for (int j = 0; j < count; ++j) values[j] = RoundedTo<Working>::round(values[j]);
    }

    // The same in registers, for whole groups. False if a result is not finite, as it is where an input is not. Only
    // float32 is rounded to another dtype of the output: there the results are at hand.
    bool combine_lanes(uint64_t at, int width, const Real* coefficients) const {
        if constexpr (Fused || Working == DType::F64) {
            return false;
        } else {
            using Vectors = StorageLanes<Working>;
            constexpr size_t MANY = 32;
            const size_t n = op_.inputs.size();
            const bool as_it_is = op_.output.dtype == Working;
            if (n > MANY || op_.stepwise || !(as_it_is || Working == DType::F32)) return false;
            Bits room[MANY][TILE];
            const Bits* inputs[MANY];
            for (size_t i = 0; i < n; ++i) inputs[i] = tile_of<Working>(op_.inputs[i], at, width, room[i]);
            const auto combined = [&](auto half, int group, int j) {
                Floats sum = -Floats{};
                if (op_.on_base) {
                    const Floats base = Vectors::template load<half()>(inputs[0] + group, j);
                    for (size_t i = 1; i < n; ++i) {
                        const Floats delta = Vectors::template load<half()>(inputs[i] + group, j) - base;
                        sum += every(coefficients[i - 1]) * delta;
                    }
                    return base + (op_.divides ? sum / every(divisor_) : sum);
                }
                for (size_t i = 0; i < n; ++i) {
                    sum += every(coefficients[i]) * Vectors::template load<half()>(inputs[i] + group, j);
                }
                return op_.divides ? sum / every(divisor_) : sum;
            };
            typename Vectors::Magnitudes largest = {};
            Real merged[TILE];
            Bits* output = as_it_is ? static_cast<Bits*>(op_.output.data) + at : reinterpret_cast<Bits*>(merged);
            for (int group = 0; group < width; group += GROUP) {
                for (int j = 0; j < HALF; j += LANES) {
                    const Floats first = combined(std::integral_constant<int, 0>{}, group, j);
                    const Floats second = combined(std::integral_constant<int, 1>{}, group, j);
                    largest = larger(largest, Vectors::store(first, second, output + group, j));
                }
            }
            if (any_at_least(largest, Vectors::INFINITE)) return false;
            return as_it_is || store_tile(op_.output, at, width, merged) == 0;
        }
    }

    const Combine& op_;
    std::vector<Real> coefficients_;  // of lines along the first dimension: [term][line]
    const Real divisor_;
};

template <DType Working, bool Fused>
void combine_as(const Combine& op, uint64_t start, uint64_t count, int threads, uint64_t* non_finite) {
    const size_t slots = op.inputs.size() + 1;
    const Combiner<Working, Fused> combiner(op);
    std::vector<uint64_t> found(static_cast<size_t>(std::max(threads, 1)) * slots);
    parallel_for((count + BLOCK - 1) / BLOCK, threads, [&](uint64_t block, int worker) {
        const uint64_t first = block * BLOCK, last = std::min(count, first + BLOCK);
        combiner.combine(start, first, last, found.data() + static_cast<size_t>(worker) * slots);
    });
    for (size_t slot = 0; slot < found.size(); ++slot) non_finite[slot % slots] += found[slot];
}

}  // namespace

void combine(const Combine& op, uint64_t start, uint64_t count, int threads, uint64_t* non_finite) {
    with_dtype(op.working, [&](auto dtype) {
        if (op.fused) {
            combine_as<dtype(), true>(op, start, count, threads, non_finite);
        } else {
            combine_as<dtype(), false>(op, start, count, threads, non_finite);
        }
    });
}

}  // namespace ME_ISA
}  // namespace merge_engine
