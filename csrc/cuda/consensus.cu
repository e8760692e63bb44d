// Task vectors, trim, sign election and disjoint mean in one read of every input. See docs/arithmetic.md, steps 1 to 8.
//
// Most merges go the fast way, others the general one; inputs of mixed types, unaligned ends, and mergekit's rounding
// element by element.
#include "consensus_fast.h"

namespace merge_engine {
namespace {

template <DType Working, int V, int KEPT, bool Slack, bool Stored>
__global__ void __launch_bounds__(MERGE_THREADS, 1) merge_kernel(const List<Job> jobs, size_t n, const List<Model> list) {
    const Shared shared = set_up(jobs, n, list);
    for_each_pack<V>(shared.job, [&](uint64_t at, bool active) {
        merge<Working, V, KEPT, Slack, Stored>(shared.job, shared.models, shared.counters, at, active);
    });
    add_counters(shared);
}

template <DType Working, int V, int KEPT, bool Slack, bool Stored>
void add_range(MergeLaunches& launches, Job job, uint64_t first, uint64_t last, int device) {
    constexpr unsigned BLOCKS_PER_PROCESSOR = 8;
    job.first = first, job.last = last;
    const unsigned blocks = blocks_for(last - first, uint64_t{MERGE_THREADS} * V, BLOCKS_PER_PROCESSOR, device);
    launches.add(merge_kernel<Working, V, KEPT, Slack, Stored>, job, blocks, shared_bytes(job.models));
}

template <DType Working, bool Stored>
Model numbers_of(const Entry& entry, bool wide) {
    using Real = RealOf<Working>;
    const auto rn = [](double value) {
        const Real real = static_cast<Real>(value);
        return static_cast<double>(Stored ? RoundedTo<Working>::round(real) : real);
    };
    const double weight = wide ? static_cast<double>(static_cast<Real>(entry.weight)) : rn(entry.weight);
    return {entry.model, entry.mask, rn(entry.rescale), weight,
            static_cast<Real>(1.0 + entry.vote_slack), static_cast<Real>(entry.retain_slack)};
}

// Kernels for the elements [0, last) of a chunk, in whole vectors.
template <DType W>
void add_vectors(MergeLaunches& launches, const ConsensusCall& call, const Job& job, uint64_t last, int device) {
    constexpr int V = VECTOR<W>;
    constexpr size_t FEW = 4;
    const bool slack = job.slack_votes || job.retains;
    if constexpr (V == 8) {
        if (merges_fast(call)) return add_fast_range<W>(launches, job, last, device);
    } else {
        if (job.models <= FEW && slack) return add_range<W, V, FEW, true, false>(launches, job, 0, last, device);
    }
    if (job.models <= FEW && !slack) return add_range<W, V, FEW, false, false>(launches, job, 0, last, device);
    add_range<W, V, 0, true, false>(launches, job, 0, last, device);
}

// Whole vectors where they fit, then what is left one by one.
template <DType W>
void add_chunk(MergeLaunches& launches, const ConsensusCall& call, const Job& job, bool vectors, int device) {
    uint64_t done = 0;
    if constexpr (W != DType::F64) {
        done = vectors ? call.count / VECTOR<W> * VECTOR<W> : 0;
        add_vectors<W>(launches, call, job, done, device);
    }
    if (call.operation.storage_rounding) {
        add_range<W, 1, 0, true, true>(launches, job, done, call.count, device);
    } else {
        add_range<W, 1, 0, true, false>(launches, job, done, call.count, device);
    }
}

}  // namespace

void consensus(const Queue& queue, const std::vector<ConsensusCall>& calls) {
    const OnDevice on(queue.device);
    MergeLaunches launches;
    std::vector<Model> models;
    for (const ConsensusCall& call : calls) {
        const Consensus& op = call.operation;
        Job job{op.base,  op.output, models.size(), op.entries.size(), op.election,     op.normalize, false, false,
                op.wide,  op.lambda, op.divisor, call.start,   call.counts,       call.non_finite, 0,            0,     {}};
        bool vectors = fits_vectors(op.base, op.working) && fits_vectors(op.output, op.working) && !op.storage_rounding;
        for (const Entry& entry : op.entries) {
            job.slack_votes |= entry.vote_slack != 0;
            job.retains |= entry.retain_slack != 0;
            vectors &= fits_vectors(entry.model, op.working);
        }
        with_dtype(op.working, [&](auto dtype) {
            constexpr DType W = dtype();
            for (const Entry& entry : op.entries) {
                models.push_back(op.storage_rounding ? numbers_of<W, true>(entry, op.wide)
                                                     : numbers_of<W, false>(entry, op.wide));
            }
            add_chunk<W>(launches, call, job, vectors, queue.device);
        });
    }
    const Listed<Model> listed(queue, models);
    launches.launch(queue, MERGE_THREADS, listed.list);
}

}  // namespace merge_engine
