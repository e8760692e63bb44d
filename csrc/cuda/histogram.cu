// Histograms of magnitude keys, all models in one joint read of the base.
//
// First level: each block keeps a window of bins per model in shared memory, laid around the largest key it meets
// first. Keys outside of it, which are rare, are counted in global memory at once. So counts are exact whatever the
// window, and it can be small enough for any GPU. Zeros, often the most frequent key by far, are counted in registers.
//
// Levels below: few keys share the prefix that is looked into; they go to global memory, equal ones of a warp together.
#include "elements.cuh"
#include "primitives.h"

namespace merge_engine {
namespace {

constexpr unsigned THREADS = 1024;
constexpr uint32_t BINS = 1u << FIRST_BITS;
constexpr size_t WINDOW_BYTES = 96 << 10;  // what every GPU since sm_80 has
constexpr size_t COLUMNS_AT_ONCE = 24;     // leaves each a window of 1024 bins

struct ColumnState {
    uint32_t top, zeros;
};

// The first bin of a window: room for larger keys than were met so far, the rest below.
__device__ uint32_t window_start(const ColumnState& state, uint32_t window) {
    const uint32_t end = min(state.top + window / 8, BINS - 1) + 1;
    return end > window ? end - window : 0;
}

__device__ void add(uint64_t* counter, uint64_t number) {
    atomicAdd(reinterpret_cast<unsigned long long*>(counter), static_cast<unsigned long long>(number));
}

template <DType Working>
using Bin = std::conditional_t<Working == DType::F64, uint64_t, uint32_t>;

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
__global__ void __launch_bounds__(THREADS, 1)
    first_level(const Array base, const List<Column> columns, size_t n, uint32_t window, int shift, uint64_t first,
                uint64_t last) {
    ColumnState* states = shared_memory<ColumnState>();
    uint32_t* windows = reinterpret_cast<uint32_t*>(states + n);
    for (size_t c = threadIdx.x; c < n; c += blockDim.x) states[c] = {0, 0};
    for (size_t i = threadIdx.x; i < n * window; i += blockDim.x) windows[i] = 0;
    __syncthreads();

    const uint64_t stride = uint64_t{gridDim.x} * blockDim.x * V;
    const uint64_t begin = first + uint64_t{blockIdx.x} * blockDim.x * V;
    const uint64_t own = begin + uint64_t{threadIdx.x} * V;
    Bin<Working> bins[V];
    if (own < last) {
        const auto b = load_pack<Working, V>(base, own);
#pragma unroll 1
        for (size_t c = 0; c < n; ++c) {
            keys_of<Working, V>(columns[c].model, b, own, shift, bins);
            uint32_t top = 0;
#pragma unroll
            for (int j = 0; j < V; ++j) top = max(top, static_cast<uint32_t>(bins[j]));
            if (top > states[c].top) atomicMax(&states[c].top, top);
        }
    }
    __syncthreads();

    for (uint64_t block = begin; block < last; block += stride) {
        const uint64_t at = block + uint64_t{threadIdx.x} * V;
        const bool active = at < last;
        Pack<Working, V> b = {};
        if (active) b = load_pack<Working, V>(base, at);
#pragma unroll 1
        for (size_t c = 0; c < n; ++c) {
            const uint32_t start = window_start(states[c], window);
            uint32_t zeros = 0;
            if (active) {
                keys_of<Working, V>(columns[c].model, b, at, shift, bins);
#pragma unroll
                for (int j = 0; j < V; ++j) {
                    const uint32_t bin = static_cast<uint32_t>(bins[j]);
                    if (bin == 0) {
                        ++zeros;
                    } else if (bin - start < window) {
                        atomicAdd(windows + c * window + (bin - start), 1u);
                    } else {
                        add(columns[c].counts + bin, 1);
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
            if (counted) add(columns[c].counts + start + i, counted);
        }
        if (threadIdx.x == 0 && states[c].zeros) add(columns[c].counts, states[c].zeros);
    }
}

template <DType Working, int V>
__global__ void __launch_bounds__(THREADS, 1)
    next_level(const Array base, const List<Column> columns, size_t n, int shift, uint64_t first, uint64_t last) {
    constexpr uint32_t NO_BIN = 0xFFFFFFFFu;
    const uint64_t stride = uint64_t{gridDim.x} * blockDim.x * V;
    for (uint64_t block = first + uint64_t{blockIdx.x} * blockDim.x * V; block < last; block += stride) {
        const uint64_t at = block + uint64_t{threadIdx.x} * V;
        const bool active = at < last;
        Pack<Working, V> b = {};
        if (active) b = load_pack<Working, V>(base, at);
#pragma unroll 1
        for (size_t c = 0; c < n; ++c) {
            const uint64_t prefix = columns[c].within->key;
            Bin<Working> bins[V];
            if (active) keys_of<Working, V>(columns[c].model, b, at, shift, bins);
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const bool matches = active && bins[j] >> NEXT_BITS == prefix;
                if (!__any_sync(EVERY_LANE, matches)) continue;
                const uint32_t bin = matches ? static_cast<uint32_t>(bins[j]) & ((1u << NEXT_BITS) - 1) : NO_BIN;
                const unsigned equal = __match_any_sync(EVERY_LANE, bin);
                const bool leads = threadIdx.x % WARP == static_cast<unsigned>(__ffs(static_cast<int>(equal)) - 1);
                if (matches && leads) add(columns[c].counts + bin, static_cast<uint64_t>(__popc(equal)));
            }
        }
    }
}

template <DType Working, int V>
void count_range(const Queue& queue, const Array& base, const std::vector<Column>& columns, int shift, uint64_t first,
                 uint64_t last) {
    constexpr int key_bits = 8 * static_cast<int>(sizeof(typename Storage<Working>::Bits)) - 1;
    const unsigned blocks = blocks_for(last - first, uint64_t{THREADS} * V, 2, queue.device);
    const Listed<Column> listed(queue, columns);
    const size_t n = columns.size();
    if (shift + FIRST_BITS < key_bits) {
        launch(next_level<Working, V>, blocks, THREADS, 0, queue, base, listed.list, n, shift, first, last);
        return;
    }
    uint32_t window = 8192;
    while (n * window * sizeof(uint32_t) > WINDOW_BYTES) window /= 2;
    const size_t shared = n * (sizeof(ColumnState) + window * sizeof(uint32_t));
    launch(first_level<Working, V>, blocks, THREADS, shared, queue, base, listed.list, n, window, shift, first, last);
}

}  // namespace

void histogram(const Queue& queue, const Array& base, const std::vector<Column>& columns, DType working, int shift,
               uint64_t count) {
    const OnDevice on(queue.device);
    for (size_t at = 0; at < columns.size(); at += COLUMNS_AT_ONCE) {
        const auto end = columns.begin() + static_cast<ptrdiff_t>(std::min(columns.size(), at + COLUMNS_AT_ONCE));
        const std::vector<Column> some(columns.begin() + static_cast<ptrdiff_t>(at), end);
        bool vectors = fits_vectors(base, working);
        for (const Column& column : some) vectors &= fits_vectors(column.model, working);
        with_dtype(working, [&](auto dtype) {
            constexpr int V = VECTOR<dtype()>;
            const uint64_t whole = vectors ? count / V * V : 0;
            count_range<dtype(), V>(queue, base, some, shift, 0, whole);
            count_range<dtype(), 1>(queue, base, some, shift, whole, count);
        });
    }
}

}  // namespace merge_engine
