// The search for one key's n-th occurrence.
#include "keys.h"
#include "pool.h"
#include "primitives.h"

namespace merge_engine {
namespace ME_ISA {

uint64_t locate(const Array& base, const Array& model, DType working, uint64_t key, uint64_t nth, uint64_t count,
                int threads, int64_t* offset) {
    const uint64_t blocks = (count + BLOCK - 1) / BLOCK;
    std::vector<uint64_t> found(blocks);
    *offset = -1;
    with_dtype(working, [&](auto dtype) {
        parallel_for(blocks, threads, [&](uint64_t block, int) {
            const uint64_t first = block * BLOCK, last = std::min(count, first + BLOCK);
            for_each_key_tile<dtype()>(base, model, first, last, [&](const auto* keys, int n) {
                int equal = 0;
                for (int j = 0; j < n; ++j) equal += keys[j] == key;
                found[block] += static_cast<uint64_t>(equal);
            });
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
