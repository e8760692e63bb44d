// Sums in double precision over fixed blocks, whose result depends neither on chunks nor on threads.
#pragma once

#include "pool.h"
#include "tile.h"

namespace merge_engine {
namespace ME_ISA {

// SUM_LANES interleaved running sums over one block, then added pairwise.
struct LaneSum {
    double lane[SUM_LANES] = {};

    // Adds those values. Calls for one block start at multiples of SUM_LANES.
    void add(int count, const double* values) {
        constexpr int lanes = static_cast<int>(SUM_LANES), in_vector = LANES / 2, some = 4 * in_vector;
        const int whole = count / lanes * lanes;
        for (int from = 0; from < lanes; from += some) {
            Doubles sum[4];
            std::memcpy(sum, lane + from, sizeof(sum));
            for (int j = from; j < whole; j += lanes) {
#pragma GCC unroll 4
                for (int v = 0; v < 4; ++v) sum[v] += load<Doubles>(values + j + v * in_vector);
            }
            std::memcpy(lane + from, sum, sizeof(sum));
        }
        for (int j = whole; j < count; ++j) lane[j - whole] += values[j];
    }
    double total() {
        for (uint64_t half = SUM_LANES / 2; half > 0; half /= 2) {
            for (uint64_t l = 0; l < half; ++l) lane[l] += lane[l + half];
        }
        return lane[0];
    }
};

// body(first, last, sums) writes the `width` sums of one SUM_BLOCK.
template <class Body>
void sum_blocks(uint64_t count, uint64_t width, int threads, double* sums, Body&& body) {
    const uint64_t blocks = (count + SUM_BLOCK - 1) / SUM_BLOCK;
    constexpr uint64_t share = BLOCK / SUM_BLOCK;
    parallel_for((blocks + share - 1) / share, threads, [&](uint64_t group, int) {
        for (uint64_t block = group * share; block < std::min(blocks, (group + 1) * share); ++block) {
            const uint64_t first = block * SUM_BLOCK, last = std::min(count, first + SUM_BLOCK);
            body(first, last, sums + block * width);
        }
    });
}

}  // namespace ME_ISA
}  // namespace merge_engine
