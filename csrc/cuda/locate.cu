// The search for one key's n-th occurrence: count per tile, find the tile, find the place in it.
#include "block_scan.cuh"
#include "elements.cuh"
#include "primitives.h"

namespace merge_engine {
namespace {

constexpr unsigned THREADS = 1024;
constexpr uint64_t PER_THREAD = 4;
constexpr uint64_t TILE = THREADS * PER_THREAD;

struct Search {
    Array base, model;
    uint64_t key, count;
};

// Bit j is set where element first + j of the chunk has the key.
template <DType Working>
__device__ uint32_t matches(const Search& search, uint64_t first) {
    using Real = RealOf<Working>;
    uint32_t bits = 0;
    for (uint64_t j = 0; j < PER_THREAD && first + j < search.count; ++j) {
        const auto b = load_pack<Working, 1>(search.base, first + j);
        const auto x = load_pack<Working, 1>(search.model, first + j);
        const uint64_t key = magnitude_key<Working>(x.template value<Real>(0) - b.template value<Real>(0));
        bits |= static_cast<uint32_t>(key == search.key) << j;
    }
    return bits;
}

template <DType Working>
__global__ void __launch_bounds__(THREADS, 1) count_tiles(const Search search, uint64_t tiles, uint32_t* counts) {
    for (uint64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const uint64_t first = tile * TILE + threadIdx.x * PER_THREAD;
        const uint64_t own = static_cast<uint64_t>(__popc(matches<Working>(search, first)));
        const BlockSum sum = sum_over_block(own, shared_memory<uint64_t>());
        if (threadIdx.x == 0) counts[tile] = static_cast<uint32_t>(sum.total);
    }
}

// One block. `located->offset` is ~0 when it starts.
template <DType Working>
__global__ void __launch_bounds__(THREADS, 1)
    find_place(const Search search, uint64_t tiles, const uint32_t* counts, uint64_t nth, Located* located) {
    uint64_t* memory = shared_memory<uint64_t>();
    uint64_t* found = memory + blockDim.x;  // the tile, and how many occurrences are in front of it
    const uint64_t run = (tiles + blockDim.x - 1) / blockDim.x;
    const uint64_t begin = min(tiles, threadIdx.x * run), end = min(tiles, begin + run);
    uint64_t own = 0;
    for (uint64_t tile = begin; tile < end; ++tile) own += counts[tile];
    const BlockSum sum = sum_over_block(own, memory);
    if (threadIdx.x == 0) located->total = sum.total;
    if (nth >= sum.total) return;  // the whole block
    if (nth >= sum.before && nth < sum.before + own) {
        uint64_t before = sum.before, tile = begin;
        for (; nth >= before + counts[tile]; ++tile) before += counts[tile];
        found[0] = tile;
        found[1] = before;
    }
    __syncthreads();
    const uint64_t first = found[0] * TILE + threadIdx.x * PER_THREAD, rank = nth - found[1];
    uint32_t bits = matches<Working>(search, first);
    const uint64_t mine = static_cast<uint64_t>(__popc(bits));
    const BlockSum places = sum_over_block(mine, memory);
    if (rank < places.before || rank >= places.before + mine) return;
    for (uint64_t skipped = places.before; skipped < rank; ++skipped) bits &= bits - 1;
    located->offset = first + static_cast<uint64_t>(__ffs(static_cast<int>(bits)) - 1);
}

}  // namespace

void locate(const Queue& queue, const Array& base, const Array& model, DType working, uint64_t key, uint64_t nth,
            uint64_t count, Located* located) {
    const OnDevice on(queue.device);
    check(cudaMemsetAsync(located, 0xFF, sizeof(Located), stream_of(queue)), "clearing a result");
    const uint64_t tiles = (count + TILE - 1) / TILE;
    const Scratch<uint32_t> counts(queue, tiles);
    const Search search{base, model, key, count};
    with_dtype(working, [&](auto dtype) {
        launch(count_tiles<dtype()>, blocks_for(tiles, 1, 2, queue.device), THREADS, THREADS * sizeof(uint64_t), queue,
               search, tiles, counts.data);
        launch(find_place<dtype()>, 1, THREADS, (THREADS + 2) * sizeof(uint64_t), queue, search, tiles, counts.data, nth,
               located);
    });
}

}  // namespace merge_engine
