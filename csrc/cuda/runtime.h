// What every kernel file needs of the CUDA runtime: errors, launches, scratch memory.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "queue.h"

namespace merge_engine {

constexpr unsigned WARP = 32;
constexpr unsigned EVERY_LANE = 0xFFFFFFFFu;

inline void check(cudaError_t status, const char* doing) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // or the next call would report it again
    if (status == cudaErrorMemoryAllocation) throw std::bad_alloc();
    throw std::runtime_error(std::string(doing) + ": " + cudaGetErrorString(status));
}

inline cudaStream_t stream_of(const Queue& queue) { return static_cast<cudaStream_t>(queue.stream.get()); }

// Makes the queue's device the current one for a while: a caller's default stream is that of the current device.
class OnDevice {
  public:
    explicit OnDevice(int device) {
        check(cudaGetDevice(&before_), "asking for the current device");
        if (before_ != device) check(cudaSetDevice(device), "choosing the device");
    }
    // For destructors, who have nobody to tell.
    OnDevice(int device, std::nothrow_t) {
        cudaGetDevice(&before_);
        if (before_ != device) cudaSetDevice(device);
    }
    ~OnDevice() { cudaSetDevice(before_); }
    OnDevice(const OnDevice&) = delete;

  private:
    int before_ = 0;
};

inline unsigned processors(int device) {
    int count = 1;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "counting multiprocessors");
    return static_cast<unsigned>(count);
}

// Blocks for a grid-stride loop: enough to fill the device, no more than there is work for.
inline unsigned blocks_for(uint64_t items, uint64_t per_block, unsigned per_processor, int device) {
    const uint64_t wanted = (items + per_block - 1) / per_block;
    return static_cast<unsigned>(std::min<uint64_t>(wanted, uint64_t{per_processor} * processors(device)));
}
// The same for threads that can count no more than `most_turns` of their loop.
inline unsigned blocks_for(uint64_t items, uint64_t per_block, unsigned per_processor, int device, uint64_t most_turns) {
    const uint64_t fewest = (items + per_block * most_turns - 1) / (per_block * most_turns);
    return std::max(blocks_for(items, per_block, per_processor, device), static_cast<unsigned>(fewest));
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t shared_bytes, const Queue& queue,
            Arguments... arguments) {
    if (blocks == 0) return;
    constexpr size_t WITHOUT_ASKING = 48 << 10;
    if (shared_bytes > WITHOUT_ASKING) {
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
              "asking for shared memory");
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream_of(queue);
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "launching a kernel");
}

// Device memory for one call, given back in stream order.
template <class T>
class Scratch {
  public:
    Scratch(const Queue& queue, size_t count) : queue_(queue) {
        if (count == 0) return;
        void* memory = nullptr;
        check(cudaMallocAsync(&memory, count * sizeof(T), stream_of(queue)), "allocating scratch memory");
        data = static_cast<T*>(memory);
    }
    ~Scratch() {
        if (data) cudaFreeAsync(data, stream_of(queue_));
    }
    Scratch(const Scratch&) = delete;

    T* data = nullptr;

  private:
    Queue queue_;
};

// The dynamic shared memory of a block.
template <class T>
__device__ T* shared_memory() {
    extern __shared__ __align__(16) unsigned char block_memory[];
    return reinterpret_cast<T*>(block_memory);
}

// A short list that a kernel takes by value, or from device memory when it is long.
template <class T>
struct List {
    static constexpr size_t FEW = 8;
    const T* many = nullptr;
    T few[FEW];

    __device__ const T& operator[](size_t i) const { return many ? many[i] : few[i]; }
};

template <class T>
class Listed {
  public:
    Listed(const Queue& queue, const std::vector<T>& items)
        : items_(items), memory_(queue, items.size() > List<T>::FEW ? items.size() : 0) {
        if (memory_.data) {
            // More at a time would wait for the stream: this memory is not pinned.
            constexpr size_t WITHOUT_WAITING = (64 << 10) / sizeof(T);
            for (size_t at = 0; at < items_.size(); at += WITHOUT_WAITING) {
                const size_t some = std::min(WITHOUT_WAITING, items_.size() - at);
                check(cudaMemcpyAsync(memory_.data + at, items_.data() + at, some * sizeof(T), cudaMemcpyHostToDevice,
                                      stream_of(queue)),
                      "handing over a list");
            }
            list.many = memory_.data;
        } else {
            std::copy(items_.begin(), items_.end(), list.few);
        }
    }
    List<T> list;

  private:
    std::vector<T> items_;
    Scratch<T> memory_;
};

}  // namespace merge_engine
