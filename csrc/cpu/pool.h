// A pool of threads that share out the blocks of loops.
#pragma once

#include <cstdint>
#include <functional>

namespace merge_engine {

// Calls body(block, worker) once for each block in [0, blocks), on up to `threads` threads including the
// caller. Workers are numbered from 0 to threads - 1. The floating-point environment is IEEE (nearest
// even, no flushing of denormals) while a body runs, whatever the caller had set. The first exception of
// a body is rethrown here. Several callers may run loops at a time; the pool has as many threads as the largest asks for.
void parallel_for(uint64_t blocks, int threads, const std::function<void(uint64_t block, int worker)>& body);

}  // namespace merge_engine
