// DELLA's keep probabilities: magnitudes ranked within each line of a tensor.
#include <algorithm>
#include <type_traits>

#include "../ranks.h"
#include "pool.h"
#include "primitives.h"
#include "tile.h"

namespace merge_engine {
namespace ME_ISA {
namespace {

// Mean ranks of the keys of one line. For 16-bit keys a counting sort over the keys that occur; for wider
// ones a sorted copy. Either way `smaller` and `equal` counts decide, so equal magnitudes share a rank.
template <class Key>
class LineRanks {
  public:
    explicit LineRanks(uint64_t length) : sorted_(sizeof(Key) == 2 ? 0 : length) {
        if (sizeof(Key) == 2) counts_.resize(1u << FIRST_BITS), below_.resize(1u << FIRST_BITS);
    }
    void set(const Key* keys, uint64_t length) {
        if (sizeof(Key) == 2) {
            Key highest = 0;
            for (uint64_t j = 0; j < length; ++j) {
                ++counts_[keys[j]];
                highest = std::max(highest, keys[j]);
            }
            uint32_t running = 0;
            for (uint64_t key = 0; key <= highest; ++key) {
                below_[key] = running;
                running += counts_[key];
            }
        } else {
            std::copy(keys, keys + length, sorted_.begin());
            std::sort(sorted_.begin(), sorted_.end());
        }
    }
    // Twice the mean rank counted from 0: 2 * smaller + equal - 1, an integer.
    uint64_t twice_rank(Key key) const {
        if (sizeof(Key) == 2) return 2 * uint64_t{below_[key]} + counts_[key] - 1;
        const auto range = std::equal_range(sorted_.begin(), sorted_.end(), key);
        const uint64_t smaller = static_cast<uint64_t>(range.first - sorted_.begin());
        return 2 * smaller + static_cast<uint64_t>(range.second - range.first) - 1;
    }
    void clear(const Key* keys, uint64_t length) {
        if (sizeof(Key) == 2) {
            for (uint64_t j = 0; j < length; ++j) counts_[keys[j]] = 0;
        }
    }

  private:
    std::vector<uint32_t> counts_, below_;
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
        std::vector<Key> keys(count);
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
        const uint64_t lines = count / length;
        const uint64_t group = std::max<uint64_t>(1, BLOCK / length);
        parallel_for((lines + group - 1) / group, threads, [&](uint64_t block, int) {
            LineRanks<Key> ranks(length);
            std::vector<Key> line(length);
            for (uint64_t l = block * group; l < std::min(lines, (block + 1) * group); ++l) {
                const uint64_t first = l / stride * slab + l % stride;
                for (uint64_t j = 0; j < length; ++j) line[j] = keys[first + j * stride];
                ranks.set(line.data(), length);
                for (uint64_t j = 0; j < length; ++j) {
                    thresholds[first + j * stride] =
                        keep_threshold(ranks.twice_rank(line[j]), length, density, epsilon);
                }
                ranks.clear(line.data(), length);
            }
        });
    });
}

}  // namespace ME_ISA
}  // namespace merge_engine
