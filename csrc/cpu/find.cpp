// Keys found by their ranks among all elements of a chunk, and tables of keys for ranks that are asked for later.
#include "count.h"
#include "search.h"
#include "statistics.h"

namespace merge_engine {
namespace ME_ISA {
namespace {

template <DType Working>
std::vector<Found> find_among_few(const Array& base, const Sought& sought, uint64_t count) {
    std::vector<typename Storage<Working>::Bits> keys;
    keys.reserve(count);
    list_keys<Working>(base, sought.model, 0, count, keys);
    const KeyList<typename Storage<Working>::Bits> list(keys.data(), keys.size());
    std::vector<Found> found;
    for (const uint64_t rank : sought.ranks) found.push_back(list.find(rank));
    return found;
}

// By the highest bits first, then by the next ones of the keys that have those.
template <DType Working>
std::vector<Found> find_in_tables(const Array& base, const Sought& sought, uint64_t count, int threads) {
    constexpr int KEY_BITS = 8 * sizeof(typename Storage<Working>::Bits) - 1;
    std::vector<Found> found(sought.ranks.size());
    for (int level = 0, shift = KEY_BITS - FIRST_BITS; shift >= 0; ++level, shift -= NEXT_BITS) {
        const int bits = level_bits(level);
        const size_t tables = level == 0 ? 1 : found.size();
        std::vector<uint64_t> counts(tables << bits);
        std::vector<KeyColumn> columns;
        for (size_t t = 0; t < tables; ++t) columns.push_back({sought.model, found[t].key, counts.data() + (t << bits)});
        count_columns<Working>(base, columns, shift, count, threads);
        for (size_t r = 0; r < found.size(); ++r) {
            found[r] = find_in_counts(columns[level == 0 ? 0 : r].counts, bits, found[r], sought.ranks[r]);
        }
    }
    return found;
}

template <DType Working>
std::vector<std::vector<Found>> find_all_of(const Array& base, const std::vector<Sought>& sought, uint64_t count,
                                            int threads) {
    constexpr uint64_t FEW = 2 * TILE;
    std::vector<std::vector<Found>> found(sought.size());
    if constexpr (Working != DType::F64) {
        if (count > FEW) found = search_ranks<Working>(base, sought, count, threads);
    }
    for (size_t s = 0; s < sought.size(); ++s) {
        if (found[s].size() == sought[s].ranks.size()) continue;
        found[s] = count <= FEW ? find_among_few<Working>(base, sought[s], count)
                                : find_in_tables<Working>(base, sought[s], count, threads);
    }
    return found;
}

}  // namespace

void count_keys(const Array& base, const std::vector<KeyColumn>& columns, DType working, int shift, uint64_t count,
                int threads) {
    with_dtype(working, [&](auto dtype) { count_columns<dtype()>(base, columns, shift, count, threads); });
}

std::vector<std::vector<Found>> find_all(const Array& base, const std::vector<Sought>& sought, DType working,
                                         uint64_t count, int threads) {
    for (const Sought& one : sought) {
        for (const uint64_t rank : one.ranks) {
            if (rank == 0 || rank > count) throw std::out_of_range("no key of this rank was counted");
        }
    }
    std::vector<std::vector<Found>> found;
    with_dtype(working, [&](auto dtype) { found = find_all_of<dtype()>(base, sought, count, threads); });
    return found;
}

}  // namespace ME_ISA
}  // namespace merge_engine
