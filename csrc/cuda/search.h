// Ranks that are looked for in a window of keys, see search.cu.
#pragma once

#include "primitives.h"

namespace merge_engine {

// Elements from which on a sample pays: for fewer, its launches take longer than a histogram.
#ifndef ME_WORTH_SAMPLING
#define ME_WORTH_SAMPLING (uint64_t{1} << 24)
#endif
constexpr uint64_t WORTH_SAMPLING = ME_WORTH_SAMPLING;

bool worth_sampling(const FindCall& call);

// Looks for the ranks of calls that are worth it. Where one is not found, the flag of its column is set: there is one in
// `open` for each column of all calls.
void search(const Queue& queue, const std::vector<const FindCall*>& calls, const std::vector<uint32_t*>& open);

}  // namespace merge_engine
