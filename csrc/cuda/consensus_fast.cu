// Kernels for most merges, see consensus_fast.cuh.
#include "consensus_fast.h"

#include "consensus_fast.cuh"

namespace merge_engine {
namespace {

constexpr size_t MOST_MODELS = 8;

// Blocks that a multiprocessor holds: with more models, threads need more registers.
constexpr unsigned resident(Mixing how, int models) {
    if (how == Mixing::Slack) return models == 2 ? 3 : 2;
    return models <= 4 ? 3 : 2;
}

template <DType Working, Mixing How, int N>
__global__ void __launch_bounds__(MERGE_THREADS, resident(How, N))
    fast_merge_kernel(const List<Job> jobs, size_t n, const List<Model> list) {
    const Shared shared = set_up(jobs, n, list);
    static __shared__ FastTables<N> tables;
    tables.set_up(shared.job, shared.models);
    __syncthreads();

    Tallies<N> tallies;
    const uint32_t octets = static_cast<uint32_t>(shared.job.last / 8), stride = shared.job.blocks.count * blockDim.x;
    // Warps stay whole: lanes that find nothing to merge still draw for their neighbours.
    for (uint32_t first = (blockIdx.x - shared.job.blocks.first) * blockDim.x; first < octets; first += stride) {
        const uint32_t octet = first + threadIdx.x;
        const bool active = octet < octets;
        if (tables.well && merge_fast<Working, How>(shared.job, shared.models, tables, octet, active, tallies)) continue;
        merge_elements<Working, 8, How == Mixing::Slack>(shared.job, shared.models, shared.counters,
                                                         uint64_t{octet} * 8, active);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if (i >= tables.n) break;
        const uint32_t kept = counted_halves(tallies.kept[i]);
        const bool votes = How != Mixing::Sum && tables.models[i].weight != 0;
        const uint32_t lost = votes ? kept - tallies.retained_of(i) : 0;
        uint32_t* counters = shared.counters + 3 * i;
        const uint32_t counted[] = {kept, lost, tallies.saved[i]};
        for (int k = 0; k < 3; ++k) {
            const uint32_t of_warp = __reduce_add_sync(EVERY_LANE, counted[k]);
            if (threadIdx.x % WARP == 0 && of_warp) atomicAdd(counters + k, of_warp);
        }
    }
    add_counters(shared);
}

template <DType Working, Mixing How, int N>
void add_kernel(MergeLaunches& launches, Job job, uint64_t last, int device) {
    if constexpr (N > 2) {
        if (job.models <= N / 2) return add_kernel<Working, How, N / 2>(launches, job, last, device);
    }
    constexpr unsigned BLOCKS_PER_PROCESSOR = 32;  // waves of blocks: the next one loads while this one computes
    constexpr uint64_t PER_BLOCK = uint64_t{MERGE_THREADS} * 8;
    constexpr uint64_t MOST_PACKS = 0x1FFF;  // of a thread, with eight elements: then tallies of 16 bits are full
    job.first = 0, job.last = last;
    const unsigned blocks = blocks_for(last, PER_BLOCK, BLOCKS_PER_PROCESSOR, device, MOST_PACKS);
    launches.add(fast_merge_kernel<Working, How, N>, job, blocks, shared_bytes(job.models));
}

}  // namespace

bool merges_fast(const ConsensusCall& call) {
    const Consensus& op = call.operation;
    const auto can = [](const Entry& entry) {
        const MaskKind kind = entry.mask.kind;
        const bool trimmed = kind == MaskKind::Dense || kind == MaskKind::Band || kind == MaskKind::Draw;
        return trimmed && entry.rescale >= 1;
    };
    return op.entries.size() >= 2 && op.entries.size() <= MOST_MODELS && op.election != Election::Count &&
           !weighs_last(op.election) &&
           call.start % DRAW_BLOCK == 0 && std::all_of(op.entries.begin(), op.entries.end(), can);
}

template <DType Working>
void add_fast_range(MergeLaunches& launches, Job job, uint64_t last, int device) {
    constexpr int N = MOST_MODELS;
    if (job.election == Election::None) return add_kernel<Working, Mixing::Sum, N>(launches, job, last, device);
    if (job.slack_votes || job.retains) return add_kernel<Working, Mixing::Slack, N>(launches, job, last, device);
    add_kernel<Working, Mixing::Elect, N>(launches, job, last, device);
}
template void add_fast_range<DType::BF16>(MergeLaunches&, Job, uint64_t, int);
template void add_fast_range<DType::F16>(MergeLaunches&, Job, uint64_t, int);

}  // namespace merge_engine
