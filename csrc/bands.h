// From ranks to masks: which keys a trim keeps, and what becomes of the ties at its thresholds.
//
// Integers throughout, so that a device can solve its own thresholds without asking the host. Steps 3 and 4 of
// docs/arithmetic.md.
#pragma once

#include "operations.h"

namespace merge_engine {

// A key found by its rank: how many keys are larger, and how many equal.
struct Found {
    uint64_t key, above, equal;
};

// Keeps the magnitudes of descending rank first to last, from 1. `spread` decides ties by draws, otherwise they
// stay at the given positions; `every_tie` says that these are all there are.
struct RankBand {
    uint64_t first, last;
    double slack;
    bool has_high, spread, every_tie;
    Range low_positions, high_positions;
    uint64_t random_key;
};

struct SolvedBand {
    Mask mask;
    uint64_t kept_without_slack;
};


// The draws below floor(2^32 * kept / equal), by long division: the product may exceed 64 bits.
ME_INLINE Range share_of_draws(uint64_t kept, uint64_t equal) {
    if (kept >= equal) return {0, 0xFFFFFFFFull};
    uint64_t below = 0, remainder = kept;
    for (int bit = 0; bit < 32; ++bit) {
        remainder <<= 1;
        below <<= 1;
        if (remainder >= equal) remainder -= equal, below |= 1;
    }
    return below ? Range{0, below - 1} : Range{1, 0};
}

template <DType Working, class Real>
ME_INLINE SolvedBand solve_band(const RankBand& band, const Found& low, const Found& high) {
    const bool one_key = band.has_high && high.key == low.key && band.slack == 0;
    const uint64_t high_kept = one_key           ? band.last - band.first + 1
                               : band.has_high ? high.equal - (band.first - 1 - high.above)
                                               : 0;
    const uint64_t low_kept = one_key ? high_kept : band.last - low.above;
    SolvedBand solved;
    Mask& mask = solved.mask;
    mask.kind = MaskKind::Band;
    mask.by_draw = band.spread;
    mask.random_key = band.random_key;
    mask.low = low.key;
    mask.low_positions = band.spread ? share_of_draws(low_kept, low.equal) : band.low_positions;
    if (band.slack > 0) {
        mask.low = relaxed_key<Working, Real>(low.key, band.slack);
        mask.low_positions = Range{0, ~0ull};
    }
    if (mask.low == 0) {  // zeros carry nothing, and are never kept
        mask.low = 1;
        mask.low_positions = Range{0, ~0ull};
    }
    if (band.has_high) {
        mask.high = high.key;
        mask.high_positions = band.spread ? share_of_draws(high_kept, high.equal) : band.high_positions;
    }
    const uint64_t top = band.has_high && band.every_tie ? high.above : band.first - 1;
    const uint64_t bottom = low.key == 0 ? low.above : band.every_tie ? low.above + low.equal : band.last;
    solved.kept_without_slack = bottom > top ? bottom - top : 0;  // 0: the band lies among the zeros
    return solved;
}

ME_INLINE SolvedBand solve_band(const RankBand& band, const Found& low, const Found& high, DType working) {
    switch (working) {
        case DType::BF16: return solve_band<DType::BF16, float>(band, low, high);
        case DType::F16: return solve_band<DType::F16, float>(band, low, high);
        case DType::F32: return solve_band<DType::F32, float>(band, low, high);
        default: return solve_band<DType::F64, double>(band, low, high);
    }
}

}  // namespace merge_engine
