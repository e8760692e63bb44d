// Tables of magnitude keys.
#pragma once

#include <vector>

#include "edges.h"
#include "keys.h"
#include "pool.h"
#include "primitives.h"

namespace merge_engine {
namespace ME_ISA {

// Neighbouring elements count in different tables: when one key dominates, an increment would otherwise wait
// for the previous one to leave the store buffer. The tables may be one and the same.
template <DType Working, class Counter>
void count_range(const Array& base, const Array& model, int shift, uint64_t first, uint64_t last, Counter* even,
                 Counter* odd) {
    for_each_key_tile<Working>(base, model, first, last, [&](const auto* keys, int n) {
        int j = 0;
        for (; j + 1 < n; j += 2) {
            ++even[keys[j] >> shift];
            ++odd[keys[j + 1] >> shift];
        }
        if (j < n) ++even[keys[j] >> shift];
    });
}

// The same below the first level: only keys with the prefix count.
template <DType Working, class Counter>
void count_range_within(const Array& base, const KeyColumn& column, int shift, uint64_t first, uint64_t last,
                        Counter* even, Counter* odd) {
    using Real = typename RealOf<Working>::Type;
    constexpr uint64_t BINS = 1ull << NEXT_BITS;
    EdgeCounter<Working> within({column.prefix << NEXT_BITS << shift, (column.prefix + 1) << NEXT_BITS << shift});
    within.add(base, column.model, first, last, [&](const auto* magnitudes, size_t size) {
        for (size_t i = 0; i < size; ++i) {
            const uint64_t key = magnitude_key<Working>(bits_of<Real>(magnitudes[i]));
            ++(i % 2 ? odd : even)[key >> shift & (BINS - 1)];
        }
    });
}

// Adds to the counts of all columns.
template <DType Working>
void count_columns(const Array& base, const std::vector<KeyColumn>& columns, int shift, uint64_t count, int threads) {
    const auto count_in = [&](const KeyColumn& column, uint64_t first, uint64_t last, auto* even, auto* odd) {
        if (is_first_level<Working>(shift)) {
            count_range<Working>(base, column.model, shift, first, last, even, odd);
        } else {
            count_range_within<Working>(base, column, shift, first, last, even, odd);
        }
    };
    if (count <= BLOCK) {  // not worth clearing and adding up tables
        for (const KeyColumn& column : columns) count_in(column, 0, count, column.counts, column.counts);
        return;
    }
    constexpr uint64_t TABLES = 2;
    const uint64_t bins = 1ull << (is_first_level<Working>(shift) ? FIRST_BITS : NEXT_BITS);
    // 32-bit counters suffice: callers hand over chunks of less than 2^32 elements.
    std::vector<std::vector<uint32_t>> tables(static_cast<size_t>(std::max(threads, 1)));
    parallel_for((count + BLOCK - 1) / BLOCK, threads, [&](uint64_t block, int worker) {
        auto& table = tables[static_cast<size_t>(worker)];
        if (table.empty()) table.resize(bins * TABLES * columns.size());
        const uint64_t first = block * BLOCK, last = std::min(count, first + BLOCK);
        for (size_t c = 0; c < columns.size(); ++c) {
            uint32_t* even = table.data() + c * bins * TABLES;
            count_in(columns[c], first, last, even, even + bins);
        }
    });
    for (const auto& table : tables) {
        if (table.empty()) continue;
        for (size_t c = 0; c < columns.size(); ++c) {
            const uint32_t* even = table.data() + c * bins * TABLES;
            for (uint64_t bin = 0; bin < bins; ++bin) columns[c].counts[bin] += uint64_t{even[bin]} + even[bin + bins];
        }
    }
}

}  // namespace ME_ISA
}  // namespace merge_engine
