// Where the keys of some ranks probably lie.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "keys.h"

namespace merge_engine {
namespace ME_ISA {

// Keys of one model, from short runs all over a chunk.
template <DType Working>
class Sample {
  public:
    using Key = typename Storage<Working>::Bits;

    Sample(const Array& base, const Array& model, uint64_t count) : count_(count) {
        const uint64_t runs = std::max<uint64_t>(8, static_cast<uint64_t>(std::cbrt(count) * std::cbrt(count)) / RUN);
        const uint64_t stride = count / runs;
        keys_.reserve(runs * RUN);
        for (uint64_t run = 0; run < runs; ++run) {
            // Anywhere in its stride: a fixed place could be the same columns of a matrix each time.
            const uint64_t offset = (run * 0x9E3779B9u & 0xFFFFFFFFu) * (stride - RUN) >> 32;
            const uint64_t first = (run * stride + offset) / RUN * RUN;
            list_keys<Working>(base, model, first, first + RUN, keys_);
        }
        Key below_lowest = END, highest = 0;  // of those that are not 0
        for (const Key key : keys_) {
            below_lowest = std::min(below_lowest, static_cast<Key>(key - 1));
            highest = std::max(highest, key);
        }
        bin_0_ = static_cast<int>((below_lowest + Key{1}) >> SHIFT) - 1;
        at_or_above_.resize(bin_of(highest) + 2);
        for (const Key key : keys_) ++at_or_above_[bin_of(key)];
        for (size_t bin = at_or_above_.size() - 1; bin-- > 0;) at_or_above_[bin] += at_or_above_[bin + 1];
    }

    // Keys as edges. Those of the ranks probably lie between the first and the second edge, or the third and the fourth,
    // and so on, or they are frequent: such a key is an edge, and the next edge is the key above.
    std::vector<uint64_t> edges(const std::vector<uint64_t>& ranks) const {
        std::vector<Window> windows;
        for (const uint64_t rank : ranks) windows.push_back(window(rank));
        std::sort(windows.begin(), windows.end(), [](const Window& a, const Window& b) { return a.first < b.first; });
        std::vector<uint64_t> edges;
        size_t end = 0;
        for (const Window& window : windows) {
            const size_t first = std::max(window.first, end);
            if (first >= window.end) continue;
            edges.push_back(first_key(first));
            for (size_t bin = first; bin < window.end && bin + 1 < at_or_above_.size(); ++bin) {
                Key key;
                if (is_frequent(at_or_above_[bin] - at_or_above_[bin + 1]) && has_frequent(bin, key)) {
                    edges.push_back(key);
                    edges.push_back(uint64_t{key} + 1);
                }
            }
            end = window.end;
            edges.push_back(end < at_or_above_.size() ? first_key(end) : END);
        }
        return edges;
    }

  private:
    static constexpr uint64_t RUN = 32;  // one cache line of 16-bit elements
    static constexpr int SHIFT = 8 * sizeof(Key) - 1 - FIRST_BITS;
    static constexpr Key END = Key{1} << (8 * sizeof(Key) - 1);  // above all keys
    static constexpr double DEVIATIONS = 4;

    // Bins of keys. The lowest one is zero alone, and the next one has all keys up to the lowest in the sample.
    struct Window {
        size_t first, end;
    };

    size_t bin_of(Key key) const { return key == 0 ? 0 : static_cast<size_t>(static_cast<int>(key >> SHIFT) - bin_0_); }
    Key first_key(size_t bin) const { return static_cast<Key>(bin < 2 ? bin : (bin + static_cast<size_t>(bin_0_)) << SHIFT); }

    // A key that so many elements have is cheaper to compare with than to hand over.
    bool is_frequent(uint64_t size) const { return size * 32 >= keys_.size(); }

    // Finds the key that most elements of a bin have, if it is frequent.
    bool has_frequent(size_t bin, Key& key) const {
        if constexpr (SHIFT == 0) {
            key = bin == 0 ? Key{0} : static_cast<Key>(bin + static_cast<size_t>(bin_0_));
            return true;
        }
        uint64_t votes = 0, size = 0;
        for (const Key each : keys_) {
            if (bin_of(each) != bin) continue;
            if (votes == 0) key = each;
            votes += each == key ? 1 : -1;
        }
        for (const Key each : keys_) size += each == key;
        return is_frequent(size);
    }

    Window window(uint64_t rank) const {
        const double size = static_cast<double>(keys_.size());
        const double share = static_cast<double>(rank) / static_cast<double>(count_), place = share * size;
        size_t bin = at_or_above_.size() - 1;
        while (bin > 0 && at_or_above_[bin] < place) --bin;
        const double deviation =
            std::max({std::sqrt(size * share * (1 - share)), deviation_at(bin), deviation_at(bin + 1)});
        const double margin = 2 + DEVIATIONS * deviation;
        size_t first = bin, end = bin;
        while (first > 0 && at_or_above_[first] < place + margin) --first;
        while (end < at_or_above_.size() && at_or_above_[end] >= place - margin) ++end;
        return {first, end};
    }

    // The standard deviation of the number of sampled elements at or above a bin. Neighbours are often alike, so it
    // comes from how much the runs differ.
    double deviation_at(size_t bin) const {
        const Key least = first_key(bin);
        uint64_t sum = 0, squares = 0;
        for (auto run = keys_.begin(); run < keys_.end(); run += RUN) {
            uint32_t above = 0;
            for (uint64_t j = 0; j < RUN; ++j) above += run[j] >= least;
            sum += above;
            squares += above * above;
        }
        const double runs = static_cast<double>(keys_.size() / RUN), mean = static_cast<double>(sum) / runs;
        return std::sqrt(std::max(0.0, static_cast<double>(squares) - mean * static_cast<double>(sum)));
    }

    uint64_t count_;
    std::vector<Key> keys_;              // run by run
    int bin_0_;                          // what bin 0 would be if it followed the others
    std::vector<uint32_t> at_or_above_;  // for each bin: elements in it and above; the last has none
};

}  // namespace ME_ISA
}  // namespace merge_engine
