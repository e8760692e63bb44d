// Ranks within lines that stay in the cache, a group of them at a time.
#pragma once

#include <algorithm>
#include <vector>

#include "draws.h"
#include "exact_thresholds.h"
#include "keys.h"

namespace merge_engine {
namespace ME_ISA {

// Lines of one length, in slabs: those with a stride lie in one another, and are read together.
struct Lines {
    uint64_t length, stride;

    uint64_t slab() const { return length * stride; }
    // Elements of as many slabs as are ranked at a time.
    uint64_t group() const { return std::max<uint64_t>(1, SOME / slab()) * slab(); }

  private:
    static constexpr uint64_t SOME = 8192;
};

template <class Body>
void for_each_tile(uint64_t count, Body&& body) {
    for (uint64_t at = 0; at < count; at += TILE) body(at, static_cast<int>(std::min<uint64_t>(TILE, count - at)));
}

// An element of a line that is kept if its draw is below the threshold of its exact rank.
struct Undecided {
    uint64_t at;
    uint32_t draw;
};

// The elements of a tile that a table of ranks keeps. `index_of` gives their flat indices. Those that it leaves open are
// handed to `undecided`, and not among the kept.
template <class Key, class IndexOf, class Take>
TileBits kept_of_tile(const RankTable& table, const Key* numbers, const uint8_t* draws, int count, uint64_t random_key,
                      IndexOf&& index_of, Take&& undecided) {
    TileBits kept, open;
    table.compare(numbers, draws, count, kept, open);
    for (int w = 0; 64 * w < count; ++w) {
        for (uint64_t rest = open.word[w]; rest; rest &= rest - 1) {  // about one in 200
            const uint64_t j = static_cast<uint64_t>(64 * w + __builtin_ctzll(rest));
            const uint32_t draw = static_cast<uint32_t>(draws[j]) << 24 | lower_bits(random_key, index_of(j));
            const auto verdict = table.judge(numbers[j], draw);
            if (verdict == RankTable::Verdict::Kept) kept.word[w] |= rest & -rest;
            if (verdict == RankTable::Verdict::Open) undecided(Undecided{j, draw});
        }
    }
    return kept;
}

// Ranks lines, one after the other.
template <DType Working>
class LineRanks {
  public:
    using Key = typename Storage<Working>::Bits;

    // Of each element it is asked whether it is kept, or for its exact threshold.
    LineRanks(const Lines& lines, const Probability& probability, bool exactly)
        : lines_(lines),
          probability_(probability),
          most_(most_buckets(lines.length, exactly)),
          counts_(most_ + ZEROS),
          table_(probability, most_ + ZEROS),
          keys_(lines.group()),
          draws_(exactly ? 0 : lines.group() + TILE),
          numbers_(lines.length),
          exact_(probability) {}

    // Notes which elements [first, first + count), which are whole slabs, have draws below their thresholds. Element 0 of
    // the chunk has the flat index `start`.
    void note(const Array& base, const Array& model, const RoundKeys& random, uint64_t start, uint64_t first,
              uint64_t count, uint64_t* notes) {
        read_keys<Working>(base, model, first, count, keys_.data());
        for_each_tile(count, [&](uint64_t at, int n) {
            uint8_t room[DRAW_ROOM];
            std::memcpy(draws_.data() + at, draw_tile(random, start + first + at, n, room), static_cast<size_t>(n));
        });
        kept_.assign((first % 64 + count) / 64 + 2, 0);
        for (uint64_t l = 0; l < count / lines_.length; ++l) {
            const uint64_t begin = begin_of(l), place = first % 64 + begin;
            const Key* keys = side_by_side(keys_.data() + begin, line_keys_);
            const uint8_t* draws = side_by_side(draws_.data() + begin, line_draws_);
            rank(keys);
            table_.find_bounds();
            undecided_.clear();
            for_each_tile(lines_.length, [&](uint64_t at, int n) {
                const auto index_of = [&](uint64_t j) { return start + first + begin + (at + j) * lines_.stride; };
                const auto take = [&](Undecided one) { undecided_.push_back({at + one.at, one.draw}); };
                keep(kept_of_tile(table_, numbers_.data() + at, draws + at, n, random.key, index_of, take),
                     place + at * lines_.stride, n);
            });
            decide(keys, place);
        }
        write(first, count, notes);
    }

    // Writes the thresholds of such elements.
    void write_thresholds(const Array& base, const Array& model, uint64_t first, uint64_t count, uint32_t* thresholds) {
        read_keys<Working>(base, model, first, count, keys_.data());
        for (uint64_t l = 0; l < count / lines_.length; ++l) {
            const uint64_t begin = begin_of(l);
            const Key* keys = side_by_side(keys_.data() + begin, line_keys_);
            rank(keys);
            if (table_.single()) {
                table_.list_thresholds(of_buckets_);
            } else {
                exact_.find(keys, numbers_.data(), lines_.length, table_);
            }
            for_each_tile(lines_.length, [&](uint64_t at, int n) {
                uint32_t found[TILE];
                if (table_.single()) {
                    look_up(of_buckets_.data(), numbers_.data() + at, n, found);
                } else {
                    exact_.write(at, n, found);
                }
                uint32_t* to = thresholds + begin + at * lines_.stride;
                for (int j = 0; j < n; ++j) to[static_cast<uint64_t>(j) * lines_.stride] = found[j];
            });
        }
    }

  private:
    // As many as have a line's elements in different ones, mostly; twice as many if ranks within them are counted for all;
    // all 16-bit keys then.
    static uint64_t most_buckets(uint64_t length, bool exactly) {
        constexpr bool SHORT = sizeof(Key) == 2;
        uint64_t most = SHORT ? 2048 : 256;
        if (!SHORT && exactly) length *= 2;
        while (most < (SHORT ? 1u << FIRST_BITS : 1u << 20) && (most < length || (SHORT && exactly))) most *= 2;
        return most;
    }
    uint64_t begin_of(uint64_t line) const { return line / lines_.stride * lines_.slab() + line % lines_.stride; }
    // What is known of a line's elements.
    template <class Known>
    const Known* side_by_side(const Known* first, std::vector<Known>& room) const {
        if (lines_.stride == 1) return first;
        room.resize(lines_.length + TILE);  // whole vectors may be read
        for (uint64_t j = 0; j < lines_.length; ++j) room[j] = first[j * lines_.stride];
        return room.data();
    }

    __attribute__((noinline)) void rank(const Key* keys) {
        KeyRange<Working> range;
        range.add(keys, lines_.length);
        buckets_ = range.buckets(most_, true);
        for_each_tile(lines_.length, [&](uint64_t at, int n) {
            buckets_.number(keys + at, n, numbers_.data() + at);
            counts_.add(numbers_.data() + at, n);
        });
        const auto move = [&](uint32_t first, int width, uint32_t* to) { counts_.move(first, width, to); };
        table_.solve(buckets_.size(), buckets_.single(), move);
    }

    // Decides what is left, by exact ranks.
    void decide(const Key* keys, uint64_t place) {
        constexpr size_t FEW = 16;  // keys that are compared with the whole line
        const auto smaller = [&](const Undecided& a, const Undecided& b) { return keys[a.at] < keys[b.at]; };
        std::sort(undecided_.begin(), undecided_.end(), smaller);
        size_t differ = 0;
        for (size_t i = 1; i < undecided_.size(); ++i) differ += smaller(undecided_[i - 1], undecided_[i]);
        const bool many = differ >= FEW;
        if (many) exact_.find(keys, numbers_.data(), lines_.length, table_);
        uint32_t threshold = 0;
        for (size_t i = 0; i < undecided_.size(); ++i) {
            const Undecided& one = undecided_[i];
            if (many) {
                threshold = exact_.of(one.at);
            } else if (i == 0 || smaller(undecided_[i - 1], one)) {
                threshold = probability_.threshold(twice_rank_in_line(keys, keys[one.at]));
            }
            if (one.draw < threshold) set(place + one.at * lines_.stride);
        }
    }
    uint64_t twice_rank_in_line(const Key* keys, Key key) const {
        uint64_t smaller = 0, equal = 0;
        for_each_tile(lines_.length, [&](uint64_t at, int n) {
            const Key* ME_RESTRICT tile = keys + at;
            Key below = 0, same = 0;
            for (int j = 0; j < n; ++j) below = static_cast<Key>(below + (tile[j] < key));
            for (int j = 0; j < n; ++j) same = static_cast<Key>(same + (tile[j] == key));
            smaller += below;
            equal += same;
        });
        return 2 * smaller + equal - 1;
    }

    void set(uint64_t place) { kept_[place / 64] |= uint64_t{1} << place % 64; }
    void keep(const TileBits& kept, uint64_t place, int count) {
        for (int j = 0; j < count; j += 64) {
            const uint64_t bits = kept.word[j / 64], to = place + static_cast<uint64_t>(j) * lines_.stride;
            if (lines_.stride == 1) {
                kept_[to / 64] |= bits << to % 64;
                if (to % 64) kept_[to / 64 + 1] |= bits >> (64 - to % 64);
            } else {
                for (uint64_t rest = bits; rest; rest &= rest - 1) {
                    set(to + static_cast<uint64_t>(__builtin_ctzll(rest)) * lines_.stride);
                }
            }
        }
    }
    // Other threads may set other bits of the first and of the last word.
    void write(uint64_t first, uint64_t count, uint64_t* notes) const {
        const uint64_t begin = first / 64, last = (first + count - 1) / 64;
        for (uint64_t word = begin; word <= last; ++word) {
            if (word == begin || word == last) {
                __atomic_fetch_or(notes + word, kept_[word - begin], __ATOMIC_RELAXED);
            } else {
                notes[word] = kept_[word - begin];
            }
        }
    }

    Lines lines_;
    Thresholds probability_;
    uint64_t most_;
    Buckets<Key> buckets_;
    BucketCounts counts_;
    RankTable table_;
    // Of a group, as it lies:
    std::vector<Key> keys_;
    std::vector<uint8_t> draws_;  // their top bytes
    std::vector<uint64_t> kept_;
    // Of a line:
    std::vector<Key> numbers_, line_keys_;
    std::vector<uint8_t> line_draws_;
    std::vector<Undecided> undecided_;
    ExactThresholds<Key> exact_;
    std::vector<uint32_t> of_buckets_;
};

}  // namespace ME_ISA
}  // namespace merge_engine
