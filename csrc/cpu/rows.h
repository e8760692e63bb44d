// Means of rows of a matrix, in float64.
#pragma once

#include "../bands.h"

namespace merge_engine {

// Adds `count` rows of `width` elements to sums[width], one after the other.
void add_rows(const Array& rows, uint64_t count, uint64_t width, double* sums);

// Writes RN(sums[i] / divisor) for `width` elements.
void store_means(const double* sums, double divisor, uint64_t width, const Array& means);

}  // namespace merge_engine
