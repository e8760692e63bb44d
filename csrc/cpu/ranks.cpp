// DELLA's keep probabilities: magnitudes ranked within each line of a tensor.
#include <algorithm>
#include <memory>
#include <type_traits>

#include "../ranks.h"
#include "pool.h"
#include "primitives.h"
#include "tile_bits.h"

namespace merge_engine {
namespace ME_ISA {
namespace {

// Thresholds of the 16-bit keys of one line, by counting. Of the range of keys that occur few do: these are listed, and
// have their ranks and thresholds computed. Zeros, which are many and far below all others, are counted apart.
class CountedRanks {
  public:
    explicit CountedRanks(uint64_t) : counts_(KEYS + TILE), odd_counts_(KEYS + TILE), thresholds_(KEYS) {}

    void rank(const uint16_t* keys, const Probability& probability) {
        const uint64_t length = probability.length;
        uint16_t highest = 0, before_lowest = 0xFFFF;  // of the keys above 0; minus one, a zero is above them all
        for (uint64_t j = 0; j < length; ++j) highest = keys[j] > highest ? keys[j] : highest;
        for (uint64_t j = 0; j < length; ++j) {
            const uint16_t before = static_cast<uint16_t>(keys[j] - 1);
            before_lowest = before < before_lowest ? before : before_lowest;
        }
        // Neighbours count apart, so that equal ones need not wait for each other.
        uint64_t j = 0;
        for (; j + 1 < length; j += 2) ++counts_[keys[j]], ++odd_counts_[keys[j + 1]];
        if (j < length) ++counts_[keys[j]];
        uint64_t below = counts_[0] + odd_counts_[0];
        thresholds_[0] = probability.threshold(below ? below - 1 : 0);
        counts_[0] = odd_counts_[0] = 0;
        for (uint32_t key = before_lowest + 1u; key <= highest; key += TILE) below = rank_some(key, below, probability);
    }
    uint32_t threshold(uint16_t key, const Probability&) const { return thresholds_[key]; }

  private:
    // Of the keys [first, first + TILE). Returns how many elements lie below the next.
    uint64_t rank_some(uint32_t first, uint64_t below, const Probability& probability) {
        uint32_t *counts = counts_.data() + first, *odd_counts = odd_counts_.data() + first;
        const TileBits occur = bits_where(TILE, [&](int j) {
            const Words equal = load<Words>(counts + j) + load<Words>(odd_counts + j);
            store(counts + j, equal);
            store(odd_counts + j, Words{});
            return less(Words{}, equal);
        });
        uint32_t places[TILE + 16], thresholds[TILE];
        uint64_t twice_ranks[TILE];
        const int found = list_places(occur, places);
        for (int i = 0; i < found; ++i) {
            const uint64_t equal = counts[places[i]];
            counts[places[i]] = 0;
            twice_ranks[i] = 2 * below + equal - 1;
            below += equal;
        }
        for (int i = 0; i < found; ++i) thresholds[i] = probability.threshold(twice_ranks[i]);
        for (int i = 0; i < found; ++i) thresholds_[first + places[i]] = thresholds[i];
        return below;
    }

    static constexpr size_t KEYS = size_t{1} << FIRST_BITS;
    std::vector<uint32_t> counts_, odd_counts_;  // by key, zero between lines
    std::vector<uint32_t> thresholds_;
};

// Thresholds of wider keys, from a sorted copy.
template <class Key>
class SortedRanks {
  public:
    explicit SortedRanks(uint64_t length) : sorted_(length) {}

    void rank(const Key* keys, const Probability& probability) {
        std::copy(keys, keys + probability.length, sorted_.begin());
        std::sort(sorted_.begin(), sorted_.end());
    }
    uint32_t threshold(Key key, const Probability& probability) const {
        const auto range = std::equal_range(sorted_.begin(), sorted_.end(), key);
        const auto smaller = range.first - sorted_.begin(), equal = range.second - range.first;
        return probability.threshold(static_cast<uint64_t>(2 * smaller + equal - 1));
    }

  private:
    std::vector<Key> sorted_;
};

}  // namespace

void rank_thresholds(const Array& base, const Array& model, DType working, uint64_t length, uint64_t stride,
                     double density, double epsilon, uint64_t count, int threads, uint32_t* thresholds) {
    if (length == 0 || stride == 0 || count == 0) return;
    const uint64_t slab = length * stride;
    with_dtype(working, [&](auto dtype) {
        using Real = typename RealOf<dtype()>::Type;
        using Key = typename Storage<dtype()>::Bits;
        // Keys of the whole chunk come first, because lines with a stride would visit memory out of order.
        const std::unique_ptr<Key[]> keys(new Key[count]);
        parallel_for((count + BLOCK - 1) / BLOCK, threads, [&](uint64_t block, int) {
            Real b[TILE], x[TILE];
            const uint64_t last = std::min(count, (block + 1) * BLOCK);
            for (uint64_t at = block * BLOCK; at < last; at += TILE) {
                const int n = static_cast<int>(std::min<uint64_t>(TILE, last - at));
                load_tile<dtype()>(base, at, n, b);
                load_tile<dtype()>(model, at, n, x);
                for (int j = 0; j < n; ++j) keys[at + static_cast<uint64_t>(j)] = magnitude_key<dtype()>(x[j] - b[j]);
            }
        });
        using Ranks = std::conditional_t<sizeof(Key) == 2, CountedRanks, SortedRanks<Key>>;
        const Probability probability{density, epsilon, length};
        const uint64_t lines = count / length;
        const uint64_t group = std::max<uint64_t>(1, BLOCK / length);
        std::vector<std::unique_ptr<Ranks>> of_worker(static_cast<size_t>(std::max(threads, 1)));
        parallel_for((lines + group - 1) / group, threads, [&](uint64_t block, int worker) {
            auto& ranks = of_worker[static_cast<size_t>(worker)];
            if (!ranks) ranks = std::make_unique<Ranks>(length);
            std::vector<Key> gathered(stride == 1 ? 0 : length);
            for (uint64_t l = block * group; l < std::min(lines, (block + 1) * group); ++l) {
                const uint64_t first = l / stride * slab + l % stride;
                const Key* line = keys.get() + first;
                if (stride != 1) {
                    for (uint64_t j = 0; j < length; ++j) gathered[j] = line[j * stride];
                    line = gathered.data();
                }
                ranks->rank(line, probability);
                for (uint64_t j = 0; j < length; ++j) {
                    thresholds[first + j * stride] = ranks->threshold(line[j], probability);
                }
            }
        });
    });
}

}  // namespace ME_ISA
}  // namespace merge_engine
