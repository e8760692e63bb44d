// Rows of a matrix: gathered from a file, and their means in float64.
#pragma once

#include "../bands.h"

namespace merge_engine {

// Adds `count` rows of `width` elements to sums[width], one after the other.
void add_rows(const Array& rows, uint64_t count, uint64_t width, double* sums);

// Writes RN(sums[i] / divisor) for `width` elements.
void store_means(const double* sums, double divisor, uint64_t width, const Array& means);

// Runs of rows: run i begins at row firsts[i], ends where the next one begins, and comes from source sources[i], from
// its row starts[i] on.
struct RowRuns {
    const int64_t *firsts, *sources, *starts;
    uint64_t runs;
    int64_t rows;
};

// Fills those of `nbytes` bytes of memory, from byte `begin` of all runs on, that come from `source`: a matrix with
// `row_bytes` bytes a row from byte `position` of the file on. Returns the byte of the file where it ended too early,
// or 0. Throws std::system_error.
uint64_t read_rows(int descriptor, uint64_t position, uint64_t row_bytes, const RowRuns& from, int64_t source,
                   uint64_t begin, uint64_t nbytes, char* memory);

}  // namespace merge_engine
