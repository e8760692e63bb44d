#include "rows.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "ieee.h"

namespace merge_engine {
namespace {

template <DType D>
void add_rows_of(const void* data, uint64_t count, uint64_t width, double* sums) {
    const auto* rows = static_cast<const typename Storage<D>::Bits*>(data);
    for (uint64_t row = 0; row < count; ++row, rows += width) {
        for (uint64_t i = 0; i < width; ++i) sums[i] += Storage<D>::template load<double>(rows[i]);
    }
}

template <DType D>
void store_means_of(const double* sums, double divisor, uint64_t width, void* data) {
    auto* means = static_cast<typename Storage<D>::Bits*>(data);
    for (uint64_t i = 0; i < width; ++i) means[i] = Storage<D>::store(sums[i] / divisor);
}

}  // namespace

void add_rows(const Array& rows, uint64_t count, uint64_t width, double* sums) {
    const IeeeArithmetic ieee;
    switch (rows.dtype) {
        case DType::BF16: return add_rows_of<DType::BF16>(rows.data, count, width, sums);
        case DType::F16: return add_rows_of<DType::F16>(rows.data, count, width, sums);
        case DType::F32: return add_rows_of<DType::F32>(rows.data, count, width, sums);
        case DType::F64: return add_rows_of<DType::F64>(rows.data, count, width, sums);
    }
}

void store_means(const double* sums, double divisor, uint64_t width, const Array& means) {
    const IeeeArithmetic ieee;
    switch (means.dtype) {
        case DType::BF16: return store_means_of<DType::BF16>(sums, divisor, width, means.data);
        case DType::F16: return store_means_of<DType::F16>(sums, divisor, width, means.data);
        case DType::F32: return store_means_of<DType::F32>(sums, divisor, width, means.data);
        case DType::F64: return store_means_of<DType::F64>(sums, divisor, width, means.data);
    }
}

uint64_t read_rows(int descriptor, uint64_t position, uint64_t row_bytes, const RowRuns& from, int64_t source,
                   uint64_t begin, uint64_t nbytes, char* memory) {
    const uint64_t end = begin + nbytes;
    const int64_t row = static_cast<int64_t>(begin / row_bytes);
    const int64_t* after = std::upper_bound(from.firsts, from.firsts + from.runs, row);
    for (uint64_t run = static_cast<uint64_t>(std::max<int64_t>(after - from.firsts - 1, 0)); run < from.runs; ++run) {
        const uint64_t run_begin = static_cast<uint64_t>(from.firsts[run]) * row_bytes;
        if (run_begin >= end) break;
        if (from.sources[run] != source) continue;
        const int64_t next = run + 1 < from.runs ? from.firsts[run + 1] : from.rows;
        uint64_t first = std::max(run_begin, begin);
        const uint64_t last = std::min(static_cast<uint64_t>(next) * row_bytes, end);
        uint64_t at = position + static_cast<uint64_t>(from.starts[run]) * row_bytes + (first - run_begin);
        while (first < last) {
            const ssize_t got = pread(descriptor, memory + (first - begin), last - first, static_cast<off_t>(at));
            if (got == 0) return at;
            if (got < 0 && errno != EINTR) throw std::system_error(errno, std::generic_category());
            if (got > 0) first += static_cast<uint64_t>(got), at += static_cast<uint64_t>(got);
        }
    }
    return 0;
}

}  // namespace merge_engine
