// Enough of CUDA on a CPU to run csrc/cuda as it is, so that its kernels are tested where no GPU is.
//
// Every CUDA thread is a fiber; those of a block take turns, and a block runs after the other. A barrier lets the others
// go on until all have reached it, a warp operation until all 32 lanes have. A stream is as late as it may be: its work
// is done when somebody waits for it, so that what should have waited and did not finds garbage. What this cannot
// show: races between threads that do not wait for each other, memory that is not coherent, speed.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3() = default;
    dim3(unsigned x_) : x(x_) {}
};
struct uint4 {
    unsigned x, y, z, w;
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {
void run_grid(unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel);
void wait_for_block();
// Gives every lane the values of all, once all 32 are there.
const uint32_t* exchange(uint32_t value);

// Work that was handed to a stream and not yet done; `done` counts what was.
struct Stream {
    std::deque<std::function<void()>> work;
    uint64_t handed_in = 0, done = 0;
};
struct Event {
    Stream* stream = nullptr;
    uint64_t point = 0;
};
Stream* stream_of(void* handle);  // the default stream has none
void hand_in(Stream* stream, std::function<void()> work);
void finish(Stream* stream, uint64_t point);
bool is_pinned(const void* memory);
void pin(const void* memory, size_t bytes);
void unpin(const void* memory);
// How many kernels, copies and fillings were handed in: what costs a GPU a few microseconds each.
extern "C" __attribute__((visibility("default"))) uint64_t handed_in;
// The next calls of cudaMalloc* fail while this is positive and they ask for more.
extern size_t memory_limit;
extern size_t memory_used;
}  // namespace emulated

inline void __syncthreads() { emulated::wait_for_block(); }

inline unsigned __reduce_add_sync(unsigned, unsigned value) {
    const uint32_t* all = emulated::exchange(value);
    unsigned sum = 0;
    for (int lane = 0; lane < 32; ++lane) sum += all[lane];
    return sum;
}
inline int __any_sync(unsigned, int value) {
    const uint32_t* all = emulated::exchange(value != 0);
    for (int lane = 0; lane < 32; ++lane) {
        if (all[lane]) return 1;
    }
    return 0;
}
inline unsigned __match_any_sync(unsigned, unsigned value) {
    const uint32_t* all = emulated::exchange(value);
    unsigned equal = 0;
    for (int lane = 0; lane < 32; ++lane) equal |= static_cast<unsigned>(all[lane] == value) << lane;
    return equal;
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }

template <class T>
T atomicAdd(T* address, T value) {
    const T before = *address;
    *address += value;
    return before;
}
template <class T>
T atomicMax(T* address, T value) {
    const T before = *address;
    if (value > before) *address = value;
    return before;
}
template <class T>
T __ldg(const T* address) {
    return *address;
}
template <class T>
void __stcs(T* address, T value) {
    *address = value;
}
template <class A, class B>
auto min(A a, B b) {
    return a < b ? a : b;
}
template <class A, class B>
auto max(A a, B b) {
    return a > b ? a : b;
}

// The runtime.

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaMemPoolAttr { cudaMemPoolAttrReleaseThreshold };
constexpr unsigned cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2, cudaHostAllocPortable = 1,
                   cudaHostRegisterPortable = 1;
using cudaStream_t = struct EmulatedStream*;
using cudaEvent_t = struct EmulatedEvent*;
using cudaMemPool_t = struct EmulatedPool*;
struct cudaDeviceProp {
    char name[256];
    int major, minor;
    size_t totalGlobalMem;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t status) {
    return status == cudaErrorMemoryAllocation ? "out of memory" : "emulated error";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
    *properties = {"emulated device", 9, 0, size_t{1} << 30};
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 2, cudaSuccess; }
inline cudaError_t cudaMemGetInfo(size_t* free, size_t* total) { return *free = *total = size_t{1} << 30, cudaSuccess; }
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    return *stream = reinterpret_cast<cudaStream_t>(new emulated::Stream), cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    emulated::Stream* own = emulated::stream_of(stream);
    return emulated::finish(own, own->handed_in), cudaSuccess;
}
// Not freed: an event may still ask how far it came.
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaStreamSynchronize(stream); }
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    return *event = reinterpret_cast<cudaEvent_t>(new emulated::Event), cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    emulated::Stream* own = emulated::stream_of(stream);
    return *reinterpret_cast<emulated::Event*>(event) = {own, own->handed_in}, cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    const auto* point = reinterpret_cast<emulated::Event*>(event);
    return emulated::finish(point->stream, point->point), cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
    return delete reinterpret_cast<emulated::Event*>(event), cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    const emulated::Event point = *reinterpret_cast<emulated::Event*>(event);
    emulated::hand_in(emulated::stream_of(stream), [point] { emulated::finish(point.stream, point.point); });
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) { return *pool = nullptr, cudaSuccess; }
inline cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }

// Fresh device memory holds garbage, so that what forgets to clear it is noticed.
inline cudaError_t cudaMallocAsync(void** memory, size_t bytes, cudaStream_t) {
    if (emulated::memory_limit && emulated::memory_used + bytes > emulated::memory_limit) {
        return cudaErrorMemoryAllocation;
    }
    auto* block = static_cast<char*>(std::aligned_alloc(256, (bytes + 511) / 256 * 256));
    std::memcpy(block, &bytes, sizeof(bytes));
    emulated::memory_used += bytes;
    *memory = block + 256;
    std::memset(*memory, 0xA5, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaFreeAsync(void* memory, cudaStream_t stream) {
    emulated::hand_in(emulated::stream_of(stream), [memory] {
        size_t bytes;
        std::memcpy(&bytes, static_cast<char*>(memory) - 256, sizeof(bytes));
        emulated::memory_used -= bytes;
        std::memset(static_cast<char*>(memory) - 256, 0x5A, bytes + 256);
        std::free(static_cast<char*>(memory) - 256);
    });
    return cudaSuccess;
}
inline cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
    *memory = std::malloc(bytes);
    return emulated::pin(*memory, bytes), cudaSuccess;
}
inline cudaError_t cudaFreeHost(void* memory) { return emulated::unpin(memory), std::free(memory), cudaSuccess; }
inline cudaError_t cudaHostRegister(void* memory, size_t bytes, unsigned) {
    return emulated::pin(memory, bytes), cudaSuccess;
}
inline cudaError_t cudaHostUnregister(void* memory) { return emulated::unpin(memory), cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
    ++emulated::handed_in;
    emulated::hand_in(emulated::stream_of(stream), [=] { std::memset(memory, value, bytes); });
    return cudaSuccess;
}
// What is not pinned is copied before the call returns.
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    ++emulated::handed_in;
    emulated::Stream* own = emulated::stream_of(stream);
    if (kind == cudaMemcpyHostToDevice && !emulated::is_pinned(from)) {
        const auto staged = std::make_shared<std::vector<char>>(bytes);
        std::memcpy(staged->data(), from, bytes);
        emulated::hand_in(own, [=] { std::memcpy(to, staged->data(), bytes); });
        return cudaSuccess;
    }
    emulated::hand_in(own, [=] { std::memcpy(to, from, bytes); });
    if (kind == cudaMemcpyDeviceToHost && !emulated::is_pinned(to)) emulated::finish(own, own->handed_in);
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
    return cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
    const std::function<void()> body = [=] { kernel(static_cast<Parameters>(arguments)...); };
    const unsigned blocks = config->gridDim.x, threads = config->blockDim.x;
    const size_t shared_bytes = config->dynamicSmemBytes;
    ++emulated::handed_in;
    emulated::hand_in(emulated::stream_of(config->stream), [=] { emulated::run_grid(blocks, threads, shared_bytes, body); });
    return cudaSuccess;
}
