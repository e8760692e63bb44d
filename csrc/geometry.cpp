#include "geometry.h"

#include <algorithm>
#include <cmath>

#include "angles.h"

namespace merge_engine {
namespace {

// A square below this share of what it was made of is rounding error.
constexpr double NOTHING = 1e-13;

// So near to -1 a cosine is that of opposite vectors: no shortest way leads from one to the other.
constexpr double OPPOSITE = -1 + 0x1p-40;

// Rounds the result of a step.
class Steps {
  public:
    explicit Steps(StepType type) : type_(type) {}
    double operator()(double value) const {
        if (!type_) return value;
        switch (*type_) {
            case DType::BF16: return RoundedTo<DType::BF16>::round(value);
            case DType::F16: return RoundedTo<DType::F16>::round(value);
            case DType::F32: return RoundedTo<DType::F32>::round(value);
            default: return value;
        }
    }
    bool exact() const { return !type_; }

  private:
    StepType type_;
};

double clamped(double cosine) { return cosine > 1 ? 1 : cosine < -1 ? -1 : cosine; }  // NaN stays

// x.y / (|x| |y|). One root of the product gives exactly 1 for equal and -1 for opposite vectors.
double cosine_between(double xx, double xy, double yy) {
    const double squares = xx * yy;
    const bool in_range = squares > 1e-280 && squares < 1e280;
    return clamped(in_range ? xy / std::sqrt(squares) : xy / std::sqrt(xx) / std::sqrt(yy));
}

Arc straight(double t) { return {{1 - t, t}, 1}; }

Arc curved(double cosine, double t, const Steps& rn) {
    const double angle = rn(arc_cosine(cosine));
    return {{rn(sine(rn(rn(1 - t) * angle))), rn(sine(rn(t * angle)))}, rn(sine(angle))};
}

void divide(const Arc& arc, const Steps& rn, double* coefficients) {
    for (int i = 0; i < 2; ++i) coefficients[i] = rn(arc.shares[i] / arc.divisor);
}

// A symmetric matrix of which the pairs i <= j are stored row by row.
class Symmetric {
  public:
    Symmetric(const double* pairs, size_t n) : pairs_(pairs), n_(n) {}
    double operator()(size_t i, size_t j) const {
        if (i > j) std::swap(i, j);
        return pairs_[i * n_ - i * (i + 1) / 2 + j];
    }
    size_t size() const { return n_; }

  private:
    const double* pairs_;
    size_t n_;
};

size_t pairs_of(size_t n) { return n * (n + 1) / 2; }

// The matrix times a vector.
std::vector<double> multiplied(const Symmetric& matrix, const std::vector<double>& vector) {
    std::vector<double> result(vector.size());
    for (size_t i = 0; i < vector.size(); ++i) {
        for (size_t j = 0; j < vector.size(); ++j) result[i] += matrix(i, j) * vector[j];
    }
    return result;
}

// The length of the combination with these coefficients.
double length_of(const Symmetric& products, const std::vector<double>& coefficients) {
    const std::vector<double> rows = multiplied(products, coefficients);
    double square = 0;
    for (size_t i = 0; i < rows.size(); ++i) square += coefficients[i] * rows[i];
    return std::sqrt(square < 0 ? 0 : square);
}

void karcher_mean(const Symmetric& products, int max_iterations, double tolerance, double* coefficients) {
    const size_t n = products.size();
    std::vector<double> norms(n);
    std::vector<size_t> used;  // what is as short has no direction
    double mean_norm = 0;
    for (size_t i = 0; i < n; ++i) {
        norms[i] = std::sqrt(products(i, i));
        mean_norm += norms[i] / static_cast<double>(n);
        coefficients[i] = 0;
        if (norms[i] > tolerance) used.push_back(i);
    }
    if (used.empty()) return;
    const size_t k = used.size();
    std::vector<double> cosines;
    for (size_t i = 0; i < k; ++i) {
        for (size_t j = i; j < k; ++j) {
            const size_t x = used[i], y = used[j];
            cosines.push_back(i == j ? 1 : cosine_between(products(x, x), products(x, y), products(y, y)));
        }
    }
    const Symmetric units(cosines.data(), k);
    const double share = 1 / static_cast<double>(k);
    std::vector<double> mean(k, share);
    double length = length_of(units, mean);
    if (length < tolerance || length == 0) {
        mean.assign(k, 0);
        mean[0] = 1;
    } else {
        for (double& part : mean) part /= length;
    }
    for (int turn = 0; turn < max_iterations; ++turn) {
        const std::vector<double> dots = multiplied(units, mean);
        std::vector<double> tangent(k);
        double along = 0;  // of the mean, what the unit vectors have of it
        for (size_t i = 0; i < k; ++i) {
            const double dot = clamped(dots[i]), angle = arc_cosine(dot);
            if (angle < tolerance || dot < OPPOSITE) continue;
            const double factor = share * (angle / sine(angle));
            tangent[i] = factor;
            along += factor * dot;
        }
        for (size_t i = 0; i < k; ++i) tangent[i] -= along * mean[i];
        length = length_of(units, tangent);
        if (length < tolerance || length == 0) break;
        const double stay = cosine(length), step = sine(length) / length;
        for (size_t i = 0; i < k; ++i) mean[i] = stay * mean[i] + step * tangent[i];
        length = length_of(units, mean);
        if (length > tolerance) {
            for (double& part : mean) part /= length;
        }
    }
    for (size_t i = 0; i < k; ++i) coefficients[used[i]] = mean_norm * mean[i] / norms[used[i]];
}

}  // namespace

void slerp(const double* products, size_t lines, double t, StepType steps, double* coefficients) {
    constexpr double SHORTEST = 1e-8, NEARLY_PARALLEL = 0.9995;
    const Steps rn(steps);
    for (size_t line = 0; line < lines; ++line, products += 3, coefficients += 2) {
        const double norms[] = {rn(std::sqrt(products[0])), rn(std::sqrt(products[2]))};
        double cosine = 0;
        if (norms[0] > SHORTEST && norms[1] > SHORTEST) {
            cosine = cosine_between(products[0], products[1], products[2]);
        } else {
            cosine = products[1] / (norms[0] > SHORTEST ? norms[0] : 1) / (norms[1] > SHORTEST ? norms[1] : 1);
        }
        cosine = rn(clamped(cosine));
        divide(std::fabs(cosine) > NEARLY_PARALLEL ? straight(rn(t)) : curved(cosine, rn(t), rn), rn, coefficients);
    }
}

Arc nuslerp_arc(const double* products, double t, StepType steps) {
    constexpr double SHORTEST = 1e-7;
    const Steps rn(steps);
    const double norms[] = {rn(std::sqrt(products[0])), rn(std::sqrt(products[2]))};
    double cosine = 0;
    if (norms[0] > SHORTEST && norms[1] > SHORTEST) {
        cosine = cosine_between(products[0], products[1], products[2]);
    } else {
        cosine = products[1] / (std::max(norms[0], SHORTEST) * std::max(norms[1], SHORTEST));
    }
    cosine = rn(clamped(cosine));
    return rn(1 - rn(cosine * cosine)) <= NOTHING ? straight(t) : curved(cosine, t, rn);
}

void nuslerp(const double* products, size_t lines, double t, StepType steps, double* coefficients) {
    for (size_t line = 0; line < lines; ++line, products += 3, coefficients += 2) {
        divide(nuslerp_arc(products, t, steps), Steps(steps), coefficients);
    }
}

bool multislerp(const double* products, size_t lines, const std::vector<double>& weights, double epsilon,
                double* coefficients) {
    const size_t n = weights.size();
    for (size_t line = 0; line < lines; ++line, products += pairs_of(n), coefficients += n) {
        const Symmetric matrix(products, n);
        std::vector<double> parts(n);
        double reach = 0, mean_norm = 0;
        for (size_t i = 0; i < n; ++i) {
            const double norm = std::sqrt(matrix(i, i));
            parts[i] = norm > 0 ? weights[i] / (norm + epsilon) : 0;
            reach += std::fabs(parts[i]) * norm;
            mean_norm += weights[i] * norm;
        }
        const double length = length_of(matrix, parts);
        const bool none = length < epsilon || length == 0 || length * length <= NOTHING * reach * reach;
        if (none && n > 2 && reach > 0) return false;
        const double scale = cosine(epsilon) * mean_norm / length;
        for (size_t i = 0; i < n; ++i) coefficients[i] = none ? weights[i] : scale * parts[i];
    }
    return true;
}

void karcher(const double* products, size_t lines, size_t n, int max_iterations, double tolerance,
             double* coefficients) {
    for (size_t line = 0; line < lines; ++line, products += pairs_of(n), coefficients += n) {
        karcher_mean(Symmetric(products, n), max_iterations, tolerance, coefficients);
    }
}

void model_stock(const double* products, size_t lines, size_t n, double least_product, StepType steps,
                 double* coefficients) {
    constexpr double SINGULAR = 1e-6;
    const Steps rn(steps);
    const double k = static_cast<double>(n);
    for (size_t line = 0; line < lines; ++line, products += pairs_of(n), coefficients += n) {
        const Symmetric matrix(products, n);
        double cosines = 0;
        for (size_t i = 0; i < n; ++i) {
            for (size_t j = i + 1; j < n; ++j) {
                const double norms[] = {rn(std::sqrt(matrix(i, i))), rn(std::sqrt(matrix(j, j)))};
                const double product = rn(norms[0] * norms[1]);
                if (product == 0 && least_product == 0) continue;  // no direction: a right angle to all others
                const double cosine = rn.exact() && product > least_product
                                          ? cosine_between(matrix(i, i), matrix(i, j), matrix(j, j))
                                          : rn(matrix(i, j)) / std::max(product, least_product);
                cosines += rn(clamped(cosine));
            }
        }
        const double cosine = rn(cosines / static_cast<double>(pairs_of(n) - n));
        const double denominator = rn(1 + rn((k - 1) * cosine));
        const double share = std::fabs(denominator) < SINGULAR ? 0 : rn(rn(k * cosine) / denominator);
        for (size_t i = 0; i < n; ++i) coefficients[i] = share / k;
    }
}

}  // namespace merge_engine
