// Masks of eight neighbours at once, as truths about their halves: see halves.cuh.
#pragma once

#include "halves.cuh"

namespace merge_engine {

// Keys at a bound, which positions decide, and those above it. Each number is in both halves.
struct alignas(16) Bound {
    uint32_t tied;   // keys from here on are at or above the bound
    uint32_t above;  // keys from here on are above it; the same where nothing need be decided
    uint32_t top;    // one less than the first top byte that is not drawn, and bit 15
    uint64_t below;  // what draws are below
    Range positions;

    __device__ bool decides() const { return tied != above; }
};

// The mask of a model with keys of 16 bits. Those above `high` are dropped if it is `capped`.
struct FastMask {
    Bound low;
    uint64_t random_key;
    bool capped, by_draw;
    Bound high;
    alignas(16) RoundKey round_keys[PHILOX_ROUNDS];

    __device__ bool draws() const { return by_draw && (low.decides() || (capped && high.decides())); }
};

__device__ inline Bound bound_at(uint64_t key, uint64_t next, const Range& positions, bool decides) {
    const auto in_halves = [](uint64_t bound) {
        return static_cast<uint32_t>(bound < BEYOND_KEYS ? bound : BEYOND_KEYS) * HALVES;
    };
    const uint64_t below = draws_below(positions);
    const uint32_t top = (0x7FFFu + static_cast<uint32_t>(below >> 24)) * HALVES;
    return {in_halves(decides ? key : next), in_halves(next), top, below, positions};
}

__device__ inline FastMask fast_mask(const Mask& mask) {
    const bool band = mask.kind == MaskKind::Band, capped = band && mask.high < BEYOND_KEYS;
    // Zeros carry nothing, and are never kept.
    const uint64_t low = band && mask.low > 0 ? mask.low : 1, high = mask.high;
    const bool low_decides =
        band ? mask.low > 0 && !mask.keeps_all_ties(mask.low_positions) : mask.kind == MaskKind::Draw;
    const bool high_decides = capped && !mask.keeps_all_ties(mask.high_positions);
    const uint64_t above_low = !low_decides ? low : band ? low + 1 : BEYOND_KEYS;
    FastMask fast{bound_at(low, above_low, mask.low_positions, low_decides), mask.random_key, capped,
                  !band || mask.by_draw, bound_at(high, high + 1, mask.high_positions, high_decides), {}};
    for (int round = 0; round < PHILOX_ROUNDS; ++round) fast.round_keys[round] = round_key(mask.random_key, round);
    return fast;
}

// Swaps x of every lane with bit `of` set for y of its neighbour without.
__device__ inline void swap_lanes(uint32_t& x, uint32_t& y, unsigned of) {
    const bool upper = threadIdx.x & of;
    const uint32_t received = __shfl_xor_sync(EVERY_LANE, upper ? x : y, static_cast<int>(of));
    (upper ? x : y) = received;
}

// The top bytes of the draws of eight elements for two models, four a word. Two threads share a block: the even one draws
// with the keys of the first model, the odd one with those of the second. All lanes of a warp enter.
__device__ inline void draw_two(const RoundKey (&keys)[PHILOX_ROUNDS], uint64_t index, uint32_t (&bytes)[2][2]) {
    PhiloxWords drawn =
        philox([&](int round) { return keys[round]; }, index / DRAW_BLOCK, DrawStream::TopBytes);
    uint32_t (&word)[4] = drawn.word;
    // Of both models, the even lanes take words 0 and 1, the odd ones 2 and 3.
    swap_lanes(word[0], word[2], 1);
    swap_lanes(word[1], word[3], 1);
    bytes[0][0] = word[0], bytes[0][1] = word[1];
    bytes[1][0] = word[2], bytes[1][1] = word[3];
}

// Of some elements those whose draws are below a bound by their lower bits, which one in 256 need. The key is read for
// each of them: if it were known to stay, the keys of all rounds would be made before and take the kernel's registers.
__device__ inline uint32_t drawn_by_lower_bits(uint32_t some, uint64_t below, const volatile uint64_t& key,
                                               uint64_t index) {
    uint32_t drawn = 0;
#pragma unroll 1
    for (uint32_t rest = some; rest != 0; rest &= rest - 1) {
        const uint64_t place = index + static_cast<uint64_t>(__ffs(static_cast<int>(rest)) - 1);
        drawn |= lower_bits(key, place) < (below & LOWER_DRAW) ? rest & -rest : 0;
    }
    return drawn;
}

// The elements that positions keep, as truths: among those `tied` at a bound they decide.
__device__ inline void decide(const Bound& bound, bool by_draw, const volatile uint64_t& key, const uint32_t (&bytes)[2],
                              uint64_t index, const uint32_t (&tied)[PAIRS], uint32_t (&stay)[PAIRS]) {
    if (!by_draw) {
        uint32_t inside_range = 0;
#pragma unroll
        for (int j = 0; j < 2 * PAIRS; ++j) {
            inside_range |= static_cast<uint32_t>(inside(bound.positions, index + j)) << j;
        }
#pragma unroll
        for (int p = 0; p < PAIRS; ++p) stay[p] = truths_of(inside_range, p);
        return;
    }
    uint32_t open[PAIRS], any = 0;
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) {
        const uint32_t word = bytes[p / 2];
        const uint32_t draws = p % 2 ? selected_bytes<0x4342>(word, 0) : selected_bytes<0x4140>(word, 0);
        stay[p] = bound.top - draws;
        open[p] = tied[p] & (bound.top + HALVES - draws) & ~stay[p];
        any |= open[p];
    }
    if ((any & TRUTHS) == 0) return;
    uint32_t bits = 0;
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) bits |= bits_of_truths(open[p], p);
    bits = drawn_by_lower_bits(bits, bound.below, key, index);
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) stay[p] |= truths_of(bits, p);
}

// Steps 3, 4 and 9 for the elements of a model from flat index `index` on: those that the mask drops become equal to the
// base. Returns the kept ones, counted by subtracting halves.
template <DType Working>
__device__ uint32_t keep(const FastMask& mask, const uint32_t (&bytes)[2], uint64_t index, const Octet& base,
                         Octet& x) {
    uint32_t size[PAIRS], kept[PAIRS];
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) size[p] = Halves<Working>::difference(x.word[p], base.word[p]) | TRUTHS;
    // Which keys lie above a bound, and which of those at it count as above: those that stay, or else the others.
    const auto passes = [&](const Bound& bound, bool stay_above, uint32_t (&passed)[PAIRS]) {
#pragma unroll
        for (int p = 0; p < PAIRS; ++p) passed[p] = size[p] - bound.above;
        if (!bound.decides()) return;
        uint32_t tied[PAIRS], stay[PAIRS];
#pragma unroll
        for (int p = 0; p < PAIRS; ++p) tied[p] = (size[p] - bound.tied) & ~passed[p];
        decide(bound, mask.by_draw, mask.random_key, bytes, index, tied, stay);
#pragma unroll
        for (int p = 0; p < PAIRS; ++p) passed[p] |= tied[p] & (stay_above ? stay[p] : ~stay[p]);
    };
    passes(mask.low, true, kept);
    if (mask.capped) {
        uint32_t beyond[PAIRS];
        passes(mask.high, false, beyond);
#pragma unroll
        for (int p = 0; p < PAIRS; ++p) kept[p] &= ~beyond[p];
    }
    uint32_t sum = 0;
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) {
        const uint32_t whole = whole_halves(kept[p]);
        x.word[p] = (x.word[p] & whole) | (base.word[p] & ~whole);
        sum -= whole;
    }
    return sum;
}

}  // namespace merge_engine
