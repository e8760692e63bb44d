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
        uint32_t places[TILE + MORE_PLACES], thresholds[TILE];
        uint64_t twice_ranks[TILE];
        const int found = list_places(occur.word, places);
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

template <DType Working>
void read_keys(const Array& base, const Array& model, uint64_t first, uint64_t count,
               typename Storage<Working>::Bits* keys) {
    typename RealOf<Working>::Type b[TILE], x[TILE];
    for (uint64_t at = 0; at < count; at += TILE) {
        const int n = static_cast<int>(std::min<uint64_t>(TILE, count - at));
        load_tile<Working>(base, first + at, n, b);
        load_tile<Working>(model, first + at, n, x);
        for (int j = 0; j < n; ++j) keys[at + static_cast<uint64_t>(j)] = magnitude_key<Working>(x[j] - b[j]);
    }
}

}  // namespace

void rank_thresholds(const Array& base, const Array& model, DType working, uint64_t length, uint64_t stride,
                     double density, double epsilon, uint64_t count, int threads, uint32_t* thresholds) {
    if (length == 0 || stride == 0 || count == 0) return;
    const Probability probability{density, epsilon, length};
    // Lines with a stride lie in one another. A slab of them has its keys read first, or they would be read out of order.
    const uint64_t slab = length * stride, group = std::max<uint64_t>(1, BLOCK / slab) * slab;
    with_dtype(working, [&](auto dtype) {
        using Key = typename Storage<dtype()>::Bits;
        struct Worker {
            std::vector<Key> keys, line;
            std::conditional_t<sizeof(Key) == 2, CountedRanks, SortedRanks<Key>> ranks;
            Worker(uint64_t group, uint64_t length) : keys(group), line(length), ranks(length) {}
        };
        std::vector<std::unique_ptr<Worker>> workers(static_cast<size_t>(std::max(threads, 1)));
        parallel_for((count + group - 1) / group, threads, [&](uint64_t number, int worker) {
            auto& own = workers[static_cast<size_t>(worker)];
            if (!own) own = std::make_unique<Worker>(group, length);
            const uint64_t first = number * group, size = std::min(count - first, group);
            read_keys<dtype()>(base, model, first, size, own->keys.data());
            for (uint64_t l = 0; l < size / length; ++l) {
                const uint64_t start = l / stride * slab + l % stride;
                const Key* keys = own->keys.data() + start;
                if (stride != 1) {
                    for (uint64_t j = 0; j < length; ++j) own->line[j] = keys[j * stride];
                    keys = own->line.data();
                }
                own->ranks.rank(keys, probability);
                uint32_t* found = thresholds + first + start;
                for (uint64_t j = 0; j < length; ++j) found[j * stride] = own->ranks.threshold(keys[j], probability);
            }
        });
    });
}

}  // namespace ME_ISA
}  // namespace merge_engine
