// Task vectors, trim, sign election and disjoint mean in one read of every input. See docs/arithmetic.md, steps 1 to 8.
//
// Most merges go the fast way, others the general one; inputs of mixed types, unaligned ends, and mergekit's rounding
// element by element.
#include "consensus.cuh"
#include "consensus_fast.cuh"

namespace merge_engine {
namespace {

constexpr unsigned THREADS = 256;

// Blocks of the fast kernels that a multiprocessor holds. For the newest, compilers need more registers than 3 leave.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int FAST_BLOCKS = 2;
#else
constexpr int FAST_BLOCKS = 3;
#endif

// The models of a job in shared memory, and counters for each: kept, lost and saved.
struct Shared {
    const Job& job;
    Model* models;
    uint32_t* counters;
};
__device__ Shared set_up(const List<Job>& jobs, size_t n, const List<Model>& list) {
    const Job& job = job_of_block(jobs, n, shared_memory<Job>());
    Model* models = behind<Model>(shared_memory<Job>());
    uint32_t* counters = reinterpret_cast<uint32_t*>(models + job.models);
    for (size_t i = threadIdx.x; i < job.models; i += blockDim.x) {
        models[i] = list[job.first_model + i];
        models[i].mask = resolved(models[i].mask);
    }
    for (size_t i = threadIdx.x; i < 3 * job.models; i += blockDim.x) counters[i] = 0;
    __syncthreads();
    return {job, models, counters};
}
constexpr size_t shared_bytes(size_t models) { return models * (sizeof(Model) + 3 * sizeof(uint32_t)); }

__device__ void add_counters(const Shared& shared) {
    __syncthreads();
    auto* totals = reinterpret_cast<unsigned long long*>(shared.job.counts);
    for (size_t i = threadIdx.x; i < 3 * shared.job.models; i += blockDim.x) {
        if (shared.counters[i]) atomicAdd(totals + i, static_cast<unsigned long long>(shared.counters[i]));
    }
}
static_assert(sizeof(Counts) == 3 * sizeof(uint64_t), "counters and counts have the same order");

// Calls body(at, active) for the packs of V elements of this thread. Warps stay whole: those lanes that find nothing to
// merge still take part in the counting.
template <int V, class Body>
__device__ void for_each_pack(const Job& job, Body&& body) {
    const uint64_t stride = uint64_t{job.blocks.count} * blockDim.x * V;
    const uint64_t begin = job.first + uint64_t{blockIdx.x - job.blocks.first} * blockDim.x * V;
    for (uint64_t block = begin; block < job.last; block += stride) {
        const uint64_t at = block + uint64_t{threadIdx.x} * V;
        body(at, at < job.last);
    }
}

template <DType Working, int V, int KEPT, bool Slack, bool Stored>
__global__ void __launch_bounds__(THREADS, 1) merge_kernel(const List<Job> jobs, size_t n, const List<Model> list) {
    const Shared shared = set_up(jobs, n, list);
    for_each_pack<V>(shared.job, [&](uint64_t at, bool active) {
        merge<Working, V, KEPT, Slack, Stored>(shared.job, shared.models, shared.counters, at, active);
    });
    add_counters(shared);
}

template <DType Working, int N>
__global__ void __launch_bounds__(THREADS, N <= 4 ? FAST_BLOCKS : 2)
    fast_kernel(const List<Job> jobs, size_t n, const List<Model> list) {
    constexpr int P = FAST_PACK<N>;
    constexpr uint32_t MOST = 0xFFFF / P;  // packs, until 16 bits of a counter may be full
    const Shared shared = set_up(jobs, n, list);
    constexpr uintptr_t ALIGNED = alignof(FastTables<N>);
    const auto behind_counters = reinterpret_cast<uintptr_t>(shared.counters + 3 * shared.job.models);
    auto& tables = *reinterpret_cast<FastTables<N>*>((behind_counters + ALIGNED - 1) / ALIGNED * ALIGNED);
    tables.template set_up<Working>(shared.job, shared.models);
    __syncthreads();

    uint32_t counted[N] = {}, packs = 0;
    const auto add_counted = [&] {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (i >= tables.n) break;
            count_warp(shared.counters + 3 * i, counted[i] & 0xFFFF, counted[i] >> 16);
            counted[i] = 0;
        }
    };
    for_each_pack<P>(shared.job, [&](uint64_t at, bool active) {
        if (!merge_fast<Working, N>(shared.job, shared.models, tables, at, active, counted)) {
            merge_elements<Working, P>(shared.job, shared.models, shared.counters, at, active);
        }
        if (++packs == MOST) add_counted(), packs = 0;
    });
    add_counted();
    add_counters(shared);
}

using MergeLaunches = Launches<Job, List<Model>>;

template <DType Working, int V, int KEPT, bool Slack, bool Stored>
void add_range(MergeLaunches& launches, Job job, uint64_t first, uint64_t last, int device) {
    constexpr unsigned BLOCKS_PER_PROCESSOR = 8;
    job.first = first, job.last = last;
    const unsigned blocks = blocks_for(last - first, uint64_t{THREADS} * V, BLOCKS_PER_PROCESSOR, device);
    launches.add(merge_kernel<Working, V, KEPT, Slack, Stored>, job, blocks, shared_bytes(job.models));
}

// The same for the fast way; `last` is the end of a pack.
template <DType Working, int N>
void add_fast_range(MergeLaunches& launches, Job job, uint64_t last, int device) {
    if constexpr (N > 2) {
        if (job.models <= N / 2) return add_fast_range<Working, N / 2>(launches, job, last, device);
    }
    constexpr unsigned BLOCKS_PER_PROCESSOR = 32;  // waves of blocks: the next one loads while this one computes
    job.first = 0, job.last = last;
    const uint64_t per_block = uint64_t{THREADS} * FAST_PACK<N>;
    const unsigned blocks = blocks_for(last, per_block, BLOCKS_PER_PROCESSOR, device);
    launches.add(fast_kernel<Working, N>, job, blocks,
                 shared_bytes(job.models) + alignof(FastTables<N>) + sizeof(FastTables<N>));
}

template <DType Working, bool Stored>
Model numbers_of(const Entry& entry) {
    using Real = RealOf<Working>;
    const auto rn = [](double value) {
        const Real real = static_cast<Real>(value);
        return static_cast<double>(Stored ? RoundedTo<Working>::round(real) : real);
    };
    return {entry.model, entry.mask, rn(entry.rescale), rn(entry.weight),
            static_cast<Real>(1.0 + entry.vote_slack), static_cast<Real>(entry.retain_slack)};
}

// The kernels for the elements of a chunk: whole vectors where they fit, then what is left one by one.
template <DType W>
void add_chunk(MergeLaunches& launches, const ConsensusCall& call, const Job& job, bool vectors, bool fast,
               int device) {
    uint64_t done = 0;
    if constexpr (W != DType::F64) {
        constexpr int V = VECTOR<W>;
        constexpr size_t FEW = 4;
        if (vectors) {
            done = call.count / V * V;
            const bool slack = job.slack_votes || job.retains;
            if constexpr (V == 8) {
                if (fast) {
                    add_fast_range<W, MOST_FAST>(launches, job, done, device);
                    return add_range<W, 1, 0, true, false>(launches, job, done, call.count, device);
                }
            }
            if (job.models <= FEW && !slack) {
                add_range<W, V, FEW, false, false>(launches, job, 0, done, device);
            } else if (job.models <= FEW) {
                add_range<W, V, FEW, true, false>(launches, job, 0, done, device);
            } else {
                add_range<W, V, 0, true, false>(launches, job, 0, done, device);
            }
        }
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
                op.lambda, op.divisor, call.start,   call.counts,       call.non_finite, 0,            0,     {}};
        bool vectors = fits_vectors(op.base, op.working) && fits_vectors(op.output, op.working) && !op.storage_rounding;
        const size_t size = op.entries.size();
        bool fast = size >= 2 && size <= size_t{MOST_FAST} && op.election != Election::Count && call.start % DRAW_BLOCK == 0;
        for (const Entry& entry : op.entries) {
            fast &= merges_fast(entry);
            job.slack_votes |= entry.vote_slack != 0;
            job.retains |= entry.retain_slack != 0;
            vectors &= fits_vectors(entry.model, op.working);
        }
        with_dtype(op.working, [&](auto dtype) {
            constexpr DType W = dtype();
            for (const Entry& entry : op.entries) {
                models.push_back(op.storage_rounding ? numbers_of<W, true>(entry) : numbers_of<W, false>(entry));
            }
            add_chunk<W>(launches, call, job, vectors, fast, queue.device);
        });
    }
    const Listed<Model> listed(queue, models);
    launches.launch(queue, THREADS, listed.list);
}

}  // namespace merge_engine
