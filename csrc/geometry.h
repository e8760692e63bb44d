// The geometry of vectors of which only the inner products are known: from a Gram matrix to a linear combination.
//
// Each function takes the inner products of some lines, [lines][pairs] with the pairs i <= j of n vectors row by row, and
// writes the coefficients of the vectors, [lines][n]. All numbers are double. Operations are those of IEEE 754 and those
// of angles.h, so every machine computes the same bits. The formulas are in docs/arithmetic.md, steps 15 to 19.
#pragma once

#include <cstddef>
#include <optional>
#include <vector>

#include "numeric.h"

namespace merge_engine {

// What the result of each step is rounded to, as mergekit does; std::nullopt: to nothing.
using StepType = std::optional<DType>;

// Step 15: spherical interpolation of two vectors by the share t of the second.
void slerp(const double* products, size_t lines, double t, StepType steps, double* coefficients);

// Two vectors' shares of a point on the arc between them: to be divided by the divisor.
struct Arc {
    double shares[2], divisor;
};

// Step 16: the same, with another rule for vectors that are nearly parallel.
Arc nuslerp_arc(const double* products, double t, StepType steps);
void nuslerp(const double* products, size_t lines, double t, StepType steps, double* coefficients);

// Step 17. False where the directions cancel out, so that there is no mean.
bool multislerp(const double* products, size_t lines, const std::vector<double>& weights, double epsilon,
                double* coefficients);

// Step 18.
void karcher(const double* products, size_t lines, size_t n, int max_iterations, double tolerance,
             double* coefficients);

// Step 19. Products of norms count as at least `least_product`.
void model_stock(const double* products, size_t lines, size_t n, double least_product, StepType steps,
                 double* coefficients);

}  // namespace merge_engine
