// The search for one key's n-th occurrence.
#include "edges.h"
#include "keys.h"
#include "pool.h"
#include "primitives.h"

namespace merge_engine {
namespace ME_ISA {
namespace {

// How many of the elements [first, last) have the counter's only key.
template <DType Working>
uint64_t count_key(const Array& base, const Array& model, EdgeCounter<Working> counter, uint64_t first, uint64_t last) {
    typename Storage<Working>::Bits base_room[TILE], model_room[TILE];
    for (uint64_t at = first; at < last; at += TILE) {
        const int n = static_cast<int>(std::min<uint64_t>(TILE, last - at));
        counter.add(tile_of<Working>(base, at, n, base_room), tile_of<Working>(model, at, n, model_room), n, nullptr);
    }
    const std::vector<uint64_t> at_least = counter.at_least();
    return at_least[0] - at_least[1];
}

}  // namespace

uint64_t locate(const Array& base, const Array& model, DType working, uint64_t key, uint64_t nth, uint64_t count,
                int threads, int64_t* offset) {
    const uint64_t blocks = (count + BLOCK - 1) / BLOCK;
    std::vector<uint64_t> found(blocks);
    *offset = -1;
    with_dtype(working, [&](auto dtype) {
        const EdgeCounter<dtype()> counter({key, key + 1});
        parallel_for(blocks, threads, [&](uint64_t block, int) {
            const uint64_t first = block * BLOCK, last = std::min(count, first + BLOCK);
            found[block] = count_key<dtype()>(base, model, counter, first, last);
        });
        uint64_t before = 0;
        for (uint64_t block = 0; block < blocks && *offset < 0; before += found[block++]) {
            if (nth >= before + found[block]) continue;
            const uint64_t first = block * BLOCK, last = std::min(count, first + BLOCK);
            uint64_t at = first, rank = before;
            for_each_key_tile<dtype()>(base, model, first, last, [&](const auto* keys, int n) {
                for (int j = 0; j < n; ++j, ++at) {
                    if (keys[j] == key && rank++ == nth) *offset = static_cast<int64_t>(at);
                }
            });
        }
    });
    uint64_t total = 0;
    for (uint64_t in_block : found) total += in_block;
    return total;
}

}  // namespace ME_ISA
}  // namespace merge_engine
