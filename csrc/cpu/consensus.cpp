// Task vectors, trim, sign election and disjoint mean in one read of every input.
#include <algorithm>

#include "consensus_general.h"
#include "consensus_fast.h"
#include "pool.h"
#include "primitives.h"

namespace merge_engine {
namespace ME_ISA {
namespace {

// merge(first, last, counts, non_finite) merges a block.
template <class Merge>
void merge_blocks(size_t n, uint64_t count, int threads, Counts* counts, uint64_t* non_finite, Merge&& merge) {
    const size_t workers = static_cast<size_t>(std::max(threads, 1));
    std::vector<Counts> counted(workers * n);
    std::vector<uint64_t> found(workers * (n + 2));
    parallel_for((count + BLOCK - 1) / BLOCK, threads, [&](uint64_t block, int worker) {
        const size_t w = static_cast<size_t>(worker);
        merge(block * BLOCK, std::min(count, (block + 1) * BLOCK), counted.data() + w * n, found.data() + w * (n + 2));
    });
    for (size_t w = 0; w < workers; ++w) {
        for (size_t i = 0; i < n; ++i) {
            counts[i].kept += counted[w * n + i].kept;
            counts[i].lost += counted[w * n + i].lost;
            counts[i].saved += counted[w * n + i].saved;
        }
        for (size_t i = 0; i <= n + 1; ++i) non_finite[i] += found[w * (n + 2) + i];
    }
}

}  // namespace

void consensus(const Consensus& op, uint64_t start, uint64_t count, int threads, Counts* counts,
               uint64_t* non_finite) {
    const auto merge_with = [&](auto&& merge) {
        merge_blocks(op.entries.size(), count, threads, counts, non_finite, [&](auto... part) { merge(start, part...); });
    };
    const auto merge_fast = [&](auto dtype, auto rounding) {
        using Fast = ConsensusFast<dtype(), decltype(rounding)>;
        if (!Fast::serves(op)) return false;
        const Fast merger(op);
        merge_with([&](auto... part) { merger.merge(part...); });
        return true;
    };
    with_dtype(op.working, [&](auto dtype) {
        constexpr bool narrow = sizeof(typename Storage<dtype()>::Bits) == 2;  // others compute as they store
        if constexpr (narrow) {
            if (op.storage_rounding && merge_fast(dtype, RoundedTo<dtype()>{})) return;
        }
        if constexpr (dtype() != DType::F64) {
            if ((!op.storage_rounding || !narrow) && merge_fast(dtype, Unrounded{})) return;
        }
        merge_with([&](auto... part) { consensus_general(op, part...); });
    });
}

}  // namespace ME_ISA
}  // namespace merge_engine
