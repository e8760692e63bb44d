// Keys found by their ranks in one pass.
//
// A table of all keys costs an increment for every element. Comparing with an edge costs a fraction of that, and a
// sample tells between which edges the key of a rank lies. What lies between them is a few per cent, from which the key
// is selected. What is found is exact whatever the sample says: the counts at the edges show whether it was right.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "edges.h"
#include "pool.h"
#include "primitives.h"
#include "sample.h"
#include "select.h"

namespace merge_engine {
namespace ME_ISA {

// The search for the keys of some ranks of one model.
template <DType Working>
class RankSearch {
  public:
    RankSearch(const Array& base, const Sought& sought, uint64_t count)
        : model_(sought.model), ranks_(sought.ranks), room_(count / 4 + BLOCK),
          edges_(Sample<Working>(base, model_, count).edges(ranks_)), passing_(has_windows(edges_)),
          nothing_counted_(edges_), at_least_(edges_.size()) {
        if (passing_) passed_.reserve(room_);  // pages that stay empty cost nothing, growing would
    }

    // Counts the elements [first, last). Thread-safe.
    void count(const Array& base, uint64_t first, uint64_t last) {
        EdgeCounter<Working> counter = nothing_counted_;
        const auto take = [this](const uint32_t* magnitudes, size_t size) { keep(magnitudes, size); };
        counter.add(base, model_, first, last, passing_ ? take : typename EdgeCounter<Working>::Take());
        const std::vector<uint64_t> at_least = counter.at_least();
        const std::lock_guard<std::mutex> lock(mutex_);
        for (size_t e = 0; e < at_least.size(); ++e) at_least_[e] += at_least[e];
    }

    // After all elements were counted. Empty if the sample misled.
    std::vector<Found> find() const {
        std::vector<uint64_t> before(edges_.size() + 1);  // of those that passed: how many lie above an edge's window
        if (passing_) {
            for (size_t e = edges_.size(); e > 0; e -= 2) before[e - 2] = before[e] + at_least_[e - 2] - at_least_[e - 1];
        }
        const KeyList<Key> list(passed_.data(), passed_.size());
        std::vector<Found> found;
        for (const uint64_t rank : ranks_) {
            size_t e = edges_.size();
            while (e > 0 && at_least_[e - 1] < rank) --e;  // the last edge that the rank's key reaches is e - 1
            if (e == 0 || e == edges_.size()) return {};
            const uint64_t above = at_least_[e];
            if (edges_[e] - edges_[e - 1] == 1) {
                found.push_back({edges_[e - 1], above, at_least_[e - 1] - above});
            } else if (passing_ && e % 2 && passed_.size() == before[0]) {
                const uint64_t skipped = before[e + 1];
                Found one = list.find(rank - above + skipped);
                one.above += above - skipped;
                found.push_back(one);
            } else {
                return {};
            }
        }
        return found;
    }

  private:
    using Key = typename Storage<Working>::Bits;

    // Whether anything lies between edges but frequent keys. If not, no edge need occur twice.
    static bool has_windows(std::vector<uint64_t>& edges) {
        for (size_t e = 0; e < edges.size(); e += 2) {
            if (edges[e] < edges[e + 1]) return true;
        }
        edges.erase(std::unique(edges.begin(), edges.end()), edges.end());
        if (edges.size() % 2) edges.push_back(edges.back());
        return false;
    }

    // Keeps the keys of what passed.
    void keep(const uint32_t* passed, size_t size) {
        Key keys[EdgeCounter<Working>::MOST_PASSED];
        for (size_t i = 0; i < size; ++i) keys[i] = static_cast<Key>(magnitude_key<Working>(bits_of<float>(passed[i])));
        const std::lock_guard<std::mutex> lock(mutex_);
        if (passed_.size() + size <= room_) passed_.insert(passed_.end(), keys, keys + size);
    }

    Array model_;
    std::vector<uint64_t> ranks_;
    size_t room_;  // for more than this the sample must have misled
    std::vector<uint64_t> edges_;
    bool passing_;  // whether elements between edges are handed over
    EdgeCounter<Working> nothing_counted_;
    std::mutex mutex_;
    std::vector<uint64_t> at_least_;  // of each edge
    std::vector<Key> passed_;
};

// Whether a search is faster than a table of all keys. Keys of 32 bits would take a table for each rank.
template <DType Working>
bool is_worth_searching(const Sought& sought) {
    return sizeof(typename Storage<Working>::Bits) > 2 || sought.ranks.size() <= 4;
}

// Finds the keys of all ranks, but leaves out models whose samples misled or that have too many ranks.
template <DType Working>
std::vector<std::vector<Found>> search_ranks(const Array& base, const std::vector<Sought>& sought, uint64_t count,
                                             int threads) {
    if (count <= BLOCK) threads = 1;  // not worth waking others
    std::vector<std::unique_ptr<RankSearch<Working>>> searches(sought.size());
    parallel_for(sought.size(), threads, [&](uint64_t s, int) {
        if (!is_worth_searching<Working>(sought[s])) return;
        searches[s] = std::make_unique<RankSearch<Working>>(base, sought[s], count);
    });
    parallel_for((count + BLOCK - 1) / BLOCK, threads, [&](uint64_t block, int) {
        const uint64_t first = block * BLOCK, last = std::min(count, first + BLOCK);
        for (const auto& search : searches) {
            if (search) search->count(base, first, last);
        }
    });
    std::vector<std::vector<Found>> found(sought.size());
    parallel_for(sought.size(), threads, [&](uint64_t s, int) {
        if (searches[s]) found[s] = searches[s]->find();
    });
    return found;
}

}  // namespace ME_ISA
}  // namespace merge_engine
