// Exact thresholds within a line.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "rank_table.h"

namespace merge_engine {
namespace ME_ISA {

// A line's keys are put into their buckets, side by side: then those that come in the wrong
// order are near, and a count of them among as many neighbours as a bucket has makes a rank of a place.
template <class Key>
class ExactThresholds {
  public:
    explicit ExactThresholds(const Probability& probability) : probability_(probability) {}

    __attribute__((noinline)) void find(const Key* keys, const Key* numbers, uint64_t length, const RankTable& table) {
        next_.assign(table.all_below(), table.all_below() + table.buckets());
        places_.resize(length);
        sorted_.resize(MOST + length + MOST + TILE);
        found_.resize(length + TILE);
        Key* ME_RESTRICT sorted = sorted_.data() + MOST;
        uint32_t *ME_RESTRICT next = next_.data(), *ME_RESTRICT places = places_.data();
        for (uint64_t j = 0; j < length; ++j) {
            const uint32_t place = next[numbers[j]]++;
            places[j] = place;
            sorted[place] = keys[j];
        }
        const uint32_t widest = table.widest();
        const uint64_t zeros = table.end(ZERO);
        std::fill_n(sorted + zeros - MOST, MOST, Key{0});  // below and above all others, where they have no neighbours
        std::fill_n(sorted + length, MOST + TILE, std::numeric_limits<Signed>::max());
        if (zeros) std::fill_n(found_.begin(), zeros, probability_.threshold(zeros - 1));
        for (uint64_t at = zeros; at < length; at += TILE) {
            count_neighbours(sorted + at, at, static_cast<int>(std::min<uint64_t>(widest, MOST)));
        }
        for (uint32_t b = ZEROS; widest > MOST && b < table.buckets(); ++b) {
            if (table.end(b) - table.below(b) > MOST) sort(sorted, table.below(b), table.end(b));
        }
    }
    uint32_t of(uint64_t element) const { return found_[places_[element]]; }
    void write(uint64_t first, int count, uint32_t* to) const { look_up(found_.data(), places_.data() + first, count, to); }

  private:
    using Signed = std::make_signed_t<Key>;  // keys have no sign
    typedef Signed Vector __attribute__((vector_size(VECTOR_BYTES)));  // with `using` GCC would forget the size
    static constexpr uint64_t MOST = 16;  // larger buckets are sorted

    void count_neighbours(const Key* keys, uint64_t at, int widest) {
        Signed moves[TILE];
        constexpr int KEYS = VECTOR_BYTES / sizeof(Key);
        const auto sign = [](Vector v) { return larger(Vector{} - 1, Vector{} + 1 < v ? Vector{} + 1 : v); };
        for (int j = 0; j < TILE; j += KEYS) {
            const Vector own = load<Vector>(keys + j);
            Vector twice = {};
            for (int d = 1; d < widest; ++d) {
                twice += sign(own - load<Vector>(keys + j + d)) + sign(own - load<Vector>(keys + j - d));
            }
            store(moves + j, twice);
        }
        for (int j = 0; j < TILE; ++j) {
            const uint64_t place = at + static_cast<uint64_t>(j);
            found_[place] = probability_.threshold(2 * place + static_cast<uint64_t>(static_cast<int64_t>(moves[j])));
        }
    }
    // Of a large bucket, which is often a single key.
    void sort(const Key* keys, uint64_t first, uint64_t last) {
        large_.assign(keys + first, keys + last);
        if (!std::is_sorted(large_.begin(), large_.end())) std::sort(large_.begin(), large_.end());
        uint32_t threshold = 0;
        for (uint64_t place = first; place < last; ++place) {
            if (place == first || keys[place] != keys[place - 1]) {
                const auto equal = std::equal_range(large_.begin(), large_.end(), keys[place]);
                const auto smaller = equal.first - large_.begin(), others = equal.second - equal.first - 1;
                threshold = probability_.threshold(2 * first + static_cast<uint64_t>(2 * smaller + others));
            }
            found_[place] = threshold;
        }
    }

    Thresholds probability_;
    std::vector<uint32_t> next_, places_, found_;  // places for keys, by bucket; of elements; thresholds, by place
    std::vector<Key> sorted_, large_;
};

}  // namespace ME_ISA
}  // namespace merge_engine
