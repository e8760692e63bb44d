// DELLA's keep probabilities: magnitudes ranked within each line of a tensor.
#include <memory>
#include <vector>

#include "line_ranks.h"
#include "long_line.h"
#include "pool.h"
#include "primitives.h"

namespace merge_engine {
namespace ME_ISA {
namespace {

// Calls body(ranks, first, count) for groups of lines, on all threads.
template <DType Working, class Body>
void for_each_group(const Lines& lines, const Probability& probability, bool exactly, uint64_t count, int threads,
                    Body&& body) {
    const uint64_t group = lines.group(), share = std::max<uint64_t>(1, BLOCK / group) * group;
    std::vector<std::unique_ptr<LineRanks<Working>>> workers(static_cast<size_t>(std::max(threads, 1)));
    parallel_for((count + share - 1) / share, threads, [&](uint64_t number, int worker) {
        auto& own = workers[static_cast<size_t>(worker)];
        if (!own) own = std::make_unique<LineRanks<Working>>(lines, probability, exactly);
        const uint64_t last = std::min(count, (number + 1) * share);
        for (uint64_t first = number * share; first < last; first += group) {
            body(*own, first, std::min(last - first, group));
        }
    });
}

}  // namespace

void rank_thresholds(const Array& base, const Array& model, DType working, uint64_t length, uint64_t stride,
                     double density, double epsilon, uint64_t count, int threads, uint32_t* thresholds) {
    const Lines lines{length, stride};
    const Probability probability{density, epsilon, length};
    if (lines.slab() == 0 || count == 0) return;
    with_dtype(working, [&](auto dtype) {
        for_each_group<dtype()>(lines, probability, true, count, threads, [&](auto& ranks, uint64_t first, uint64_t n) {
            ranks.write_thresholds(base, model, first, n, thresholds + first);
        });
    });
}

void note_ranks(const Array& base, const Array& model, DType working, uint64_t length, uint64_t stride, double density,
                double epsilon, uint64_t random_key, uint64_t start, uint64_t count, int threads, uint64_t* notes) {
    const Lines lines{length, stride};
    const Probability probability{density, epsilon, length};
    const RoundKeys random(random_key);
    std::fill(notes, notes + (count + TILE - 1) / TILE * TileBits::WORDS, uint64_t{0});
    if (lines.slab() == 0 || count == 0) return;
    with_dtype(working, [&](auto dtype) {
        if (stride == 1 && length > LONG_LINE) {
            for (uint64_t first = 0; first < count; first += length) {
                LongLine<dtype()>(base, model, first, probability, threads).note(random, start, notes);
            }
            return;
        }
        for_each_group<dtype()>(lines, probability, false, count, threads, [&](auto& ranks, uint64_t first, uint64_t n) {
            ranks.note(base, model, random, start, first, n, notes);
        });
    });
}

}  // namespace ME_ISA
}  // namespace merge_engine
