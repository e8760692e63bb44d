// A matrix plus a scaled product of two thin ones: docs/arithmetic.md, "LoRA adapters".
#include <algorithm>
#include <type_traits>
#include <vector>

#include "lanes.h"
#include "pool.h"
#include "primitives.h"
#include "tile.h"

namespace merge_engine {
namespace ME_ISA {
namespace {

// Sums in registers: ROWS rows of VECTORS vectors. Each factor that is loaded serves all sums of its row or column.
constexpr int ROWS = 4, VECTORS = VECTOR_BYTES == 64 ? 4 : 2;

// Columns whose factors are widened at a time.
constexpr int STRIP = 64;

// Rows whose factors are widened at a time. They are read once for every strip of columns.
constexpr uint64_t BAND = 256;

template <DType Values>
class Adder {
  public:
    explicit Adder(const LowRank& op) : op_(op), scale_(static_cast<Real>(op.scale)) {}

    // Elements [first, first + count) of the matrix: the end of a row, whole rows, the begin of a row.
    void add() {
        const uint64_t width = op_.width, column = op_.first % width, row = op_.first / width;
        auto* values = static_cast<Bits*>(op_.values.data);
        uint64_t left = op_.count, at = row;
        if (column != 0) {
            const uint64_t n = std::min(left, width - column);
            add_block(values, at++, 1, column, column + n);
            values += n, left -= n;
        }
        if (const uint64_t whole = left / width) {
            add_block(values, at, whole, 0, width);
            values += whole * width, left -= whole * width, at += whole;
        }
        if (left) add_block(values, at, 1, 0, left);
    }

  private:
    using Real = typename RealOf<Values>::Type;
    using Bits = typename Storage<Values>::Bits;
    using Reals = std::conditional_t<std::is_same_v<Real, float>, Floats, Doubles>;
    static constexpr int LANES_OF = VECTOR_BYTES / static_cast<int>(sizeof(Real));
    static_assert(STRIP % (VECTORS * LANES_OF) == 0, "a strip is whole vectors");

    // `rows` rows from `row` on, columns [first, last) of each. `values` is the first of these elements.
    void add_block(Bits* values, uint64_t row, uint64_t rows, uint64_t first, uint64_t last) {
        const uint64_t rank = op_.rank;
        for (uint64_t band = 0; band < rows; band += BAND) {
            const uint64_t n = std::min(BAND, rows - band);
            widen_rows(row + band, n);
            for (uint64_t column = first; column < last; column += STRIP) {
                const int width = static_cast<int>(std::min<uint64_t>(STRIP, last - column));
                widen_columns(column, width);
                for (uint64_t i = 0; i < n; i += ROWS) {
                    const int some = static_cast<int>(std::min<uint64_t>(ROWS, n - i));
                    Real sums[ROWS][STRIP];
                    multiply(rows_.data() + i * rank, some, sums);
                    for (int r = 0; r < some; ++r) {
                        Bits* at = values + (band + i + static_cast<uint64_t>(r)) * (last - first) + (column - first);
                        if (width == STRIP) {
                            add_sums(at, sums[r], STRIP);
                        } else {
                            add_sums(at, sums[r], width);
                        }
                    }
                }
            }
        }
    }

    ME_INLINE void add_sums(Bits* ME_RESTRICT at, const Real* ME_RESTRICT sums, int count) const {
        for (int j = 0; j < count; ++j) {
            at[j] = Storage<Values>::store(Storage<Values>::template load<Real>(at[j]) + scale_ * sums[j]);
        }
    }

    // sums[r][j] = the terms of row r and column j, in order.
    void multiply(const Real* factors, int rows, Real (&sums)[ROWS][STRIP]) const {
        const uint64_t rank = op_.rank;
        const Real* of_row[ROWS];
        for (int r = 0; r < ROWS; ++r) of_row[r] = factors + static_cast<uint64_t>(std::min(r, rows - 1)) * rank;
        for (int at = 0; at < STRIP; at += VECTORS * LANES_OF) {
            Reals sum[ROWS][VECTORS] = {};
            const Real* column = columns_.data() + at;
            for (uint64_t k = 0; k < rank; ++k, column += STRIP) {
                Reals those[VECTORS];
                for (int v = 0; v < VECTORS; ++v) those[v] = load<Reals>(column + v * LANES_OF);
                for (int r = 0; r < ROWS; ++r) {
                    const Reals one = of_row[r][k] - Reals{};
                    for (int v = 0; v < VECTORS; ++v) sum[r][v] += one * those[v];
                }
            }
            for (int r = 0; r < ROWS; ++r) {
                for (int v = 0; v < VECTORS; ++v) store(sums[r] + at + v * LANES_OF, sum[r][v]);
            }
        }
    }

    // The factors of `count` rows, side by side for each row.
    void widen_rows(uint64_t row, uint64_t count) {
        const uint64_t rank = op_.rank;
        rows_.resize(BAND * rank);
        with_dtype(op_.rows.dtype, [&](auto from) {
            const auto* data = static_cast<const typename Storage<from()>::Bits*>(op_.rows.data);
            for (uint64_t i = 0; i < count; ++i) {
                for (uint64_t k = 0; k < rank; ++k) {
                    const uint64_t at = op_.transposed ? k * op_.row_count + row + i : (row + i) * rank + k;
                    rows_[i * rank + k] = widened_one<from()>(data[at]);
                }
            }
        });
    }

    // The factors of `count` columns, side by side for each term; the rest of the strip is 0.
    void widen_columns(uint64_t column, int count) {
        const uint64_t rank = op_.rank;
        columns_.assign(rank * STRIP, Real{0});
        with_dtype(op_.columns.dtype, [&](auto from) {
            const auto* data = static_cast<const typename Storage<from()>::Bits*>(op_.columns.data);
            for (uint64_t k = 0; k < rank; ++k) {
                Real* to = columns_.data() + k * STRIP;
                for (int j = 0; j < count; ++j) {
                    const uint64_t at = column + static_cast<uint64_t>(j);
                    to[j] = widened_one<from()>(data[op_.transposed ? at * rank + k : k * op_.width + at]);
                }
            }
        });
    }

    template <DType From>
    static ME_INLINE Real widened_one(typename Storage<From>::Bits bits) {
        using Held = typename RealOf<From>::Type;
        return static_cast<Real>(Storage<From>::template load<Held>(bits));
    }

    const LowRank& op_;
    const Real scale_;
    std::vector<Real> rows_, columns_;
};

}  // namespace

void add_low_rank(const LowRank& op) {
    // One block: the caller is one of several threads that read. Only the loop's floating-point environment is needed.
    parallel_for(1, 1, [&](uint64_t, int) {
        with_dtype(op.values.dtype, [&](auto values) { Adder<values()>(op).add(); });
    });
}

}  // namespace ME_ISA
}  // namespace merge_engine
