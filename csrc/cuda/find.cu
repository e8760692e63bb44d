// Keys found by their ranks in a chunk that holds all elements.
#include "elements.cuh"
#include "primitives.h"
#include "search.h"

namespace merge_engine {
namespace {

// Ranks of some calls, whose histograms together take `bins`.
void find_some(const Queue& queue, const FindCall* first, const FindCall* last, int level, uint64_t columns) {
    const uint64_t bins = uint64_t{1} << level_bits(level);
    const Scratch<uint64_t> counts(queue, columns * bins);
    const Scratch<uint32_t> flags(queue, columns);
    check(cudaMemsetAsync(counts.data, 0, columns * bins * sizeof(uint64_t), stream_of(queue)), "clearing counts");
    check(cudaMemsetAsync(flags.data, 0, columns * sizeof(uint32_t), stream_of(queue)), "clearing flags");

    std::vector<HistogramCall> histograms;
    std::vector<RankQuery> queries;
    std::vector<const FindCall*> sampled;
    std::vector<uint32_t*> open;
    uint64_t column = 0;
    for (const FindCall* call = first; call != last; ++call) {
        const bool samples = worth_sampling(*call);
        if (samples) sampled.push_back(call);
        HistogramCall histogram{call->base, {}, call->working, level_shift(call->working, level), call->count};
        for (const SoughtColumn& sought : call->columns) {
            uint64_t* of_column = counts.data + column * bins;
            uint32_t* flag = samples ? flags.data + column : nullptr;
            if (samples) open.push_back(flag);
            histogram.columns.push_back({sought.model, sought.within, of_column, flag});
            for (const RankSought& rank : sought.ranks) {
                queries.push_back({of_column, sought.within, rank.rank, rank.found, flag});
            }
            ++column;
        }
        histograms.push_back(histogram);
    }
    if (!sampled.empty()) search(queue, sampled, open);
    histogram(queue, histograms);
    select(queue, queries, bins);
}

}  // namespace

void find_all(const Queue& queue, const std::vector<FindCall>& calls, int level, uint64_t counts_bytes) {
    const OnDevice on(queue.device);
    const uint64_t most = counts_bytes / sizeof(uint64_t) >> level_bits(level);
    uint64_t columns = 0;
    const FindCall* first = calls.data();
    const FindCall* const end = first + calls.size();
    for (const FindCall* call = first; call != end; ++call) {
        if (columns > 0 && columns + call->columns.size() > most) {
            find_some(queue, first, call, level, columns);
            first = call;
            columns = 0;
        }
        columns += call->columns.size();
    }
    if (columns > 0) find_some(queue, first, end, level, columns);
}

}  // namespace merge_engine
