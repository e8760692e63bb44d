// Ranks of magnitudes within a line, as exact as a draw needs them.
//
// The keys of a line are counted in buckets. The ranks in a bucket lie between two numbers, and so do the thresholds;
// a draw that is not between them needs no more. Where a bucket is a single key, its rank is exact.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "../ranks.h"
#include "quotient.h"
#include "tile_bits.h"

namespace merge_engine {
namespace ME_ISA {

// Zeros are many. Neighbours have buckets of their own, so that counting one need not wait for the other.
constexpr uint32_t ZEROS = 16;
constexpr uint32_t ZERO = ZEROS - 1;  // stands for all of them

// Buckets of keys, in their order. Those of a range above 0 are equally wide; what is outside is in the first and the last.
template <class Key>
class Buckets {
  public:
    Buckets() = default;
    Buckets(Key lowest, Key highest, uint64_t most, bool has_all) : lowest_(lowest) {
        const uint64_t range = highest > lowest ? highest - lowest : 0;
        while (range >> shift_ >= most) ++shift_;
        last_ = static_cast<Key>(range >> shift_);
        single_ = has_all && shift_ == 0;
    }
    uint32_t size() const { return static_cast<uint32_t>(last_) + 1 + ZEROS; }
    // Whether all keys of a bucket are equal.
    bool single() const { return single_; }

    // The buckets of `count` keys.
    __attribute__((noinline)) void number(const Key* ME_RESTRICT keys, int count, Key* ME_RESTRICT numbers) const {
        const Key lowest = lowest_, last = last_, before = static_cast<Key>(lowest - ZEROS);
        const int shift = shift_;
        if (single_) {
            for (Key j = 0; j < static_cast<Key>(count); ++j) {
                numbers[j] = keys[j] ? static_cast<Key>(keys[j] - before) : static_cast<Key>(j & Key{ZERO});
            }
            return;
        }
        for (Key j = 0; j < static_cast<Key>(count); ++j) {
            const Key above = keys[j] > lowest ? static_cast<Key>(keys[j] - lowest) : Key{0};
            const Key within = static_cast<Key>(above >> shift);
            const Key number = static_cast<Key>((within < last ? within : last) + ZEROS);
            numbers[j] = keys[j] ? number : static_cast<Key>(j & Key{ZERO});
        }
    }

  private:
    Key lowest_ = 0, last_ = 0;
    int shift_ = 0;
    bool single_ = false;
};

// The range of some keys above 0.
template <DType Working>
class KeyRange {
  public:
    using Key = typename Storage<Working>::Bits;

    void add(const Key* keys, uint64_t count) {
        Key highest = highest_, before_lowest = before_lowest_;
        for (uint64_t j = 0; j < count; ++j) highest = keys[j] > highest ? keys[j] : highest;
        for (uint64_t j = 0; j < count; ++j) {
            const Key before = static_cast<Key>(keys[j] - 1);  // that of a zero is above them all
            before_lowest = before < before_lowest ? before : before_lowest;
        }
        highest_ = highest;
        before_lowest_ = before_lowest;
    }
    // Where there are too few buckets, what is far below the largest shares one.
    Buckets<Key> buckets(uint64_t most, bool of_all) const {
        const Key lowest = static_cast<Key>(before_lowest_ + 1);
        const uint64_t far = key_of(1024) - key_of(1);  // ten octaves
        if (highest_ < lowest + std::max(most, far)) return {lowest, highest_, most, of_all};
        return {static_cast<Key>(highest_ - far), highest_, most, false};
    }

  private:
    static uint64_t key_of(float magnitude) {
        return Storage<Working>::store(static_cast<typename RealOf<Working>::Type>(magnitude));
    }
    Key highest_ = 0, before_lowest_ = static_cast<Key>(~Key{0});
};

// How many keys each bucket has. Neighbours count apart: where they are equal, one need not wait for the other.
class BucketCounts {
  public:
    explicit BucketCounts(uint64_t buckets) : table_(buckets + 2 * LANES), counts_(TABLES * table_) {}

    template <class Key>
    void add(const Key* numbers, int count) {
        int j = 0;
        for (; j + TABLES <= count; j += TABLES) {
#pragma GCC unroll 4
            for (int t = 0; t < TABLES; ++t) ++counts_[static_cast<size_t>(t) * table_ + numbers[j + t]];
        }
        for (; j < count; ++j) ++counts_[numbers[j]];
    }
    // Moves the counts of some buckets, whole vectors of them, to `to`.
    void move(uint32_t first, int width, uint32_t* to) {
        for (int t = 0; t < TABLES; ++t) {
            uint32_t* from = counts_.data() + static_cast<size_t>(t) * table_ + first;
            for (int j = 0; j < width; j += LANES) {
                store(to + j, load<Words>(to + j) + load<Words>(from + j));
                store(from + j, Words{});
            }
        }
    }

  private:
    static constexpr int TABLES = 2;
    size_t table_;
    std::vector<uint32_t> counts_;
};

// Compilers would put the numbers found into vectors, one by one, which takes three times as long.
#if defined(__GNUC__) && !defined(__clang__)
#define ME_SCALAR __attribute__((optimize("no-tree-vectorize")))
#else
#define ME_SCALAR
#endif
template <class Key, class Number>
ME_SCALAR void look_up(const Number* table, const Key* keys, int count, Number* ME_RESTRICT found) {
#pragma GCC unroll 8
    for (int j = 0; j < count; ++j) found[j] = table[keys[j]];
}

// Probability's thresholds, many at a time.
class Thresholds : public Probability {
  public:
    explicit Thresholds(const Probability& probability)
        : Probability(probability), last_(length > 1 ? static_cast<double>(2 * (length - 1)) : 2), inverse_(1 / last_) {}

    ME_INLINE uint32_t threshold(uint64_t twice_rank) const {
        return threshold_of(quotient(static_cast<double>(length > 1 ? twice_rank : 1), last_, inverse_));
    }

  private:
    double last_, inverse_;  // twice the last rank; the only element of a line has the rank 0.5
};

// What the counts say of the buckets of a line.
class RankTable {
  public:
    RankTable(const Probability& probability, uint64_t buckets)
        : probability_(probability), below_(buckets + TILE + 1), bounds_(buckets + TILE) {}

    // move(first, width, counts) adds the counts of some buckets, whole vectors of them, to `counts`.
    template <class Move>
    void solve(uint32_t buckets, bool single, Move&& move) {
        Words below = {};
        widest_ = 0;
        for (uint32_t first = 0; first < buckets; first += TILE) {
            const int width = (std::min(TILE, static_cast<int>(buckets - first)) + LANES - 1) / LANES * LANES;
            uint32_t counts[TILE];
            std::memset(counts, 0, static_cast<size_t>(width) * sizeof(uint32_t));
            move(first, width, counts);
            if (first == 0) {
                for (uint32_t z = 0; z < ZERO; ++z) counts[ZERO] += std::exchange(counts[z], 0);
            }
            for (int j = first ? 0 : ZEROS; j < width; ++j) widest_ = std::max(widest_, counts[j]);
            for (int j = 0; j < width; j += LANES) {
                const Words own = load<Words>(counts + j), sums = running_sums(own);
                store(below_.data() + first + j, below + sums - own);
                below += sums[LANES - 1];
            }
        }
        below_[buckets] = below[0];
        buckets_ = buckets;
        single_ = single;
    }
    // Makes ready to compare draws.
    void find_bounds() {
        // The threshold of a rank is about lowest + rank * step, in units of a draw's top byte.
        const double apart = static_cast<double>(probability_.length > 1 ? probability_.length - 1 : 1);
        const float lowest = static_cast<float>(probability_.threshold(0)) * 0x1p-24f;
        const float step = static_cast<float>(512 * probability_.epsilon / apart);
        constexpr float ERROR = 0x1p-10f;  // of this estimate, and more
        const auto bounds = [](float low, float high) {
            const int high_byte = static_cast<int>(high + ERROR);
            return static_cast<uint16_t>(static_cast<int>(low - ERROR) | (high_byte < 255 ? high_byte : 255) << 8);
        };
        const auto first = [=](uint32_t below) { return lowest + static_cast<float>(below) * step; };
        const auto mean = [=](uint32_t below, uint32_t end) { return (first(below) + first(end) - step) * 0.5f; };
        const uint32_t* ME_RESTRICT below = below_.data();
        uint16_t* ME_RESTRICT to = bounds_.data();
        if (single_) {
            for (uint32_t b = 0; b < buckets_; ++b) {
                const float threshold = mean(below[b], below[b + 1]);
                to[b] = bounds(threshold, threshold);
            }
        } else {
            for (uint32_t b = 0; b < buckets_; ++b) to[b] = bounds(first(below[b]), first(below[b + 1]) - step);
        }
        const float of_zeros = mean(0, below[ZEROS]);
        std::fill_n(to, ZEROS, bounds(of_zeros, of_zeros));
    }

    // Compares top bytes of draws with the thresholds of a tile's buckets: those that are kept, and those that the byte
    // does not decide. Whole vectors of draws are read.
    template <class Key>
    void compare(const Key* numbers, const uint8_t* draws, int count, TileBits& kept, TileBits& open) const {
        uint16_t bounds[TILE];
        uint8_t low[TILE], high[TILE];
        look_up(bounds_.data(), numbers, count, bounds);
        for (int j = 0; j < TILE; ++j) low[j] = static_cast<uint8_t>(bounds[j]);
        for (int j = 0; j < TILE; ++j) high[j] = static_cast<uint8_t>(bounds[j] >> 8);
        kept = open = {};
        for (int w = 0; 64 * w < count; ++w) {
            uint64_t below = 0, above = 0;
            for (int j = 0; j < 64; j += VECTOR_BYTES) {
                const Bytes drawn = load<Bytes>(draws + 64 * w + j);
                below |= bits_less(drawn, load<Bytes>(low + 64 * w + j)) << j;
                above |= bits_less(load<Bytes>(high + 64 * w + j), drawn) << j;
            }
            kept.word[w] = below;
            open.word[w] = ~(below | above);
        }
        const TileBits all = first_bits(count);
        for (int w = 0; w < TileBits::WORDS; ++w) kept.word[w] &= all.word[w];
        for (int w = 0; w < TileBits::WORDS; ++w) open.word[w] &= all.word[w];
    }

    // Whether a draw keeps an element of a bucket, or whether its exact rank decides.
    enum class Verdict { Dropped, Kept, Open };
    Verdict judge(uint64_t number, uint32_t draw) const {
        const uint64_t below = this->below(number), others = end(number) - below - 1;
        const bool exact = single_ || number < ZEROS;
        if (draw < probability_.threshold(2 * below + (exact ? others : 0))) return Verdict::Kept;
        return exact || draw >= probability_.threshold(2 * (below + others)) ? Verdict::Dropped : Verdict::Open;
    }
    bool single() const { return single_; }
    // The thresholds of buckets of single keys that occur. Of the range of keys few do.
    void list_thresholds(std::vector<uint32_t>& thresholds) const {
        thresholds.resize(buckets_ + TILE);
        for (uint32_t first = 0; first < buckets_; first += TILE) {
            const uint32_t* below = below_.data() + first;
            const int width = std::min(TILE, static_cast<int>(buckets_ - first));
            const TileBits occur = bits_where(
                width, [&](int j) { return less(load<Words>(below + j), load<Words>(below + j + 1)); });
            uint32_t places[TILE + MORE_PLACES], found[TILE];
            const int size = list_places(occur.word, places);
            for (int i = 0; i < size; ++i) {
                found[i] = probability_.threshold(uint64_t{below[places[i]]} + below[places[i] + 1] - 1);
            }
            for (int i = 0; i < size; ++i) thresholds[first + places[i]] = found[i];
        }
        std::fill_n(thresholds.begin(), ZERO, thresholds[ZERO]);
    }
    // How many elements are in lower buckets, and how many in those and in this one.
    uint64_t below(uint64_t number) const { return below_[std::max<uint64_t>(number, ZERO)]; }
    const uint32_t* all_below() const { return below_.data(); }
    uint32_t buckets() const { return buckets_; }
    // The most elements in one bucket, but for zeros.
    uint32_t widest() const { return widest_; }
    uint64_t end(uint64_t number) const { return below_[std::max<uint64_t>(number, ZERO) + 1]; }

  private:
    Thresholds probability_;
    std::vector<uint32_t> below_;
    // Of each bucket two bytes: a draw with a top byte below the lower one is below all its thresholds, one with a byte
    // above the upper is not below any.
    std::vector<uint16_t> bounds_;
    uint32_t buckets_ = 0, widest_ = 0;
    bool single_ = false;
};

}  // namespace ME_ISA
}  // namespace merge_engine
