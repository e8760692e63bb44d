// From histograms to thresholds, all on the device: no merge waits for the host to look at a number.
#include "block_scan.cuh"
#include "elements.cuh"
#include "primitives.h"

namespace merge_engine {
namespace {

constexpr unsigned THREADS = 1024;

// One block per query.
__global__ void __launch_bounds__(THREADS, 1)
    select_kernel(const List<RankQuery> queries, uint64_t bins) {
    const RankQuery query = queries[blockIdx.x];
    if (query.open && *query.open == 0) return;
    const Found within = query.within ? *query.within : Found{0, 0, 0};
    const auto count_of = [&](uint64_t bin) { return query.counts[bin]; };
    const BinRuns runs(count_of, bins, shared_memory<uint64_t>());
    runs.find(query.rank - within.above, [&](uint64_t bin, uint64_t above, uint64_t equal) {
        *query.found = {within.key << NEXT_BITS | bin, within.above + above, equal};
    });
}

__global__ void bands_kernel(const List<BandQuery> queries, size_t n) {
    const size_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const BandQuery query = queries[i];
    const Found low = *query.low, high = query.high ? *query.high : Found{0, 0, 0};
    *query.solved = solve_band(query.band, low, high, query.working);
}

}  // namespace

void select(const Queue& queue, const std::vector<RankQuery>& queries, uint64_t bins) {
    const OnDevice on(queue.device);
    const Listed<RankQuery> listed(queue, queries);
    launch(select_kernel, static_cast<unsigned>(queries.size()), THREADS, THREADS * sizeof(uint64_t), queue,
           listed.list, bins);
}

void solve_bands(const Queue& queue, const std::vector<BandQuery>& queries) {
    const OnDevice on(queue.device);
    const Listed<BandQuery> listed(queue, queries);
    const unsigned blocks = static_cast<unsigned>((queries.size() + WARP - 1) / WARP);
    launch(bands_kernel, blocks, WARP, 0, queue, listed.list, queries.size());
}

}  // namespace merge_engine
