// Inner products of inputs and of task vectors, of whole tensors and of each line. Products of numbers of up to 32 bits
// are exact in double; they are summed in an order that neither chunks nor threads change (docs/arithmetic.md, step 11).
#include <algorithm>
#include <vector>

#include "mask_kernel.h"
#include "pool.h"
#include "primitives.h"
#include "storage_lanes.h"
#include "sums.h"

namespace merge_engine {
namespace ME_ISA {
namespace {

constexpr int DOUBLES = VECTOR_BYTES / 8;
constexpr size_t CACHED = 4096;  // numbers that stay in the first-level cache
constexpr int COLUMNS = 512;  // lines whose sums stay in the first-level cache, with the elements of a row

template <bool Exact>
ME_INLINE Doubles add_product(Doubles sum, Doubles a, Doubles b) {
    return Exact ? add_exact_product(sum, a, b) : sum + a * b;
}

// Adds the products of x with each of y to their running sums. `width` is whole groups.
template <int Y, bool Exact>
ME_INLINE void add_products(const double* x, const double* const* y, int width, LaneSum* sums) {
    for (int lane = 0; lane < GROUP; lane += 2 * DOUBLES) {
        Doubles low[Y], high[Y];
        for (int i = 0; i < Y; ++i) {
            low[i] = load<Doubles>(sums[i].lane + lane), high[i] = load<Doubles>(sums[i].lane + lane + DOUBLES);
        }
        for (int at = lane; at < width; at += GROUP) {
            const Doubles x_low = load<Doubles>(x + at), x_high = load<Doubles>(x + at + DOUBLES);
            for (int i = 0; i < Y; ++i) {
                low[i] = add_product<Exact>(low[i], x_low, load<Doubles>(y[i] + at));
                high[i] = add_product<Exact>(high[i], x_high, load<Doubles>(y[i] + at + DOUBLES));
            }
        }
        for (int i = 0; i < Y; ++i) {
            store(sums[i].lane + lane, low[i]), store(sums[i].lane + lane + DOUBLES, high[i]);
        }
    }
}

// The vectors of a chunk, a tile at a time, and the sums of their products.
template <DType Working>
class Vectors {
  public:
    Vectors(const std::vector<Array>& inputs, bool of_deltas)
        : inputs_(inputs),
          of_deltas_(of_deltas),
          size_(inputs.size() - (of_deltas ? 1 : 0)),
          run_(std::clamp<uint64_t>(CACHED / size_ / GROUP * GROUP, COLUMNS, TILE)),
          values_(size_ * run_ / GROUP),
          sums_(pairs()) {
        for (size_t i = 0; i < size_; ++i) rows_.push_back(values_[i * run_ / GROUP].value);
    }

    size_t pairs() const { return size_ * (size_ + 1) / 2; }

    // The sums over elements [first, last): element j belongs to the running sum j % SUM_LANES.
    void sum_run(uint64_t first, uint64_t last, double* sums) {
        for (LaneSum& sum : sums_) sum = {};
        for (uint64_t at = first; at < last; at += run_) {
            const int width = static_cast<int>(std::min<uint64_t>(run_, last - at));
            load_groups(at, width);
            LaneSum* sum = sums_.data();
            for (size_t i = 0; i < size_; ++i) sum = add_row(i, (width + GROUP - 1) / GROUP * GROUP, sum);
        }
        for (LaneSum& sum : sums_) *sums++ = in_order(sum).total();
    }

    // The sums of `width` neighbouring lines along the first dimension, over `rows` rows; the first elements are at `at`.
    void sum_columns(uint64_t at, uint64_t stride, uint64_t rows, int width, double* sums) {
        const int groups = (width + GROUP - 1) / GROUP * GROUP;
        columns_.assign(pairs() * COLUMNS, 0);
        for (uint64_t row = 0; row < rows; ++row) {
            load_groups(at + row * stride, width);
            double* sum = columns_.data();
            for (size_t i = 0; i < size_; ++i) {
                for (size_t k = i; k < size_; ++k, sum += COLUMNS) {
                    const double *ME_RESTRICT x = rows_[i], *ME_RESTRICT y = rows_[k];
                    double* ME_RESTRICT added = sum;
                    for (int j = 0; j < groups; ++j) added[j] += x[j] * y[j];
                }
            }
        }
        for (int j = 0; j < groups; ++j) {
            const int column = j / GROUP * GROUP + place(j % GROUP);
            if (column >= width) continue;
            for (size_t pair = 0; pair < pairs(); ++pair) {
                sums[static_cast<size_t>(column) * pairs() + pair] = columns_[pair * COLUMNS + static_cast<size_t>(j)];
            }
        }
    }

  private:
    using Bits = typename Storage<Working>::Bits;
    static constexpr bool LANED = Working != DType::F64;

    // Adds the products of vector i with those from i on.
    LaneSum* add_row(size_t i, int width, LaneSum* sum) {
        for (size_t k = i; k < size_;) {
            const size_t some = std::min<size_t>(size_ - k, 4);
            switch (some) {
                case 1: add_products<1, LANED>(rows_[i], rows_.data() + k, width, sum); break;
                case 2: add_products<2, LANED>(rows_[i], rows_.data() + k, width, sum); break;
                case 3: add_products<3, LANED>(rows_[i], rows_.data() + k, width, sum); break;
                default: add_products<4, LANED>(rows_[i], rows_.data() + k, width, sum);
            }
            k += some, sum += some;
        }
        return sum;
    }

    // Elements in the order in which vectors load them, with zeros up to a whole group.
    void load_groups(uint64_t at, int width) {
        if constexpr (LANED) {
            Bits base_room[TILE], room[TILE];
            const Bits* base = of_deltas_ ? whole_groups<Working>(inputs_[0], at, width, base_room) : nullptr;
            for (size_t i = 0; i < size_; ++i) {
                const Bits* x = whole_groups<Working>(inputs_[i + (base ? 1 : 0)], at, width, room);
                for (int group = 0; group < width; group += GROUP) {
                    widen<0>(x + group, base ? base + group : nullptr, rows_[i] + group);
                    widen<1>(x + group, base ? base + group : nullptr, rows_[i] + group);
                }
            }
        } else {
            double base[TILE];
            if (of_deltas_) load_tile<Working>(inputs_[0], at, width, base);
            for (size_t i = 0; i < size_; ++i) {
                double* ME_RESTRICT row = rows_[i];
                load_tile<Working>(inputs_[i + (of_deltas_ ? 1 : 0)], at, width, row);
                if (of_deltas_) {
                    for (int j = 0; j < width; ++j) row[j] -= base[j];
                }
                std::fill(row + width, row + (width + GROUP - 1) / GROUP * GROUP, 0.0);
            }
        }
    }

    // Half of a group.
    template <int H>
    static ME_INLINE void widen(const Bits* x, const Bits* base, double* out) {
        using Lanes = StorageLanes<Working>;
        for (int j = 0; j < HALF; j += LANES) {
            Floats value = Lanes::template load<H>(x, j);
            if (base) value = value - Lanes::template load<H>(base, j);
            store(out + H * HALF + j, low_doubles(value));
            store(out + H * HALF + j + LANES / 2, high_doubles(value));
        }
    }

    // Where an element of a group is that load_groups put into this place.
    static constexpr int place(int loaded) {
        if constexpr (LANED) {
            return StorageLanes<Working>::place(loaded);
        } else {
            return loaded;
        }
    }
    static LaneSum in_order(const LaneSum& sum) {
        LaneSum natural;
        for (int j = 0; j < GROUP; ++j) natural.lane[place(j)] = sum.lane[j];
        return natural;
    }

    const std::vector<Array>& inputs_;
    const bool of_deltas_;
    const size_t size_;
    const uint64_t run_;  // elements at a time
    struct alignas(VECTOR_BYTES) Group {
        double value[GROUP];
    };
    std::vector<Group> values_;
    std::vector<double> columns_;
    std::vector<double*> rows_;
    std::vector<LaneSum> sums_;
};

// Blocks of SUM_BLOCK elements, each cut where lines end.
template <DType Working>
void sum_runs(const std::vector<Array>& inputs, bool of_deltas, const Line& line, uint64_t start, uint64_t count,
              int threads, double* sums) {
    const uint64_t blocks = (count + SUM_BLOCK - 1) / SUM_BLOCK, most = lines_of_block(line);
    constexpr uint64_t share = BLOCK / SUM_BLOCK;
    parallel_for((blocks + share - 1) / share, threads, [&](uint64_t group, int) {
        Vectors<Working> vectors(inputs, of_deltas);
        for (uint64_t block = group * share; block < std::min(blocks, (group + 1) * share); ++block) {
            const uint64_t end = std::min(count, (block + 1) * SUM_BLOCK);
            double* written = sums + block * most * vectors.pairs();
            for (uint64_t first = block * SUM_BLOCK; first < end; written += vectors.pairs()) {
                const uint64_t rest = line.whole_tensor() ? end - first : line.length - (start + first) % line.length;
                const uint64_t last = std::min(end, first + rest);
                vectors.sum_run(first, last, written);
                first = last;
            }
        }
    });
}

// Blocks of whole rows, each cut into tiles of neighbouring lines.
template <DType Working>
void sum_columns(const std::vector<Array>& inputs, bool of_deltas, const Line& line, uint64_t count, int threads,
                 double* sums) {
    const uint64_t size = sum_block(line), blocks = (count + size - 1) / size;
    const uint64_t tiles = (line.stride + COLUMNS - 1) / COLUMNS;
    parallel_for(blocks * tiles, threads, [&](uint64_t number, int) {
        Vectors<Working> vectors(inputs, of_deltas);
        const uint64_t first = number / tiles * size, column = number % tiles * COLUMNS;
        const uint64_t rows = std::min(count - first, size) / line.stride;
        const int width = static_cast<int>(std::min<uint64_t>(COLUMNS, line.stride - column));
        double* written = sums + (number / tiles * line.stride + column) * vectors.pairs();
        vectors.sum_columns(first + column, line.stride, rows, width, written);
    });
}

}  // namespace

void gram(const std::vector<Array>& inputs, DType working, bool of_deltas, const Line& line, uint64_t start,
          uint64_t count, int threads, double* sums) {
    with_dtype(working, [&](auto dtype) {
        if (line.along_first()) {
            sum_columns<dtype()>(inputs, of_deltas, line, count, threads, sums);
        } else {
            sum_runs<dtype()>(inputs, of_deltas, line, start, count, threads, sums);
        }
    });
}

}  // namespace ME_ISA
}  // namespace merge_engine
