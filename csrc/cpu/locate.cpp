// The search for one key's n-th occurrence.
#include "edges.h"
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
        const EdgeCounter<dtype()> nothing_counted({key, key + 1});
        parallel_for(blocks, threads, [&](uint64_t block, int) {
            const uint64_t first = block * BLOCK, last = std::min(count, first + BLOCK);
            auto counter = nothing_counted;
            counter.add(base, model, first, last);
            const std::vector<uint64_t> at_least = counter.at_least();
            found[block] = at_least[0] - at_least[1];
        });
        uint64_t before = 0;
        for (uint64_t block = 0; block < blocks && *offset < 0; before += found[block++]) {
            if (nth >= before + found[block]) continue;
            const uint64_t first = block * BLOCK, last = std::min(count, first + BLOCK);
            std::vector<typename Storage<dtype()>::Bits> keys;
            list_keys<dtype()>(base, model, first, last, keys);
            uint64_t number = before;
            for (uint64_t j = 0; j < keys.size(); ++j) {
                if (keys[j] == key && number++ == nth) *offset = static_cast<int64_t>(first + j);
            }
        }
    });
    uint64_t total = 0;
    for (uint64_t in_block : found) total += in_block;
    return total;
}

}  // namespace ME_ISA
}  // namespace merge_engine
