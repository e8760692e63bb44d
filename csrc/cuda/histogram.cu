// Histograms of magnitude keys, all models in one joint read of the base.
//
// First level: each block keeps a window of bins per model in shared memory, laid around the keys that it meets first.
// Keys outside of it, which are rare, are counted in global memory at once. So counts are exact whatever the window, and
// it can be small enough for any GPU. Zeros, often the most frequent key by far, are counted in registers.
//
// Levels below: few keys share the prefix that is looked into; they go to global memory, equal ones of a warp together.
#include "elements.cuh"
#include "jobs.cuh"
#include "primitives.h"

namespace merge_engine {
namespace {

constexpr unsigned THREADS = 1024;
constexpr uint32_t BINS = 1u << FIRST_BITS;
constexpr size_t WINDOW_BYTES = 96 << 10;  // what every GPU since sm_80 has
constexpr size_t COLUMNS_AT_ONCE = 24;     // leaves each a window of 1024 bins

// Elements [first, last) of a chunk, and the place of its columns in the list of all. `window` is in bins.
struct Job {
    Array base;
    size_t first_column, columns;
    uint32_t window;
    int shift;
    uint64_t first, last;
    Blocks blocks;
};

// `looked_at` are some of the larger keys, and `sum` what they add up to.
struct ColumnState {
    HistogramColumn column;
    uint32_t sum, looked_at, zeros;
};

// The first bin of a window: its middle is where the larger keys lie on average, so that a few huge ones do not move it.
__device__ uint32_t window_start(const ColumnState& state, uint32_t window) {
    const uint32_t middle = state.looked_at ? state.sum / state.looked_at : 0;
    const uint32_t end = min(middle + window / 2, BINS - 1) + 1;
    return end > window ? end - window : 0;
}

// Whether the histograms of a job are wanted.
__device__ bool is_open(const Job& job, const List<HistogramColumn>& list) {
    for (size_t c = 0; c < job.columns; ++c) {
        const uint32_t* open = list[job.first_column + c].open;
        if (!open || *open) return true;
    }
    return false;
}

__device__ void add(uint64_t* counter, uint64_t number) {
    atomicAdd(reinterpret_cast<unsigned long long*>(counter), static_cast<unsigned long long>(number));
}

template <DType Working>
using Bin = std::conditional_t<Working == DType::F64, uint64_t, uint32_t>;

// Blocks that a multiprocessor is to hold. Eight elements of 16 bits take more registers than two blocks have.
template <DType Working>
constexpr unsigned RESIDENT = sizeof(typename Storage<Working>::Bits) > 2 ? 2 : 1;

// The keys of elements [at, at + V), shifted.
template <DType Working, int V>
__device__ void keys_of(const Array& model, const Pack<Working, V>& base, uint64_t at, int shift,
                        Bin<Working> (&bins)[V]) {
    using Real = RealOf<Working>;
    const auto x = load_pack<Working, V>(model, at);
#pragma unroll
    for (int j = 0; j < V; ++j) {
        const Real delta = x.template value<Real>(j) - base.template value<Real>(j);
        bins[j] = static_cast<Bin<Working>>(magnitude_key<Working>(delta)) >> shift;
    }
}

template <DType Working, int V>
__global__ void __launch_bounds__(THREADS, RESIDENT<Working>)
    first_level(const List<Job> jobs, size_t job_count, const List<HistogramColumn> list) {
    const Job& job = job_of_block(jobs, job_count, shared_memory<Job>());
    if (!is_open(job, list)) return;
    const size_t n = job.columns;
    const uint32_t window = job.window;
    ColumnState* states = behind<ColumnState>(shared_memory<Job>());
    uint32_t* windows = reinterpret_cast<uint32_t*>(states + n);
    for (size_t c = threadIdx.x; c < n; c += blockDim.x) states[c] = {list[job.first_column + c], 0, 0, 0};
    for (size_t i = threadIdx.x; i < n * window; i += blockDim.x) windows[i] = 0;
    __syncthreads();

    const uint64_t stride = uint64_t{job.blocks.count} * blockDim.x * V;
    const uint64_t begin = job.first + uint64_t{blockIdx.x - job.blocks.first} * blockDim.x * V;
    const uint64_t own = begin + uint64_t{threadIdx.x} * V;
    Bin<Working> bins[V];
    if (own < job.last) {
        const auto b = load_pack<Working, V>(job.base, own);
#pragma unroll 1
        for (size_t c = 0; c < n; ++c) {
            keys_of<Working, V>(states[c].column.model, b, own, job.shift, bins);
            uint32_t largest = 0;
#pragma unroll
            for (int j = 0; j < V; ++j) largest = max(largest, static_cast<uint32_t>(bins[j]));
            if (largest) atomicAdd(&states[c].sum, largest), atomicAdd(&states[c].looked_at, 1u);
        }
    }
    __syncthreads();

    for (uint64_t block = begin; block < job.last; block += stride) {
        const uint64_t at = block + uint64_t{threadIdx.x} * V;
        const bool active = at < job.last;
        Pack<Working, V> b = {};
        if (active) b = load_pack<Working, V>(job.base, at);
#pragma unroll 1
        for (size_t c = 0; c < n; ++c) {
            const uint32_t start = window_start(states[c], window);
            uint32_t zeros = 0;
            if (active) {
                keys_of<Working, V>(states[c].column.model, b, at, job.shift, bins);
#pragma unroll
                for (int j = 0; j < V; ++j) {
                    const uint32_t bin = static_cast<uint32_t>(bins[j]);
                    if (bin == 0) {
                        ++zeros;
                    } else if (bin - start < window) {
                        atomicAdd(windows + c * window + (bin - start), 1u);
                    } else {
                        add(states[c].column.counts + bin, 1);
                    }
                }
            }
            zeros = __reduce_add_sync(EVERY_LANE, zeros);
            if (threadIdx.x % WARP == 0 && zeros) atomicAdd(&states[c].zeros, zeros);
        }
    }
    __syncthreads();

    for (size_t c = 0; c < n; ++c) {
        const uint32_t start = window_start(states[c], window);
        for (uint32_t i = threadIdx.x; i < window; i += blockDim.x) {
            const uint32_t counted = windows[c * window + i];
            if (counted) add(states[c].column.counts + start + i, counted);
        }
        if (threadIdx.x == 0 && states[c].zeros) add(states[c].column.counts, states[c].zeros);
    }
}

template <DType Working, int V>
__global__ void __launch_bounds__(THREADS, 1)
    next_level(const List<Job> jobs, size_t job_count, const List<HistogramColumn> list) {
    constexpr uint32_t NO_BIN = 0xFFFFFFFFu;
    const Job& job = job_of_block(jobs, job_count, shared_memory<Job>());
    if (!is_open(job, list)) return;
    const uint64_t stride = uint64_t{job.blocks.count} * blockDim.x * V;
    const uint64_t begin = job.first + uint64_t{blockIdx.x - job.blocks.first} * blockDim.x * V;
    for (uint64_t block = begin; block < job.last; block += stride) {
        const uint64_t at = block + uint64_t{threadIdx.x} * V;
        const bool active = at < job.last;
        Pack<Working, V> b = {};
        if (active) b = load_pack<Working, V>(job.base, at);
#pragma unroll 1
        for (size_t c = 0; c < job.columns; ++c) {
            const HistogramColumn& column = list[job.first_column + c];
            const uint64_t prefix = column.within->key;
            Bin<Working> bins[V];
            if (active) keys_of<Working, V>(column.model, b, at, job.shift, bins);
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const bool matches = active && bins[j] >> NEXT_BITS == prefix;
                if (!__any_sync(EVERY_LANE, matches)) continue;
                const uint32_t bin = matches ? static_cast<uint32_t>(bins[j]) & ((1u << NEXT_BITS) - 1) : NO_BIN;
                const unsigned equal = __match_any_sync(EVERY_LANE, bin);
                const bool leads = threadIdx.x % WARP == static_cast<unsigned>(__ffs(static_cast<int>(equal)) - 1);
                if (matches && leads) add(column.counts + bin, static_cast<uint64_t>(__popc(equal)));
            }
        }
    }
}

using CountLaunches = Launches<Job, List<HistogramColumn>>;

template <DType Working, int V>
void add_range(CountLaunches& launches, Job job, uint64_t first, uint64_t last, int device) {
    constexpr int key_bits = 8 * static_cast<int>(sizeof(typename Storage<Working>::Bits)) - 1;
    job.first = first, job.last = last;
    const unsigned blocks = blocks_for(last - first, uint64_t{THREADS} * V, 2, device);
    if (job.shift + FIRST_BITS < key_bits) {
        launches.add(next_level<Working, V>, job, blocks, 0);
        return;
    }
    job.window = 8192;
    while (job.columns * job.window * sizeof(uint32_t) > WINDOW_BYTES) job.window /= 2;
    const size_t shared = job.columns * (sizeof(ColumnState) + job.window * sizeof(uint32_t));
    launches.add(first_level<Working, V>, job, blocks, shared);
}

}  // namespace

void histogram(const Queue& queue, const std::vector<HistogramCall>& calls) {
    const OnDevice on(queue.device);
    CountLaunches launches;
    std::vector<HistogramColumn> columns;
    for (const HistogramCall& call : calls) {
        for (size_t at = 0; at < call.columns.size(); at += COLUMNS_AT_ONCE) {
            const size_t some = std::min(COLUMNS_AT_ONCE, call.columns.size() - at);
            const Job job{call.base, columns.size(), some, 0, call.shift, 0, 0, {}};
            bool vectors = fits_vectors(call.base, call.working);
            for (size_t c = at; c < at + some; ++c) {
                columns.push_back(call.columns[c]);
                vectors &= fits_vectors(call.columns[c].model, call.working);
            }
            with_dtype(call.working, [&](auto dtype) {
                constexpr int V = VECTOR<dtype()>;
                const uint64_t whole = vectors ? call.count / V * V : 0;
                add_range<dtype(), V>(launches, job, 0, whole, queue.device);
                add_range<dtype(), 1>(launches, job, whole, call.count, queue.device);
            });
        }
    }
    const Listed<HistogramColumn> listed(queue, columns);
    launches.launch(queue, THREADS, listed.list);
}

}  // namespace merge_engine
