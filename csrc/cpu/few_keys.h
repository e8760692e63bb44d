// Keys found by their ranks among few: byte by byte, with tables that are cleared in no time.
#pragma once

#include <array>

#include "keys.h"
#include "primitives.h"
#include "statistics.h"

namespace merge_engine {
namespace ME_ISA {

constexpr uint64_t FEW_KEYS = 4 * TILE;

// Of what a level looks at: a list of bins, each of 16 bits at most.
class FewKeys {
  public:
    template <DType Working>
    void list(const Array& base, const Array& model, uint64_t prefix, int shift, uint64_t count) {
        size_ = 0;
        for_each_key_tile<Working>(base, model, 0, count, [&](const auto* keys, int n) {
            if (is_first_level<Working>(shift)) {
                for (int j = 0; j < n; ++j) bins_[size_ + j] = static_cast<uint16_t>(keys[j] >> shift);
                size_ += n;
            } else {
                for (int j = 0; j < n; ++j) {
                    const uint64_t bin = static_cast<uint64_t>(keys[j]) >> shift;
                    bins_[size_] = static_cast<uint16_t>(bin);
                    size_ += bin >> NEXT_BITS == prefix;
                }
            }
        });
    }

    // The `rank`-th largest, from 1: the key that it completes, if `within` is what was found above.
    Found find(const Found& within, uint64_t rank) const {
        const auto counts = [&](auto&& byte_of) {
            std::array<uint64_t, 256> table = {};
            for (int j = 0; j < size_; ++j) byte_of(bins_[j], table);
            return table;
        };
        const auto upper = counts([](uint16_t bin, auto& table) { ++table[bin >> 8]; });
        const Found high = find_in_counts(upper.data(), 8, within, rank);
        const uint16_t byte = static_cast<uint16_t>(high.key & 0xFF);
        const auto lower = counts([byte](uint16_t bin, auto& table) { table[bin & 0xFF] += bin >> 8 == byte; });
        return find_in_counts(lower.data(), 8, high, rank);
    }

  private:
    uint16_t bins_[FEW_KEYS + 1];  // one may be written that does not count
    int size_ = 0;
};

template <DType Working>
void find_among_few(const Array& base, const Sought& sought, int shift, uint64_t count, std::vector<Found>& found) {
    FewKeys keys;
    keys.list<Working>(base, sought.model, sought.within.key, shift, count);
    for (const uint64_t rank : sought.ranks) found.push_back(keys.find(sought.within, rank));
}

}  // namespace ME_ISA
}  // namespace merge_engine
