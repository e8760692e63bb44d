// Ranks within one long line, by all threads. Its keys are read again for each pass, rather than kept.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "line_ranks.h"
#include "pool.h"

namespace merge_engine {
namespace ME_ISA {

constexpr uint64_t LONG_LINE = 4 * BLOCK;  // elements; longer lines are worth it

template <DType Working>
class LongLine {
  public:
    using Key = typename Storage<Working>::Bits;

    // Elements [first, first + probability.length) of a chunk.
    LongLine(const Array& base, const Array& model, uint64_t first, const Probability& probability, int threads)
        : base_(base),
          model_(model),
          first_(first),
          probability_(probability),
          threads_(std::max(threads, 1)),
          buckets_(some_buckets()),
          table_(probability, buckets_.size()) {
        std::vector<std::unique_ptr<BucketCounts>> counts(workers());
        for_each_numbered_tile([&](int worker, uint64_t, int n, const Key*, const Key* numbers) {
            auto& own = counts[static_cast<size_t>(worker)];
            if (!own) own = std::make_unique<BucketCounts>(buckets_.size());
            own->add(numbers, n);
        });
        table_.solve(buckets_.size(), buckets_.single(), [&](uint32_t bucket, int width, uint32_t* to) {
            for (auto& own : counts) {
                if (own) own->move(bucket, width, to);
            }
        });
        table_.find_bounds();
    }

    // Notes which elements have draws below their thresholds. Element 0 of the chunk has the flat index `start`.
    void note(const RoundKeys& random, uint64_t start, uint64_t* notes) const {
        std::vector<std::vector<Open>> open(workers());
        for_each_numbered_tile([&](int worker, uint64_t at, int n, const Key* keys, const Key* numbers) {
            uint8_t room[DRAW_ROOM];
            const uint64_t index = start + first_ + at;
            const auto index_of = [&](uint64_t j) { return index + j; };
            const auto take = [&](Undecided one) {
                open[static_cast<size_t>(worker)].push_back({first_ + at + one.at, one.draw, numbers[one.at], keys[one.at]});
            };
            const uint8_t* draws = draw_tile(random, index, n, room);
            const TileBits kept = kept_of_tile(table_, numbers, draws, n, random.key, index_of, take);
            for (int j = 0; j < n; j += 64) {
                set_bits(notes, first_ + at + static_cast<uint64_t>(j), kept.word[j / 64], std::min(64, n - j));
            }
        });
        decide(joined(open), notes);
    }

  private:
    // Which bucket decides.
    struct Open {
        uint64_t place;
        uint32_t draw;
        Key number, key;
    };
    size_t workers() const { return static_cast<size_t>(threads_); }

    // Calls body(worker, at, n, keys, numbers) for each tile of the line.
    template <class Body>
    void for_each_numbered_tile(Body&& body) const {
        const uint64_t length = probability_.length;
        parallel_for((length + BLOCK - 1) / BLOCK, threads_, [&](uint64_t block, int worker) {
            const uint64_t first = block * BLOCK;
            for_each_tile(std::min(BLOCK, length - first), [&](uint64_t at, int n) {
                Key keys[TILE], numbers[TILE];
                read_keys<Working>(base_, model_, first_ + first + at, static_cast<uint64_t>(n), keys);
                buckets_.number(keys, n, numbers);
                body(worker, first + at, n, keys, numbers);
            });
        });
    }
    template <class T>
    static std::vector<T> joined(const std::vector<std::vector<T>>& parts) {
        std::vector<T> all;
        for (const auto& part : parts) all.insert(all.end(), part.begin(), part.end());
        return all;
    }

    // One for each key of 16 bits; else as many as the cache holds, in a range that a sample has.
    Buckets<Key> some_buckets() const {
        if constexpr (sizeof(Key) == 2) return {1, Key{0x7FFF}, 1u << FIRST_BITS, true};
        constexpr uint64_t TILES = 64, MOST = 1u << 18;
        KeyRange<Working> range;
        for (uint64_t t = 0; t < TILES; ++t) {
            Key keys[TILE];
            read_keys<Working>(base_, model_, first_ + probability_.length / TILES * t, TILE, keys);
            range.add(keys, TILE);
        }
        return range.buckets(MOST, false);
    }

    // Counts ranks within the buckets of what is open.
    void decide(const std::vector<Open>& open, uint64_t* notes) const {
        if (open.empty()) return;
        std::vector<uint8_t> asked(buckets_.size());
        for (const Open& one : open) asked[one.number] = 1;
        std::vector<std::vector<Key>> found(workers());
        for_each_numbered_tile([&](int worker, uint64_t, int n, const Key* keys, const Key* numbers) {
            for (int j = 0; j < n; ++j) {
                if (asked[numbers[j]]) found[static_cast<size_t>(worker)].push_back(keys[j]);
            }
        });
        std::vector<Key> sorted = joined(found);
        std::sort(sorted.begin(), sorted.end());
        for (const Open& one : open) {
            const auto bucket = std::partition_point(sorted.begin(), sorted.end(), [&](Key key) {
                Key number;
                buckets_.number(&key, 1, &number);
                return number < one.number;
            });
            const auto equal = std::equal_range(bucket, sorted.end(), one.key);
            const auto smaller = table_.below(one.number) + static_cast<uint64_t>(equal.first - bucket);
            const auto twice_rank = 2 * smaller + static_cast<uint64_t>(equal.second - equal.first) - 1;
            if (one.draw < probability_.threshold(twice_rank)) set_bits(notes, one.place, 1, 1);
        }
    }

    // Sets bits [at, at + count) of notes that were 0. Other threads may set others of the same words.
    static void set_bits(uint64_t* notes, uint64_t at, uint64_t bits, int count) {
        uint64_t* word = notes + at / 64;
        const int skipped = static_cast<int>(at % 64);
        if (count == 64 && skipped == 0) {
            *word = bits;
            return;
        }
        __atomic_fetch_or(word, bits << skipped, __ATOMIC_RELAXED);
        if (skipped + count > 64) __atomic_fetch_or(word + 1, bits >> (64 - skipped), __ATOMIC_RELAXED);
    }

    const Array &base_, &model_;
    uint64_t first_;
    Probability probability_;
    int threads_;
    Buckets<Key> buckets_;
    RankTable table_;
};

}  // namespace ME_ISA
}  // namespace merge_engine
