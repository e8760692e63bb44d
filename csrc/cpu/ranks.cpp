// DELLA's keep probabilities: magnitudes ranked within each line of a tensor.
#include <algorithm>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "../ranks.h"
#include "draws.h"
#include "pool.h"
#include "primitives.h"
#include "storage_lanes.h"

namespace merge_engine {
namespace ME_ISA {
namespace {

// Thresholds of the 16-bit keys of one line, by counting. Of the range of keys that occur few do: these are listed, and
// have their ranks and thresholds computed. Zeros, which are many and far below all others, are counted apart.
class CountedRanks {
  public:
    explicit CountedRanks(uint64_t) : counts_(TABLES * TABLE), thresholds_(KEYS) {}

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
        for (; j + TABLES <= length; j += TABLES) {
#pragma GCC unroll 4
            for (size_t t = 0; t < TABLES; ++t) ++counts_[t * TABLE + keys[j + t]];
        }
        for (; j < length; ++j) ++counts_[keys[j]];
        uint64_t below = 0;
        for (size_t t = 0; t < TABLES; ++t) below += std::exchange(counts_[t * TABLE], 0);
        thresholds_[0] = probability.threshold(below ? below - 1 : 0);
        for (uint32_t key = before_lowest + 1u; key <= highest; key += TILE) {
            below = rank_some(key, std::min(TILE, highest + 1 - static_cast<int>(key)), below, probability);
        }
    }
    uint32_t threshold(uint16_t key, const Probability&) const { return thresholds_[key]; }

  private:
    // Of `width` keys from `first`. Returns how many elements lie below the next.
    uint64_t rank_some(uint32_t first, int width, uint64_t below, const Probability& probability) {
        uint32_t* tables = counts_.data() + first;
        uint32_t counts[TILE];
        const TileBits occur = bits_where(width, [&](int j) {
            Words equal = {};
#pragma GCC unroll 4
            for (size_t t = 0; t < TABLES; ++t) equal += load<Words>(tables + t * TABLE + j);
            store(counts + j, equal);
            return less(Words{}, equal);
        });
        uint32_t places[TILE + MORE_PLACES], thresholds[TILE];
        uint64_t twice_ranks[TILE];
        const int found = list_places(occur.word, places);
        for (int i = 0; i < found; ++i) {
            const uint64_t equal = counts[places[i]];
            for (size_t t = 0; t < TABLES; ++t) tables[t * TABLE + places[i]] = 0;
            twice_ranks[i] = 2 * below + equal - 1;
            below += equal;
        }
        for (int i = 0; i < found; ++i) thresholds[i] = probability.threshold(twice_ranks[i]);
        for (int i = 0; i < found; ++i) thresholds_[first + places[i]] = thresholds[i];
        return below;
    }

    static constexpr size_t KEYS = size_t{1} << FIRST_BITS;
    // The odd size keeps the counters of one key from looking alike to what tells stores and loads apart.
    static constexpr size_t TABLES = 4, TABLE = KEYS + TILE + 272;
    std::vector<uint32_t> counts_;      // by key, zero between lines
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

// The keys of whole groups; false if there are values that are not finite, whose keys are others then.
template <DType Working>
bool read_groups(const typename Storage<Working>::Bits* base, const typename Storage<Working>::Bits* model, int count,
                 typename Storage<Working>::Bits* keys) {
    using Vectors = StorageLanes<Working>;
    const auto magnitudes = [](Floats delta) { return (Floats)((Words)delta & 0x7FFFFFFFu); };
    typename Vectors::Magnitudes largest = {};
    for (int at = 0; at < count; at += GROUP) {
#pragma GCC unroll 8
        for (int j = 0; j < HALF; j += LANES) {
            const Floats first = Vectors::template load<0>(model + at, j) - Vectors::template load<0>(base + at, j);
            const Floats second = Vectors::template load<1>(model + at, j) - Vectors::template load<1>(base + at, j);
            largest = larger(largest, Vectors::store(magnitudes(first), magnitudes(second), keys + at, j));
        }
    }
    return !any_at_least(largest, Vectors::INFINITE);
}

template <DType Working>
void read_keys(const Array& base, const Array& model, uint64_t first, uint64_t count,
               typename Storage<Working>::Bits* keys) {
    using Real = typename RealOf<Working>::Type;
    typename Storage<Working>::Bits base_room[TILE], model_room[TILE];
    for (uint64_t at = 0; at < count; at += TILE) {
        const int n = static_cast<int>(std::min<uint64_t>(TILE, count - at));
        const auto* b = tile_of<Working>(base, first + at, n, base_room);
        const auto* x = tile_of<Working>(model, first + at, n, model_room);
        if constexpr (Working != DType::F64) {
            if (n % GROUP == 0 && read_groups<Working>(b, x, n, keys + at)) continue;
        }
        const auto real = [](auto bits) { return Storage<Working>::template load<Real>(bits); };
        for (int j = 0; j < n; ++j) {
            keys[at + static_cast<uint64_t>(j)] = magnitude_key<Working>(real(x[j]) - real(b[j]));
        }
    }
}

// Lines of one length, in slabs: those with a stride lie in one another, and are read together.
struct Lines {
    uint64_t length, stride;

    uint64_t slab() const { return length * stride; }
    // Elements of as many slabs as are ranked at a time: few, so that what is known of them stays in the cache.
    uint64_t group() const { return std::max<uint64_t>(1, SOME / slab()) * slab(); }

  private:
    static constexpr uint64_t SOME = 8192;
};

// Ranks groups of lines, one after the other.
template <DType Working>
class LineRanks {
  public:
    LineRanks(const Lines& lines, const Probability& probability)
        : lines_(lines), probability_(probability), keys_(lines.group()), line_(lines.length), ranks_(lines.length) {}

    // Calls take(at, n, thresholds) for the tiles of elements [first, first + count), which are whole slabs.
    template <class Take>
    void rank(const Array& base, const Array& model, uint64_t first, uint64_t count, Take&& take) {
        read_keys<Working>(base, model, first, count, keys_.data());
        if (lines_.stride == 1 && lines_.length >= TILE) return rank_long_lines(first, count, take);
        thresholds_.resize(keys_.size() + TILE);  // whole vectors of them are read
        for (uint64_t l = 0; l < count / lines_.length; ++l) {
            const uint64_t start = l / lines_.stride * lines_.slab() + l % lines_.stride;
            for (uint64_t j = 0; j < lines_.length; ++j) line_[j] = keys_[start + j * lines_.stride];
            ranks_.rank(line_.data(), probability_);
            for (uint64_t j = 0; j < lines_.length; ++j) {
                thresholds_[start + j * lines_.stride] = ranks_.threshold(line_[j], probability_);
            }
        }
        for_each_tile(count, [&](uint64_t at, int n) { take(first + at, n, thresholds_.data() + at); });
    }

  private:
    using Key = typename Storage<Working>::Bits;

    template <class Body>
    static void for_each_tile(uint64_t count, Body&& body) {
        for (uint64_t at = 0; at < count; at += TILE) body(at, static_cast<int>(std::min<uint64_t>(TILE, count - at)));
    }
    // One tile of thresholds at a time is in memory.
    template <class Take>
    void rank_long_lines(uint64_t first, uint64_t count, Take&& take) {
        for (uint64_t start = 0; start < count; start += lines_.length) {
            ranks_.rank(keys_.data() + start, probability_);
            for_each_tile(lines_.length, [&](uint64_t at, int n) {
                uint32_t thresholds[TILE];
                const Key* keys = keys_.data() + start + at;
                for (int j = 0; j < n; ++j) thresholds[j] = ranks_.threshold(keys[j], probability_);
                take(first + start + at, n, thresholds);
            });
        }
    }

    Lines lines_;
    Probability probability_;
    std::vector<Key> keys_, line_;
    std::vector<uint32_t> thresholds_;
    std::conditional_t<sizeof(Key) == 2, CountedRanks, SortedRanks<Key>> ranks_;
};

// Calls take(at, n, thresholds) for tiles, on all threads.
template <class Take>
void for_each_tile_ranked(const Array& base, const Array& model, DType working, const Lines& lines,
                          const Probability& probability, uint64_t count, int threads, Take&& take) {
    if (lines.slab() == 0 || count == 0) return;
    const uint64_t group = lines.group(), share = std::max<uint64_t>(1, BLOCK / group) * group;
    with_dtype(working, [&](auto dtype) {
        std::vector<std::unique_ptr<LineRanks<dtype()>>> workers(static_cast<size_t>(std::max(threads, 1)));
        parallel_for((count + share - 1) / share, threads, [&](uint64_t number, int worker) {
            auto& own = workers[static_cast<size_t>(worker)];
            if (!own) own = std::make_unique<LineRanks<dtype()>>(lines, probability);
            const uint64_t last = std::min(count, (number + 1) * share);
            for (uint64_t first = number * share; first < last; first += group) {
                own->rank(base, model, first, std::min(last - first, group), take);
            }
        });
    });
}

// Sets bits [at, at + count) of notes that were 0. Other threads may set others of the same words.
void set_bits(uint64_t* notes, uint64_t at, uint64_t bits, int count) {
    uint64_t* word = notes + at / 64;
    const int skipped = static_cast<int>(at % 64);
    if (count == 64 && skipped == 0) {
        *word = bits;
        return;
    }
    __atomic_fetch_or(word, bits << skipped, __ATOMIC_RELAXED);
    if (skipped + count > 64) __atomic_fetch_or(word + 1, bits >> (64 - skipped), __ATOMIC_RELAXED);
}

}  // namespace

void rank_thresholds(const Array& base, const Array& model, DType working, uint64_t length, uint64_t stride,
                     double density, double epsilon, uint64_t count, int threads, uint32_t* thresholds) {
    const auto copy = [&](uint64_t at, int n, const uint32_t* found) { std::copy(found, found + n, thresholds + at); };
    for_each_tile_ranked(base, model, working, {length, stride}, {density, epsilon, length}, count, threads, copy);
}

void note_ranks(const Array& base, const Array& model, DType working, uint64_t length, uint64_t stride, double density,
                double epsilon, uint64_t random_key, uint64_t start, uint64_t count, int threads, uint64_t* notes) {
    const RoundKeys keys(random_key);
    std::fill(notes, notes + (count + TILE - 1) / TILE * TileBits::WORDS, uint64_t{0});
    const auto note = [&](uint64_t at, int n, const uint32_t* thresholds) {
        const TileBits kept = DrawnBelow(keys, start + at, n).than(thresholds, first_bits(n));
        for (int j = 0; j < n; j += 64) set_bits(notes, at + j, kept.word[j / 64], std::min(64, n - j));
    };
    for_each_tile_ranked(base, model, working, {length, stride}, {density, epsilon, length}, count, threads, note);
}

}  // namespace ME_ISA
}  // namespace merge_engine
