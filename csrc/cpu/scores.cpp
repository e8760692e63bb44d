// Scores of positions. Steps 22 to 25 of docs/arithmetic.md.
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "../exponentials.h"
#include "primitives.h"
#include "quotient.h"
#include "sums.h"

namespace merge_engine {
namespace ME_ISA {
namespace {

// Scores, in the dtype of the arithmetic.
template <DType Working, class Rounding>
class Scorer : public Computed {
  public:
    Scorer(const std::vector<Array>& inputs, const Score& score) : inputs_(inputs), score_(score) {}

    const void* read(uint64_t at, int n, void* room) const override {
        Real* ME_RESTRICT scores = static_cast<Real*>(room);
        if (score_.kind == ScoreKind::Variance) {
            variances(at, n, scores);
        } else {
            importances(at, n, scores);
        }
        for (int j = 0; j < n; ++j) scores[j] = scores[j] != scores[j] ? Real(0) : scores[j];
        return room;
    }

  private:
    using Real = typename RealOf<Working>::Type;
    // What variances are computed in: torch's choice.
    using Wide = std::conditional_t<sizeof(typename Storage<Working>::Bits) == 2, float, double>;

    using Bits = typename Storage<Working>::Bits;

    // In double, quotients of float are far from underflow: a model adds at most 56 binary places to the 150 of float.
    static constexpr size_t FUSED = 12;  // models at most
#if defined(__FMA__)
    static constexpr bool FUSES = Working == DType::F32;
#else
    static constexpr bool FUSES = false;
#endif

    // Up to four models at a time, whose means and squares stay in registers.
    void variances(uint64_t at, int n, Real* ME_RESTRICT scores) const {
        const size_t models = inputs_.size() - 1;
        Wide mean[TILE], squares[TILE];
        Bits room[TILE];
        const Bits* base = tile_of<Working>(inputs_[0], at, n, room);
        for (size_t first = 1; first <= models; first += 4) {
            switch (std::min<size_t>(models + 1 - first, 4)) {
                case 1: add_models<1>(first, base, at, n, mean, squares); break;
                case 2: add_models<2>(first, base, at, n, mean, squares); break;
                case 3: add_models<3>(first, base, at, n, mean, squares); break;
                default: add_models<4>(first, base, at, n, mean, squares);
            }
        }
        const Wide number = static_cast<Wide>(models), inverse = 1 / number;
        if (FUSES && models <= FUSED) {  // squares that are too small for it are rounded to 0
            for (int j = 0; j < n; ++j) squares[j] = quotient(squares[j], number, inverse);
        } else {
            for (int j = 0; j < n; ++j) squares[j] /= number;
        }
        for (int j = 0; j < n; ++j) scores[j] = Rounding::round(static_cast<Real>(squares[j]));
    }
    template <size_t Models>
    void add_models(size_t first, const Bits* base, uint64_t at, int n, Wide* means, Wide* all_squares) const {
        if (first == 1) return add_models_as<Models, FUSES, true>(first, base, at, n, means, all_squares);
        if (first + Models - 1 > FUSED) return add_models_as<Models, false, false>(first, base, at, n, means, all_squares);
        add_models_as<Models, FUSES, false>(first, base, at, n, means, all_squares);
    }
    template <size_t Models, bool Fused, bool First>
    void add_models_as(size_t first, const Bits* ME_RESTRICT base, uint64_t at, int n, Wide* ME_RESTRICT means,
                    Wide* ME_RESTRICT all_squares) const {
        Bits room[Models][TILE];
        const Bits* x[Models];
        Wide number[Models], inverse[Models];
        for (size_t i = 0; i < Models; ++i) {
            x[i] = tile_of<Working>(inputs_[first + i], at, n, room[i]);
            number[i] = static_cast<Wide>((First ? 1 : first) + i), inverse[i] = 1 / number[i];
        }
        for (int j = 0; j < n; ++j) {
            const Real b = Storage<Working>::template load<Real>(base[j]);
            Wide mean = First ? 0 : means[j], squares = First ? 0 : all_squares[j];
#pragma GCC unroll 4
            for (size_t i = 0; i < Models; ++i) {  // Welford's step
                const Wide delta = static_cast<Wide>(Rounding::round(Storage<Working>::template load<Real>(x[i][j]) - b));
                const Wide distance = delta - mean;
                mean += Fused ? quotient(distance, number[i], inverse[i]) : distance / number[i];
                squares += distance * (delta - mean);
            }
            means[j] = mean, all_squares[j] = squares;
        }
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

    const std::vector<Array> inputs_;
    const Score score_;
};

// One line of the model and of the base, in double precision.
class LinePair {
  public:
    explicit LinePair(uint64_t length) : model_(length), base_(length) {}

    template <DType Working>
    double divergence(const Array& model, const Array& base, uint64_t first) {
        const Divisor of_model{raise<Working>(model, first, model_)}, of_base{raise<Working>(base, first, base_)};
        for (uint64_t at = 0; at < model_.size(); at += TILE) {  // two loops, so that divisions overlap
            const int n = static_cast<int>(std::min<uint64_t>(TILE, model_.size() - at));
            double* ME_RESTRICT p = model_.data() + at;
            double* ME_RESTRICT ratio = base_.data() + at;
            for (int j = 0; j < n; ++j) {
                p[j] = of_model.divide(p[j]) + SOFTENED;
                ratio[j] = p[j] / (of_base.divide(ratio[j]) + SOFTENED);
            }
            for (int j = 0; j < n; ++j) p[j] *= logarithm(ratio[j]);
        }
        const double found = sum(model_);
        return found > 0 ? found : 0;
    }

  private:
    // Divides by the same number again and again. The first step leaves less than a unit in the last place, so that the
    // second one rounds as a division does (Markstein 1990); of quotients so small that it does not, SOFTENED leaves nothing.
    struct Divisor {
        explicit Divisor(double of) : number(of), inverse(1 / of) {}
        ME_INLINE double divide(double x) const {
            const double near = quotient(x, number, inverse);
#if defined(__FMA__)
            return __builtin_fma(__builtin_fma(-near, number, x), inverse, near);
#else
            return near;
#endif
        }
        double number, inverse;
    };

    // Powers of e that are proportional to the softmax of a line. Returns their sum.
    template <DType Working>
    static double raise(const Array& array, uint64_t first, std::vector<double>& line) {
        using Real = typename RealOf<Working>::Type;
        using Reals = std::conditional_t<sizeof(Real) == 8, Doubles, Floats>;
        constexpr int SIDE_BY_SIDE = VECTOR_BYTES / sizeof(Real);
        constexpr Real infinity = std::numeric_limits<Real>::infinity();
        Reals largest = Reals{} - infinity, smallest = Reals{} + infinity;
        for (uint64_t at = 0; at < line.size(); at += TILE) {
            const int n = static_cast<int>(std::min<uint64_t>(TILE, line.size() - at));
            Real values[TILE];
            load_tile<Working>(array, first + at, n, values);
            for (int j = n; j % SIDE_BY_SIDE; ++j) values[j] = values[0];
            for (int j = 0; j < n; j += SIDE_BY_SIDE) {
                const Reals x = load<Reals>(values + j);
                largest = x > largest ? x : largest;
                smallest = x < smallest ? x : smallest;
            }
            double* ME_RESTRICT wide = line.data() + at;
            for (int j = 0; j < n; ++j) wide[j] = values[j];
        }
        Real top = -infinity, bottom = infinity;
        for (int k = 0; k < SIDE_BY_SIDE; ++k) top = std::max(top, largest[k]), bottom = std::min(bottom, smallest[k]);
        double* ME_RESTRICT powers = line.data();
        const int64_t length = static_cast<int64_t>(line.size());
        if (double{bottom} - top > NEAR_ZERO) {  // as in most lines of weights
            for (int64_t j = 0; j < length; ++j) powers[j] = exponential_near_zero(powers[j] - top);
        } else {
            for (int64_t j = 0; j < length; ++j) powers[j] = exponential(powers[j] - top);
        }
        return sum(line);
    }

    // As the sum of a tensor of its own.
    static double sum(const std::vector<double>& line) {
        double total = 0;
        for (uint64_t block = 0; block < line.size(); block += SUM_BLOCK) {
            const int n = static_cast<int>(std::min<uint64_t>(SUM_BLOCK, line.size() - block));
            LaneSum of_block;
            of_block.add(n, line.data() + block);
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

std::unique_ptr<const Computed> scores(const std::vector<Array>& inputs, const Score& score, DType working) {
    std::unique_ptr<const Computed> made;
    with_dtype(working, [&](auto dtype) {
        if (score.storage_rounding) {
            made = std::make_unique<Scorer<dtype(), RoundedTo<dtype()>>>(inputs, score);
        } else {
            made = std::make_unique<Scorer<dtype(), Unrounded>>(inputs, score);
        }
    });
    return made;
}

const Computed& zeros() {
    class Zeros : public Computed {
        const void* read(uint64_t, int, void*) const override {
            static constexpr double tile[TILE] = {};
            return tile;
        }
    };
    static const Zeros zeros;
    return zeros;
}

}  // namespace ME_ISA
}  // namespace merge_engine
