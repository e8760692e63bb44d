// Scores of positions. Steps 22 to 25 of docs/arithmetic.md.
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "../exponentials.h"
#include "primitives.h"
#include "sums.h"

namespace merge_engine {
namespace ME_ISA {
namespace {

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

void write_scores(const std::vector<Array>& inputs, const Score& score, DType working, uint64_t count, int threads,
                  void* scores) {
    with_dtype(working, [&](auto dtype) {
        using Real = typename RealOf<dtype()>::Type;
        const auto write = [&](const auto& scorer) {
            parallel_for((count + BLOCK - 1) / BLOCK, threads, [&](uint64_t block, int) {
                const uint64_t last = std::min(count, (block + 1) * BLOCK);
                for (uint64_t at = block * BLOCK; at < last; at += TILE) {
                    scorer.tile(at, static_cast<int>(std::min<uint64_t>(TILE, last - at)), static_cast<Real*>(scores) + at);
                }
            });
        };
        if (score.storage_rounding) {
            write(Scorer<dtype(), RoundedTo<dtype()>>(inputs, score));
        } else {
            write(Scorer<dtype(), Unrounded>(inputs, score));
        }
    });
}

}  // namespace ME_ISA
}  // namespace merge_engine
