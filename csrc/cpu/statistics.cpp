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

void add_to_lines(const double* sums, size_t blocks, uint64_t first, const Line& line, double* totals, size_t count,
                  size_t columns) {
    const uint64_t most = lines_of_block(line);
    for (uint64_t block = first; block < first + blocks; ++block, sums += most * columns) {
        const uint64_t behind = (block + 1) * SUM_BLOCK, number = block * SUM_BLOCK / line.length;
        for (uint64_t i = 0; i < most && number + i < count && (number + i) * line.length < behind; ++i) {
            double* total = totals + (number + i) * columns;
            for (size_t column = 0; column < columns; ++column) total[column] += sums[i * columns + column];
        }
    }
}

}  // namespace merge_engine
