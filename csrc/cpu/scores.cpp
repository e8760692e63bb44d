// Scores of positions: their keys counted and located, and what a mask of them keeps. Steps 22 to 25 of
// docs/arithmetic.md.
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "../exponentials.h"
#include "keys.h"
#include "mask_kernel.h"
#include "primitives.h"
#include "sums.h"

namespace merge_engine {
namespace ME_ISA {
namespace {

// The dtype of the arithmetic, in whose bits scores have their keys.
template <DType Working>
constexpr DType REAL = Working == DType::F64 ? DType::F64 : DType::F32;

// Scores of a tile at a time.
template <DType Working, class Rounding>
class Scorer {
  public:
    using Real = typename RealOf<Working>::Type;

    Scorer(const std::vector<Array>& inputs, const Score& score) : inputs_(inputs), score_(score) {}

    // Of elements [at, at + n) of the chunk.
    void tile(uint64_t at, int n, Real* ME_RESTRICT scores) const {
        if (score_.kind == ScoreKind::Variance) {
            variances(at, n, scores);
        } else {
            importances(at, n, scores);
        }
        for (int j = 0; j < n; ++j) scores[j] = scores[j] != scores[j] ? Real(0) : scores[j];
    }

  private:
    // What variances are computed in: torch's choice.
    using Wide = std::conditional_t<sizeof(typename Storage<Working>::Bits) == 2, float, double>;

    using Bits = typename Storage<Working>::Bits;

    void variances(uint64_t at, int n, Real* ME_RESTRICT scores) const {
        switch (inputs_.size() - 1) {
            case 1: return variances_of<1>(at, n, scores);
            case 2: return variances_of<2>(at, n, scores);
            case 3: return variances_of<3>(at, n, scores);
            case 4: return variances_of<4>(at, n, scores);
            default: return variances_of_many(at, n, scores);
        }
    }

    // Few models: mean and squares stay in registers.
    template <size_t Models>
    void variances_of(uint64_t at, int n, Real* ME_RESTRICT scores) const {
        Bits room[Models + 1][TILE];
        const Bits* x[Models + 1];
        for (size_t i = 0; i <= Models; ++i) x[i] = tile_of<Working>(inputs_[i], at, n, room[i]);
        for (int j = 0; j < n; ++j) {
            const Real base = Storage<Working>::template load<Real>(x[0][j]);
            Wide mean = 0, squares = 0;
#pragma GCC unroll 4
            for (size_t i = 1; i <= Models; ++i) {
                add_delta(Storage<Working>::template load<Real>(x[i][j]) - base, static_cast<Wide>(i), mean, squares);
            }
            scores[j] = Rounding::round(static_cast<Real>(squares / static_cast<Wide>(Models)));
        }
    }
    void variances_of_many(uint64_t at, int n, Real* ME_RESTRICT scores) const {
        Real base[TILE], x[TILE];
        Wide mean[TILE], squares[TILE];
        load_tile<Working>(inputs_[0], at, n, base);
        for (int j = 0; j < n; ++j) mean[j] = squares[j] = 0;
        for (size_t i = 1; i < inputs_.size(); ++i) {
            load_tile<Working>(inputs_[i], at, n, x);
            for (int j = 0; j < n; ++j) add_delta(x[j] - base[j], static_cast<Wide>(i), mean[j], squares[j]);
        }
        const Wide models = static_cast<Wide>(inputs_.size() - 1);
        for (int j = 0; j < n; ++j) scores[j] = Rounding::round(static_cast<Real>(squares[j] / models));
    }

    // Welford's step for the number-th model.
    static ME_INLINE void add_delta(Real difference, Wide number, Wide& mean, Wide& squares) {
        const Wide delta = static_cast<Wide>(Rounding::round(difference));
        const Wide distance = delta - mean;
        mean += distance / number;
        squares += distance * (delta - mean);
    }

    void importances(uint64_t at, int n, Real* ME_RESTRICT scores) const {
        Bits base_room[TILE], room[TILE];
        const Bits* base = tile_of<Working>(inputs_[0], at, n, base_room);
        const Bits* x = tile_of<Working>(inputs_[1], at, n, room);
        for (int j = 0; j < n;) {
            const uint64_t line = (at + static_cast<uint64_t>(j)) / score_.length;
            const uint64_t end = std::min<uint64_t>((line + 1) * score_.length - at, static_cast<uint64_t>(n));
            const Real divergence = static_cast<Real>(score_.divergences[line]);
            for (; j < static_cast<int>(end); ++j) {
                const Real model = Storage<Working>::template load<Real>(x[j]);
                scores[j] = std::abs(model - Storage<Working>::template load<Real>(base[j])) * divergence;
            }
        }
    }

    const std::vector<Array>& inputs_;
    const Score& score_;
};

// Calls use(scorer) with the right types.
template <class Use>
void with_scorer(const std::vector<Array>& inputs, const Score& score, DType working, Use&& use) {
    with_dtype(working, [&](auto dtype) {
        if (score.storage_rounding) {
            use(Scorer<dtype(), RoundedTo<dtype()>>(inputs, score), std::integral_constant<DType, REAL<dtype()>>{});
        } else {
            use(Scorer<dtype(), Unrounded>(inputs, score), std::integral_constant<DType, REAL<dtype()>>{});
        }
    });
}

// Calls visit(keys, at, n) for each tile of elements [first, last).
template <DType Real, class Scores, class Visit>
void for_each_score_tile(const Scores& scorer, uint64_t first, uint64_t last, Visit&& visit) {
    typename Scores::Real scores[TILE];
    typename Storage<Real>::Bits keys[TILE];
    for (uint64_t at = first; at < last; at += TILE) {
        const int n = static_cast<int>(std::min<uint64_t>(TILE, last - at));
        scorer.tile(at, n, scores);
        for (int j = 0; j < n; ++j) keys[j] = magnitude_key<Real>(scores[j]);
        visit(keys, at, n);
    }
}

// Calls visit(key) for each key with these highest bits: few of many.
template <class Visit>
void for_each_with_prefix(const uint32_t* keys, int n, uint64_t prefix, int shift, Visit&& visit) {
    const uint32_t lowest = static_cast<uint32_t>(prefix << shift), width = uint32_t{1} << shift;
    int32_t those[LANES];
    int j = 0;
    for (; j + LANES <= n; j += LANES) {
        const Words found = load<Words>(keys + j);
        const Truth same = less(found - lowest, Words{} + width);
        if (!bits_of_lanes(same)) continue;
        const int size = compress(same, (Ints)found, those);
        for (int i = 0; i < size; ++i) visit(static_cast<uint32_t>(those[i]));
    }
    for (; j < n; ++j) {
        if (keys[j] - lowest < width) visit(keys[j]);
    }
}
template <class Visit>
void for_each_with_prefix(const uint64_t* keys, int n, uint64_t prefix, int shift, Visit&& visit) {
    for (int j = 0; j < n; ++j) {
        if (keys[j] >> shift == prefix) visit(keys[j]);
    }
}

template <class Body>
void for_each_block(uint64_t count, int threads, Body&& body) {
    parallel_for((count + BLOCK - 1) / BLOCK, threads, [&](uint64_t block, int worker) {
        body(block, block * BLOCK, std::min(count, (block + 1) * BLOCK), worker);
    });
}

// One line of the model and of the base, in double precision.
class LinePair {
  public:
    explicit LinePair(uint64_t length) : model_(length), base_(length) {}

    template <DType Working>
    double divergence(const Array& model, const Array& base, uint64_t first) {
        soften<Working>(model, first, model_);
        soften<Working>(base, first, base_);
        const double* q = base_.data();
        double* ME_RESTRICT p = model_.data();
        const int64_t length = static_cast<int64_t>(model_.size());
        for (int64_t j = 0; j < length; ++j) p[j] = p[j] * logarithm(p[j] / q[j]);
        const double found = sum(model_);
        return found > 0 ? found : 0;
    }

  private:
    // The softmax of a line, softened.
    template <DType Working>
    static void soften(const Array& array, uint64_t first, std::vector<double>& line) {
        constexpr int SIDE_BY_SIDE = 32;
        double largest[SIDE_BY_SIDE];
        std::fill(largest, largest + SIDE_BY_SIDE, -std::numeric_limits<double>::infinity());
        for (uint64_t at = 0; at < line.size(); at += TILE) {
            const int n = static_cast<int>(std::min<uint64_t>(TILE, line.size() - at));
            typename RealOf<Working>::Type values[TILE];
            load_tile<Working>(array, first + at, n, values);
            double* ME_RESTRICT wide = line.data() + at;
            for (int j = 0; j < n; ++j) wide[j] = values[j];
            int j = 0;
            for (; j + SIDE_BY_SIDE <= n; j += SIDE_BY_SIDE) {
                for (int k = 0; k < SIDE_BY_SIDE; ++k) largest[k] = wide[j + k] > largest[k] ? wide[j + k] : largest[k];
            }
            for (; j < n; ++j) largest[0] = wide[j] > largest[0] ? wide[j] : largest[0];
        }
        const double top = *std::max_element(largest, largest + SIDE_BY_SIDE);
        double* ME_RESTRICT powers = line.data();
        const int64_t length = static_cast<int64_t>(line.size());
        for (int64_t j = 0; j < length; ++j) powers[j] = exponential(powers[j] - top);
        const double total = sum(line);
        for (int64_t j = 0; j < length; ++j) powers[j] = powers[j] / total + SOFTENED;
    }

    // As the sum of a tensor of its own.
    static double sum(const std::vector<double>& line) {
        double total = 0;
        for (uint64_t block = 0; block < line.size(); block += SUM_BLOCK) {
            const int n = static_cast<int>(std::min<uint64_t>(SUM_BLOCK, line.size() - block));
            const double* values = line.data() + block;
            LaneSum of_block;
            of_block.add(n, [&](int j) { return values[j]; });
            total += of_block.total();
        }
        return total;
    }

    std::vector<double> model_, base_;
};

}  // namespace

void divergences(const Array& base, const Array& model, DType working, uint64_t length, uint64_t count, int threads,
                 double* found) {
    if (count == 0) return;
    const uint64_t lines = count / length, share = std::max<uint64_t>(1, BLOCK / length);
    std::vector<std::unique_ptr<LinePair>> workers(static_cast<size_t>(std::max(threads, 1)));
    with_dtype(working, [&](auto dtype) {
        parallel_for((lines + share - 1) / share, threads, [&](uint64_t group, int worker) {
            auto& own = workers[static_cast<size_t>(worker)];
            if (!own) own = std::make_unique<LinePair>(length);
            for (uint64_t line = group * share; line < std::min(lines, (group + 1) * share); ++line) {
                found[line] = own->template divergence<dtype()>(model, base, line * length);
            }
        });
    });
}

void count_scores(const std::vector<Array>& inputs, const Score& score, const std::vector<ScoreColumn>& columns,
                  DType working, int shift, uint64_t count, int threads) {
    with_scorer(inputs, score, working, [&](const auto& scorer, auto real) {
        const bool first_level = is_first_level<real()>(shift);
        const uint64_t bins = 1ull << (first_level ? FIRST_BITS : NEXT_BITS);
        // 32-bit counters suffice: callers hand over chunks of less than 2^32 elements. Neighbours count apart.
        std::vector<std::vector<uint32_t>> tables(static_cast<size_t>(std::max(threads, 1)));
        for_each_block(count, threads, [&](uint64_t, uint64_t first, uint64_t last, int worker) {
            auto& table = tables[static_cast<size_t>(worker)];
            if (table.empty()) table.resize(2 * bins * columns.size());
            for_each_score_tile<real()>(scorer, first, last, [&](const auto* keys, uint64_t, int n) {
                for (size_t c = 0; c < columns.size(); ++c) {
                    uint32_t* even = table.data() + 2 * bins * c;
                    uint32_t* odd = even + bins;
                    if (first_level) {
                        for (int j = 0; j < n; ++j) ++(j % 2 ? odd : even)[keys[j] >> shift];
                        continue;
                    }
                    for_each_with_prefix(keys, n, columns[c].prefix, shift + NEXT_BITS,
                                         [&](uint64_t key) { ++even[key >> shift & (bins - 1)]; });
                }
            });
        });
        for (const auto& table : tables) {
            if (table.empty()) continue;
            for (size_t c = 0; c < columns.size(); ++c) {
                const uint32_t* even = table.data() + 2 * bins * c;
                for (uint64_t bin = 0; bin < bins; ++bin) {
                    columns[c].counts[bin] += uint64_t{even[bin]} + even[bins + bin];
                }
            }
        }
    });
}

uint64_t locate_score(const std::vector<Array>& inputs, const Score& score, DType working, uint64_t key, uint64_t nth,
                      uint64_t count, int threads, int64_t* offset) {
    std::vector<uint64_t> found((count + BLOCK - 1) / BLOCK);
    *offset = -1;
    uint64_t total = 0;
    with_scorer(inputs, score, working, [&](const auto& scorer, auto real) {
        for_each_block(count, threads, [&](uint64_t block, uint64_t first, uint64_t last, int) {
            for_each_score_tile<real()>(scorer, first, last, [&](const auto* keys, uint64_t, int n) {
                int equal = 0;
                for (int j = 0; j < n; ++j) equal += keys[j] == key;
                found[block] += static_cast<uint64_t>(equal);
            });
        });
        for (size_t block = 0; block < found.size(); total += found[block++]) {
            if (nth < total || nth >= total + found[block]) continue;
            uint64_t rank = total;
            const uint64_t first = block * BLOCK, last = std::min(count, first + BLOCK);
            for_each_score_tile<real()>(scorer, first, last, [&](const auto* keys, uint64_t at, int n) {
                for (int j = 0; j < n; ++j) {
                    if (keys[j] == key && rank++ == nth) *offset = static_cast<int64_t>(at) + j;
                }
            });
        }
    });
    return total;
}

void note_scores(const std::vector<Array>& inputs, const Score& score, const Mask& mask, DType working, uint64_t start,
                 uint64_t count, int threads, uint64_t* notes) {
    with_scorer(inputs, score, working, [&](const auto& scorer, auto real) {
        using Real = typename std::decay_t<decltype(scorer)>::Real;
        const MaskKernel<real()> kernel(mask);
        static constexpr Real zeros[TILE] = {};
        for_each_block(count, threads, [&](uint64_t, uint64_t first, uint64_t last, int) {
            Real scores[TILE] = {};
            for (uint64_t at = first; at < last; at += TILE) {
                const int n = static_cast<int>(std::min<uint64_t>(TILE, last - at));
                if (n < TILE) std::fill(scores, scores + TILE, Real(0));  // whole groups are read
                scorer.tile(at, n, scores);
                TileBits kept;
                if constexpr (real() == DType::F32) {
                    typename Storage<real()>::Bits bits[TILE];
                    static constexpr typename Storage<real()>::Bits base[TILE] = {};
                    std::memcpy(bits, scores, sizeof(bits));
                    Ints largest = {};
                    kernel.keep(bits, base, start + at, 0, n, kept, largest);  // in natural order
                } else {
                    Real deltas[TILE];
                    uint32_t stays[TILE];
                    kernel.template read<Unrounded>({scores, real()}, zeros, start + at, 0, n, deltas, stays);
                    kept = bits_where(n, [&](int j) { return less(Words{}, load<Words>(stays + j)); });
                }
                note(kept, at, notes);
            }
        });
    });
}

}  // namespace ME_ISA
}  // namespace merge_engine
