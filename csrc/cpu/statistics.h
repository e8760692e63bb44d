// What is looked up in answers that were measured, and how they are added up.
#pragma once

#include <cstddef>

#include "../bands.h"

namespace merge_engine {

// The `rank`-th largest key, from 1: `counts` are those of the keys with the prefix that `within` is, by their next
// `bits`. Throws std::out_of_range when fewer keys were counted.
Found find_in_counts(const uint64_t* counts, int bits, const Found& within, uint64_t rank);

// Adds the rows of sums[rows][columns] to the totals, one after the other.
void add_in_order(const double* sums, size_t rows, double* totals, size_t columns);

// Adds the sums of some blocks of lines along the last dimension to the totals of `count` lines: sums[block][line][column],
// where a block's first line is the one that its first element belongs to. `first` is the number of the first block.
void add_to_lines(const double* sums, size_t blocks, uint64_t first, const Line& line, double* totals, size_t count,
                  size_t columns);

}  // namespace merge_engine
