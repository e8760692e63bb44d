// Keys found by their ranks, by counting on which side of a few edges all keys lie.
//
// A table of all keys costs an increment for every element. Comparing with an edge costs a fraction of that, because
// compilers vectorise it, and a sample tells beforehand which few edges are needed. What is found is exact whatever
// the sample says: it only decides how many passes it takes.
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <stdexcept>
#include <utility>
#include <vector>

#include "edges.h"
#include "pool.h"
#include "primitives.h"

namespace merge_engine {
namespace ME_ISA {

using Bin = int16_t;  // of the first level: 15 bits, so that signed comparisons will do

// Calls visit(s, bins, n) for the model of each sought[s] and every tile of elements [first, last), reading the base
// once.
template <DType Working, class Visit>
void for_each_bin_tile(const Array& base, const std::vector<Sought>& sought, int shift, uint64_t first, uint64_t last,
                       Visit&& visit) {
    using Real = typename RealOf<Working>::Type;
    Real b[TILE], x[TILE];
    Bin bins[TILE];
    for (uint64_t at = first; at < last; at += TILE) {
        const int n = static_cast<int>(std::min<uint64_t>(TILE, last - at));
        load_tile<Working>(base, at, n, b);
        for (size_t s = 0; s < sought.size(); ++s) {
            load_tile<Working>(sought[s].model, at, n, x);
            for (int j = 0; j < n; ++j) bins[j] = static_cast<Bin>(magnitude_key<Working>(x[j] - b[j]) >> shift);
            visit(s, bins, n);
        }
    }
}

// What is known of one model: how many of its elements lie at or above each edge.
class RankSearch {
  public:
    RankSearch(const std::vector<uint64_t>& ranks, uint64_t count) : ranks_(ranks), known_{{0, count}, {END, 0}} {
        const auto impossible = [count](uint64_t rank) { return rank == 0 || rank > count; };
        if (std::any_of(ranks.begin(), ranks.end(), impossible)) {
            throw std::out_of_range("no key of this rank was counted");
        }
    }

    // Proposes edges for the first pass: around each rank's place in a sample of `size` elements, given as its
    // histogram, of which nothing lies above `largest`.
    void guess(const std::vector<uint32_t>& sample, Bin largest, uint64_t size) {
        edges_.clear();
        const double count = static_cast<double>(known_[0]), drawn = static_cast<double>(size);
        for (const uint64_t rank : ranks_) {
            const double share = static_cast<double>(rank) / count;
            const double margin = 2 + DEVIATIONS * std::sqrt(drawn * share * (1 - share));
            double above = 0;
            int highest = -1, key = largest + 1;
            while (key-- > 0) {
                above += sample[static_cast<size_t>(key)];
                const bool occurs = sample[static_cast<size_t>(key)] > 0;
                if (highest < 0 && occurs && above >= drawn * share - margin) highest = key;
                if (above >= drawn * share + margin) break;
            }
            spread(rank, std::max(key, 0), std::min(highest + 1, END - 1));  // END is no Bin, and known
        }
        order_edges();
    }
    // Proposes edges for the next pass, evenly spread over what is still in question.
    void narrow() {
        edges_.clear();
        for (const uint64_t rank : ranks_) {
            const auto above = upper_end(rank);
            const int low = std::prev(above)->first;
            if (above->first - low > 1) spread(rank, low + 1, above->first - 1);
        }
        order_edges();
    }

    const std::vector<Bin>& edges() const { return edges_; }
    void learn(const uint64_t* at_least) {
        for (size_t i = 0; i < edges_.size(); ++i) known_[edges_[i]] = at_least[i];
    }
    bool complete() const {
        return std::all_of(ranks_.begin(), ranks_.end(), [&](uint64_t rank) {
            const auto above = upper_end(rank);
            return above->first - std::prev(above)->first == 1;
        });
    }
    // Once complete, for each rank the bin between two edges in which it lies.
    std::vector<Found> found() const {
        std::vector<Found> found;
        for (const uint64_t rank : ranks_) {
            const auto above = upper_end(rank), low = std::prev(above);
            found.push_back({static_cast<uint64_t>(low->first), above->second, low->second - above->second});
        }
        return found;
    }

  private:
    static constexpr int END = 1 << FIRST_BITS;
    static constexpr double DEVIATIONS = 6;

    // The lowest known edge with fewer elements at or above it than the rank.
    std::map<int, uint64_t>::const_iterator upper_end(uint64_t rank) const {
        return std::find_if(known_.begin(), known_.end(), [rank](const auto& edge) { return edge.second < rank; });
    }
    // Where few elements are compared with an edge, more edges cost less than one more pass.
    void spread(uint64_t rank, int first, int last) {
        const int most = rank * WORTH_COMPRESSING <= known_[0] ? 64 : 16;
        const int steps = std::min(last - first, most - 1);
        for (int i = 0; i <= steps; ++i) {
            edges_.push_back(static_cast<Bin>(first + (last - first) * i / std::max(steps, 1)));
        }
    }
    void order_edges() {
        std::sort(edges_.begin(), edges_.end());
        edges_.erase(std::unique(edges_.begin(), edges_.end()), edges_.end());
    }

    std::vector<uint64_t> ranks_;
    std::map<int, uint64_t> known_;  // edge: elements at or above it
    std::vector<Bin> edges_;         // of the next pass
};

// Short runs all over the chunk. Each is a wait for memory, and four times as many would hardly spare an edge.
template <DType Working>
void guess_from_sample(const Array& base, const std::vector<Sought>& sought, int shift, uint64_t count,
                       std::vector<RankSearch>& searches) {
    constexpr uint64_t RUN = 32, MOST_RUNS = 512, SHARE = 64;  // one cache line of 16-bit elements at a time
    const uint64_t runs = std::min(MOST_RUNS, count / SHARE / RUN);
    std::vector<std::vector<uint32_t>> samples(sought.size(), std::vector<uint32_t>(1u << FIRST_BITS));
    std::vector<Bin> largest(sought.size());
    for (uint64_t run = 0; run < runs; ++run) {
        const uint64_t first = count / runs * run;
        for_each_bin_tile<Working>(base, sought, shift, first, first + RUN, [&](size_t s, const Bin* bins, int n) {
            for (int j = 0; j < n; ++j) ++samples[s][static_cast<size_t>(bins[j])];
            largest[s] = std::max(largest[s], *std::max_element(bins, bins + n));
        });
    }
    for (size_t s = 0; s < sought.size(); ++s) searches[s].guess(samples[s], largest[s], runs * RUN);
}

// One pass over the chunk, for the edges of all models.
template <DType Working>
void count_edges(const Array& base, const std::vector<Sought>& sought, int shift, uint64_t count, int threads,
                 std::vector<RankSearch>& searches) {
    std::vector<EdgeCounter<Working>> none;
    for (const RankSearch& search : searches) {
        std::vector<typename MaskKernel<Working>::Magnitude> edges;
        for (const Bin edge : search.edges()) {
            edges.push_back(MaskKernel<Working>::first_of(static_cast<uint64_t>(edge) << shift));
        }
        none.emplace_back(std::move(edges));
    }
    std::vector<std::vector<EdgeCounter<Working>>> workers(static_cast<size_t>(std::max(threads, 1)));
    parallel_for((count + BLOCK - 1) / BLOCK, threads, [&](uint64_t block, int worker) {
        auto& counters = workers[static_cast<size_t>(worker)];
        if (counters.empty()) counters = none;
        typename Storage<Working>::Bits base_room[TILE], model_room[TILE];
        const uint64_t first = block * BLOCK, last = std::min(count, first + BLOCK);
        for (uint64_t at = first; at < last; at += TILE) {
            const int n = static_cast<int>(std::min<uint64_t>(TILE, last - at));
            const auto* bits = tile_of<Working>(base, at, n, base_room);
            for (size_t s = 0; s < sought.size(); ++s) {
                counters[s].add(bits, tile_of<Working>(sought[s].model, at, n, model_room), n);
            }
        }
    });
    for (size_t s = 0; s < searches.size(); ++s) {
        std::vector<uint64_t> at_least(searches[s].edges().size());
        for (auto& counters : workers) {
            if (counters.empty()) continue;
            const std::vector<uint64_t>& found = counters[s].found();
            for (size_t e = 0; e < found.size(); ++e) at_least[e] += found[e];
        }
        searches[s].learn(at_least.data());
    }
}

// Finds the bins of all ranks at the first level. False if that takes too many passes.
template <DType Working>
bool search_ranks(const Array& base, const std::vector<Sought>& sought, int shift, uint64_t count, int threads,
                  std::vector<std::vector<Found>>& found) {
    constexpr int PASSES = 3;
    std::vector<RankSearch> searches;
    for (const Sought& one : sought) searches.emplace_back(one.ranks, count);
    guess_from_sample<Working>(base, sought, shift, count, searches);
    for (int pass = 0; pass < PASSES; ++pass) {
        count_edges<Working>(base, sought, shift, count, threads, searches);
        if (std::all_of(searches.begin(), searches.end(), [](const RankSearch& s) { return s.complete(); })) {
            for (size_t s = 0; s < sought.size(); ++s) found[s] = searches[s].found();
            return true;
        }
        for (RankSearch& search : searches) search.narrow();
    }
    return false;
}

}  // namespace ME_ISA
}  // namespace merge_engine
