// A counter of 16 bits for every key of 15 bits, in shared memory.
#pragma once

#include "runtime.h"

namespace merge_engine {

class KeyCounters {
  public:
    static constexpr uint32_t KEYS = 1u << 15;
    static constexpr uint64_t MOST = 0xFFFF;  // a counter holds
    static constexpr size_t BYTES = (KEYS / 2 + KEYS / 2 / WARP) * sizeof(uint32_t);

    __device__ explicit KeyCounters(void* memory) : pairs_(static_cast<uint32_t*>(memory)) {}

    // By all threads of a block.
    __device__ void clear() {
        for (uint32_t i = threadIdx.x; i < BYTES / sizeof(uint32_t); i += blockDim.x) pairs_[i] = 0;
    }
    __device__ void count(uint32_t key) { atomicAdd(pairs_ + place(key), 1u << (16 * (key % 2))); }

    __device__ uint32_t operator[](uint32_t key) const { return pairs_[place(key)] >> (16 * (key % 2)) & 0xFFFFu; }
    // Not while another thread sets the other counter of a pair.
    __device__ void set(uint32_t key, uint32_t value) {
        const uint32_t other = key % 2 ? 0xFFFFu : 0xFFFF0000u;
        pairs_[place(key)] = (pairs_[place(key)] & other) | value << (16 * (key % 2));
    }

  private:
    // Moved on by a word now and then: threads that read a run of keys each would meet in one bank of the memory.
    static __device__ uint32_t place(uint32_t key) { return key / 2 + key / 2 / WARP; }

    uint32_t* pairs_;  // an atomic addition takes a whole word
};

}  // namespace merge_engine
