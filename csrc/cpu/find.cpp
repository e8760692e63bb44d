// Keys found by their ranks among all elements of a chunk, and tables of keys for ranks that are asked for later.
#include "count.h"
#include "few_keys.h"
#include "search.h"
#include "statistics.h"

namespace merge_engine {
namespace ME_ISA {
namespace {

template <DType Working>
void find_in_tables(const Array& base, const std::vector<Sought>& sought, int shift, uint64_t count, int threads,
                    std::vector<std::vector<Found>>& found) {
    const int bits = is_first_level<Working>(shift) ? FIRST_BITS : NEXT_BITS;
    std::vector<uint64_t> counts(sought.size() << bits);
    std::vector<KeyColumn> columns;
    for (size_t s = 0; s < sought.size(); ++s) {
        columns.push_back({sought[s].model, sought[s].within.key, counts.data() + (s << bits)});
    }
    count_columns<Working>(base, columns, shift, count, threads);
    for (size_t s = 0; s < sought.size(); ++s) {
        for (const uint64_t rank : sought[s].ranks) {
            found[s].push_back(find_in_counts(columns[s].counts, bits, sought[s].within, rank));
        }
    }
}

template <DType Working>
void find_all_of(const Array& base, const std::vector<Sought>& sought, int shift, uint64_t count, int threads,
                 std::vector<std::vector<Found>>& found) {
    constexpr uint64_t WORTH_SEARCHING = 4 * BLOCK;
    if (count <= FEW_KEYS) {
        for (size_t s = 0; s < sought.size(); ++s) find_among_few<Working>(base, sought[s], shift, count, found[s]);
    } else if (count < WORTH_SEARCHING || !is_first_level<Working>(shift) ||
               !search_ranks<Working>(base, sought, shift, count, threads, found)) {
        find_in_tables<Working>(base, sought, shift, count, threads, found);
    }
}

}  // namespace

void count_keys(const Array& base, const std::vector<KeyColumn>& columns, DType working, int shift, uint64_t count,
                int threads) {
    with_dtype(working, [&](auto dtype) { count_columns<dtype()>(base, columns, shift, count, threads); });
}

std::vector<std::vector<Found>> find_all(const Array& base, const std::vector<Sought>& sought, DType working,
                                         int shift, uint64_t count, int threads) {
    std::vector<std::vector<Found>> found(sought.size());
    with_dtype(working, [&](auto dtype) { find_all_of<dtype()>(base, sought, shift, count, threads, found); });
    return found;
}

}  // namespace ME_ISA
}  // namespace merge_engine
