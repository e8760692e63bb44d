#include "statistics.h"

#include <stdexcept>

namespace merge_engine {

Found find_in_counts(const uint64_t* counts, int bits, const Found& within, uint64_t rank) {
    uint64_t above = within.above;
    if (rank > above) {
        for (uint64_t bin = uint64_t{1} << bits; bin-- > 0; above += counts[bin]) {
            if (above + counts[bin] >= rank) return {within.key << bits | bin, above, counts[bin]};
        }
    }
    throw std::out_of_range("no key of this rank was counted");
}

void add_in_order(const double* sums, size_t rows, double* totals, size_t columns) {
    for (size_t row = 0; row < rows; ++row) {
        for (size_t column = 0; column < columns; ++column) totals[column] += sums[row * columns + column];
    }
}

}  // namespace merge_engine
