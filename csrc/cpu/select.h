// Keys found by their ranks in a list of keys.
#pragma once

#include <algorithm>
#include <vector>

#include "../bands.h"
#include "tile.h"

namespace merge_engine {
namespace ME_ISA {

// Keys are counted in a table of what they span. Those of one bin are a list again, until a bin is a key.
template <class Key>
class KeyList {
  public:
    // The keys must stay where they are.
    KeyList(const Key* keys, size_t size) : keys_(keys), size_(size) {
        Key lowest = static_cast<Key>(~Key{0}), highest = 0;
        for (size_t i = 0; i < size; ++i) {
            lowest = std::min(lowest, keys[i]);
            highest = std::max(highest, keys[i]);
        }
        bins_ = {lowest, 0};
        const size_t most = std::clamp<size_t>(size / 4, 64, 4096);
        while (bins_.of(highest) >= most) ++bins_.shift;
        table_.resize(bins_.of(highest) + 1);
        if (lowest == highest) {
            table_[0] = static_cast<uint32_t>(size);
        } else {
            const Bins bins = bins_;
            for (size_t i = 0; i < size; ++i) ++table_[bins.of(keys[i])];
        }
    }

    // The `rank`-th largest, from 1 to the number of keys.
    Found find(uint64_t rank) const {
        uint64_t above = 0;
        size_t bin = table_.size() - 1;
        while (above + table_[bin] < rank) above += table_[bin--];
        if (bins_.shift == 0) return {bins_.lowest + bin, above, table_[bin]};
        std::vector<Key> of_bin(table_[bin] + 1);  // one may be written that does not count
        size_t found = 0;
        const Bins bins = bins_;
        for (size_t i = 0; i < size_; ++i) {
            of_bin[found] = keys_[i];
            found += bins.of(keys_[i]) == bin;
        }
        Found exact = KeyList(of_bin.data(), found).find(rank - above);
        exact.above += above;
        return exact;
    }

  private:
    struct Bins {
        Key lowest;
        int shift;

        size_t of(Key key) const { return static_cast<Key>(key - lowest) >> shift; }
    };

    const Key* keys_;
    size_t size_;
    Bins bins_;
    std::vector<uint32_t> table_;
};

}  // namespace ME_ISA
}  // namespace merge_engine
