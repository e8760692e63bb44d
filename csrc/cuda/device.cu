#include "device.h"

#include "runtime.h"

namespace merge_engine {

std::vector<Device> devices() {
    int driver = 0, runtime = 0, count = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    const auto version = [](int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); };
    if (driver == 0) throw std::runtime_error("no NVIDIA driver is loaded");
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaErrorInsufficientDriver) {
        throw std::runtime_error("the NVIDIA driver is for CUDA " + version(driver) + ", but this build needs CUDA " +
                                 version(runtime) + "; update the driver, or build with an older nvcc");
    }
    if (status != cudaErrorNoDevice) check(status, "looking for devices");
    std::vector<Device> found;
    for (int device = 0; device < count; ++device) {
        cudaDeviceProp properties;
        check(cudaGetDeviceProperties(&properties, device), "asking for a device's properties");
        found.push_back({properties.name, properties.major, properties.minor, properties.totalGlobalMem});
    }
    return found;
}

uint64_t free_memory(int device) {
    const OnDevice on(device);
    size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total), "asking for free memory");
    return free;
}

Stream::Stream(int device) : queue_{device, 0} {
    const OnDevice on(device);
    cudaStream_t stream;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream");
    queue_.stream = reinterpret_cast<uintptr_t>(stream);
    // Scratch memory is asked for again at once; without this the pool would give it back to the driver each time.
    cudaMemPool_t pool;
    check(cudaDeviceGetDefaultMemPool(&pool, device), "asking for the memory pool");
    uint64_t kept = 256 << 20;
    check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &kept), "setting up the memory pool");
}

Stream::~Stream() { cudaStreamDestroy(stream_of(queue_)); }

void Stream::wait() const { check(cudaStreamSynchronize(stream_of(queue_)), "waiting for the device"); }

Event::Event(const Queue& queue) : device_(queue.device) {
    const OnDevice on(device_);
    cudaEvent_t event;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "making an event");
    event_ = event;
    const cudaError_t status = cudaEventRecord(event, stream_of(queue));
    if (status != cudaSuccess) cudaEventDestroy(event);
    check(status, "recording an event");
}

Event::~Event() { cudaEventDestroy(static_cast<cudaEvent_t>(event_)); }

void Event::wait() const {
    check(cudaEventSynchronize(static_cast<cudaEvent_t>(event_)), "waiting for the device");
}

void Event::hold_back(const Queue& queue) const {
    const OnDevice on(queue.device);
    check(cudaStreamWaitEvent(stream_of(queue), static_cast<cudaEvent_t>(event_), 0), "ordering two streams");
}

DeviceMemory::DeviceMemory(const Queue& queue, uint64_t bytes, bool zero) : queue_(queue) {
    const OnDevice on(queue.device);
    check(cudaMallocAsync(&data_, std::max<uint64_t>(bytes, 1), stream_of(queue)), "allocating device memory");
    if (!zero) return;
    const cudaError_t status = cudaMemsetAsync(data_, 0, bytes, stream_of(queue));
    if (status != cudaSuccess) cudaFreeAsync(data_, stream_of(queue));
    check(status, "clearing device memory");
}

DeviceMemory::~DeviceMemory() { cudaFreeAsync(data_, stream_of(queue_)); }

PinnedMemory::PinnedMemory(uint64_t bytes) : own_(true) {
    check(cudaHostAlloc(&data_, bytes, cudaHostAllocPortable), "allocating pinned memory");
}

PinnedMemory::PinnedMemory(uintptr_t address, uint64_t bytes) : data_(reinterpret_cast<void*>(address)), own_(false) {
    check(cudaHostRegister(data_, bytes, cudaHostRegisterPortable), "pinning host memory");
}

PinnedMemory::~PinnedMemory() {
    if (own_) {
        cudaFreeHost(data_);
    } else {
        cudaHostUnregister(data_);
    }
}

void upload(const Queue& queue, uintptr_t device_address, uintptr_t host_address, uint64_t bytes) {
    const OnDevice on(queue.device);
    check(cudaMemcpyAsync(reinterpret_cast<void*>(device_address), reinterpret_cast<const void*>(host_address), bytes,
                          cudaMemcpyHostToDevice, stream_of(queue)),
          "copying to the device");
}

void download(const Queue& queue, uintptr_t host_address, uintptr_t device_address, uint64_t bytes) {
    const OnDevice on(queue.device);
    check(cudaMemcpyAsync(reinterpret_cast<void*>(host_address), reinterpret_cast<const void*>(device_address), bytes,
                          cudaMemcpyDeviceToHost, stream_of(queue)),
          "copying from the device");
}

void read(const Queue& queue, uintptr_t device_address, void* into, uint64_t bytes) {
    download(queue, reinterpret_cast<uintptr_t>(into), device_address, bytes);
    check(cudaStreamSynchronize(stream_of(queue)), "waiting for the device");
}

}  // namespace merge_engine
