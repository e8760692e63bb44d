// Histograms of magnitude keys, and the search for one key's n-th occurrence.
#include <algorithm>
#include <type_traits>

#include "pool.h"
#include "primitives.h"
#include "search.h"
#include "tile.h"

namespace merge_engine {
namespace ME_ISA {
namespace {

// Calls visit(keys, count) for each tile of elements [first, last).
template <DType Working, class Visit>
void for_each_key_tile(const Array& base, const Array& model, uint64_t first, uint64_t last, Visit&& visit) {
    using Real = typename RealOf<Working>::Type;
    Real b[TILE], x[TILE];
    typename Storage<Working>::Bits keys[TILE];  // narrow: what follows reads them one by one
    for (uint64_t at = first; at < last; at += TILE) {
        const int count = static_cast<int>(std::min<uint64_t>(TILE, last - at));
        load_tile<Working>(base, at, count, b);
        load_tile<Working>(model, at, count, x);
        for (int j = 0; j < count; ++j) keys[j] = magnitude_key<Working>(x[j] - b[j]);
        visit(keys, count);
    }
}

// Neighbouring elements count in different tables: when one key dominates, an increment would otherwise wait
// for the previous one to leave the store buffer. The tables may be one and the same.
template <DType Working, class Counter>
void count_keys(const Array& base, const Column& column, int shift, bool first_level, uint64_t first, uint64_t last,
                Counter* even, Counter* odd) {
    for_each_key_tile<Working>(base, column.model, first, last, [&](const auto* keys, int n) {
        if (first_level) {
            int j = 0;
            for (; j + 1 < n; j += 2) {
                ++even[keys[j] >> shift];
                ++odd[keys[j + 1] >> shift];
            }
            if (j < n) ++even[keys[j] >> shift];
        } else {
            constexpr uint64_t bins = 1ull << NEXT_BITS;
            for (int j = 0; j < n; ++j) {
                const uint64_t bin = static_cast<uint64_t>(keys[j]) >> shift;
                if (bin >> NEXT_BITS == column.prefix) ++even[bin & (bins - 1)];
            }
        }
    });
}

constexpr uint64_t WORTH_SEARCHING = 4 * BLOCK;

template <DType Working>
void histogram_of(const Array& base, const std::vector<Column>& columns, int shift, uint64_t count, int threads) {
    constexpr int key_bits = 8 * sizeof(typename Storage<Working>::Bits) - 1;
    const bool first_level = shift + FIRST_BITS == key_bits;
    if (count <= BLOCK) {  // not worth clearing and adding up tables
        for (const Column& c : columns) count_keys<Working>(base, c, shift, first_level, 0, count, c.counts, c.counts);
        return;
    }
    const bool ranks_known =
        std::none_of(columns.begin(), columns.end(), [](const Column& c) { return c.ranks.empty(); });
    if (first_level && ranks_known && count >= WORTH_SEARCHING) {
        if (search_ranks<Working>(base, columns, shift, count, threads)) return;
    }
    constexpr uint64_t TABLES = 2;
    const uint64_t bins = 1ull << (first_level ? FIRST_BITS : NEXT_BITS);
    // 32-bit counters suffice: callers hand over chunks of less than 2^32 elements.
    std::vector<std::vector<uint32_t>> tables(static_cast<size_t>(std::max(threads, 1)));
    parallel_for((count + BLOCK - 1) / BLOCK, threads, [&](uint64_t block, int worker) {
        auto& table = tables[static_cast<size_t>(worker)];
        if (table.empty()) table.resize(bins * TABLES * columns.size());
        const uint64_t first = block * BLOCK, last = std::min(count, first + BLOCK);
        for (size_t c = 0; c < columns.size(); ++c) {
            uint32_t* even = table.data() + c * bins * TABLES;
            count_keys<Working>(base, columns[c], shift, first_level, first, last, even, even + bins);
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

}  // namespace

void histogram(const Array& base, const std::vector<Column>& columns, DType working, int shift, uint64_t count,
               int threads) {
    with_dtype(working, [&](auto dtype) { histogram_of<dtype()>(base, columns, shift, count, threads); });
}

uint64_t locate(const Array& base, const Array& model, DType working, uint64_t key, uint64_t nth, uint64_t count,
                int threads, int64_t* offset) {
    const uint64_t blocks = (count + BLOCK - 1) / BLOCK;
    std::vector<uint64_t> found(blocks);
    *offset = -1;
    with_dtype(working, [&](auto dtype) {
        parallel_for(blocks, threads, [&](uint64_t block, int) {
            const uint64_t first = block * BLOCK, last = std::min(count, first + BLOCK);
            for_each_key_tile<dtype()>(base, model, first, last, [&](const auto* keys, int n) {
                int equal = 0;
                for (int j = 0; j < n; ++j) equal += keys[j] == key;
                found[block] += static_cast<uint64_t>(equal);
            });
        });
        uint64_t before = 0;
        for (uint64_t block = 0; block < blocks && *offset < 0; before += found[block++]) {
            if (nth >= before + found[block]) continue;
            const uint64_t first = block * BLOCK, last = std::min(count, first + BLOCK);
            uint64_t at = first, rank = before;
            for_each_key_tile<dtype()>(base, model, first, last, [&](const auto* keys, int n) {
                for (int j = 0; j < n; ++j, ++at) {
                    if (keys[j] == key && rank++ == nth) *offset = static_cast<int64_t>(at);
                }
            });
        }
    });
    uint64_t total = 0;
    for (uint64_t in_block : found) total += in_block;
    return total;
}

}  // namespace ME_ISA
}  // namespace merge_engine
