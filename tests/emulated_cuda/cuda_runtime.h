// Enough of CUDA on a CPU to run csrc/cuda as it is, so that its kernels are tested where no GPU is.
//
// Every CUDA thread is a fiber; those of a block take turns, and a block runs after the other. A barrier lets the others
// go on until all have reached it, a warp operation until all 32 lanes have. A stream is as late as it may be: its work
// is done when somebody waits for it, so that what should have waited and did not finds garbage. A program that would
// crash a real device, or work there by luck, is refused (order.h). What this cannot show: races between threads
// that do not wait for each other, memory that is not coherent, speed.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3() = default;
    dim3(unsigned x_) : x(x_) {}
};
struct uint2 {
    unsigned x, y;
};
struct uint4 {
    unsigned x, y, z, w;
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = struct EmulatedStream*;
using cudaEvent_t = struct EmulatedEvent*;
using cudaMemPool_t = struct EmulatedPool*;

namespace emulated {
void run_grid(unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel);
void wait_for_block();
// Gives every lane the values of all, once all 32 are there.
const uint32_t* exchange(uint32_t value);

// Hands a kernel to a stream.
void launch(cudaStream_t stream, std::function<void()> grid);
// How many kernels, copies and fillings were handed in: what costs a GPU a few microseconds each.
extern "C" __attribute__((visibility("default"))) uint64_t handed_in;
// How many streams, events and pieces of device memory and of pinned memory there are.
extern "C" __attribute__((visibility("default"))) uint64_t held();
// The seed of an order in which streams get on by themselves. At 0 they are as late as they may be.
extern "C" __attribute__((visibility("default"))) uint64_t schedule;
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
inline unsigned __shfl_xor_sync(unsigned, unsigned value, int lanes) {
    return emulated::exchange(value)[(threadIdx.x % 32) ^ static_cast<unsigned>(lanes)];
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
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
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorHostMemoryAlreadyRegistered = 712,
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaMemPoolAttr { cudaMemPoolAttrReleaseThreshold };
constexpr unsigned cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2, cudaEventBlockingSync = 1, cudaHostAllocPortable = 1,
                   cudaHostRegisterPortable = 1;
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
inline cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) { return *pool = nullptr, cudaSuccess; }
inline cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }

// See runtime.cpp.
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaMallocAsync(void** memory, size_t bytes, cudaStream_t stream);
cudaError_t cudaFreeAsync(void* memory, cudaStream_t stream);
cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned flags);
cudaError_t cudaFreeHost(void* memory);
cudaError_t cudaHostRegister(void* memory, size_t bytes, unsigned flags);
cudaError_t cudaHostUnregister(void* memory);
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
    return cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
    const std::function<void()> body = [=] { kernel(static_cast<Parameters>(arguments)...); };
    const unsigned blocks = config->gridDim.x, threads = config->blockDim.x;
    const size_t shared_bytes = config->dynamicSmemBytes;
    emulated::launch(config->stream, [=] { emulated::run_grid(blocks, threads, shared_bytes, body); });
    return cudaSuccess;
}
