#include "rows.h"

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

}  // namespace merge_engine
