#include "device.h"

#include <mutex>

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

Queue new_queue(int device) {
    const OnDevice on(device);
    cudaStream_t stream;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream");
    const auto destroy = [](void* own) { cudaStreamDestroy(static_cast<cudaStream_t>(own)); };
    const Queue queue{device, std::shared_ptr<void>(static_cast<void*>(stream), destroy)};
    // Scratch memory is asked for again at once; without this the pool would give it back to the driver each time.
    cudaMemPool_t pool;
    check(cudaDeviceGetDefaultMemPool(&pool, device), "asking for the memory pool");
    uint64_t kept = 256 << 20;
    check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &kept), "setting up the memory pool");
    return queue;
}

Queue callers_queue(int device, uintptr_t stream) {
    const std::shared_ptr<void> nobody;
    return {device, std::shared_ptr<void>(nobody, reinterpret_cast<void*>(stream))};
}

void wait_for(const Queue& queue) {
    const OnDevice on(queue.device);
    check(cudaStreamSynchronize(stream_of(queue)), "waiting for the device");
}

namespace {

cudaEvent_t event_of(const Event& event) { return static_cast<cudaEvent_t>(event.handle()); }

bool same(const Queue& a, const Queue& b) { return a.device == b.device && a.stream == b.stream; }

// An event takes the place of an earlier one of its queue.
void keep_last(std::vector<std::shared_ptr<Event>>& events, const std::shared_ptr<Event>& event) {
    for (auto& earlier : events) {
        if (!same(earlier->queue(), event->queue())) continue;
        earlier = event;
        return;
    }
    events.push_back(event);
}

void demand_inside(uint64_t memory, uint64_t at, uint64_t bytes) {
    if (at > memory || bytes > memory - at) throw std::out_of_range("a copy goes beyond the memory it starts in");
}

std::shared_ptr<Event> copy(const Queue& queue, DeviceMemory& device, uint64_t device_at, HostMemory& host,
                            uint64_t host_at, uint64_t bytes, cudaMemcpyKind kind) {
    demand_inside(device.bytes(), device_at, bytes);
    demand_inside(host.bytes(), host_at, bytes);
    const OnDevice on(queue.device);
    // Several threads copy. One at a time hands in, so that a memory's last event of a queue is the last in its order.
    static std::mutex handing_in;
    const std::lock_guard<std::mutex> locked(handing_in);
    // Whatever fails from here on, both memories know of the copy.
    const auto done = std::make_shared<Event>(queue);
    device.outlive(done);
    host.outlive(done);
    auto* on_device = reinterpret_cast<void*>(device.address() + device_at);
    auto* on_host = reinterpret_cast<void*>(host.address() + host_at);
    const bool up = kind == cudaMemcpyHostToDevice;
    check(cudaMemcpyAsync(up ? on_device : on_host, up ? on_host : on_device, bytes, kind, stream_of(queue)),
          up ? "copying to the device" : "copying from the device");
    done->record();
    return done;
}

}  // namespace

Event::Event(const Queue& queue) : queue_(queue) {
    const OnDevice on(queue_.device);
    cudaEvent_t event;
    // Threads that wait for a copy leave their core to those that read and write.
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventBlockingSync), "making an event");
    event_ = event;
    const cudaError_t status = cudaEventRecord(event, stream_of(queue_));
    if (status != cudaSuccess) cudaEventDestroy(event);
    check(status, "recording an event");
}

Event::~Event() { cudaEventDestroy(event_of(*this)); }

void Event::record() {
    const OnDevice on(queue_.device);
    check(cudaEventRecord(event_of(*this), stream_of(queue_)), "recording an event");
}

void Event::wait() const { check(cudaEventSynchronize(event_of(*this)), "waiting for the device"); }

DeviceMemory::DeviceMemory(const Queue& queue, uint64_t bytes, bool zero) : queue_(queue), bytes_(bytes) {
    const OnDevice on(queue.device);
    check(cudaMallocAsync(&data_, std::max<uint64_t>(bytes, 1), stream_of(queue)), "allocating device memory");
    if (!zero) return;
    const cudaError_t status = cudaMemsetAsync(data_, 0, bytes, stream_of(queue));
    if (status != cudaSuccess) cudaFreeAsync(data_, stream_of(queue));
    check(status, "clearing device memory");
}

DeviceMemory::DeviceMemory(const Queue& queue, const std::string& contents)
    : DeviceMemory(queue, contents.size(), false) {
    const OnDevice on(queue.device);
    check(cudaMemcpyAsync(data_, contents.data(), contents.size(), cudaMemcpyHostToDevice, stream_of(queue)),
          "copying to the device");
}

DeviceMemory::~DeviceMemory() {
    const OnDevice on(queue_.device, std::nothrow);
    for (const auto& done : copies_) cudaStreamWaitEvent(stream_of(queue_), event_of(*done), 0);
    cudaFreeAsync(data_, stream_of(queue_));
}

void DeviceMemory::outlive(const std::shared_ptr<Event>& copy) {
    if (!same(copy->queue(), queue_)) keep_last(copies_, copy);
}

HostMemory::HostMemory(void* data, uint64_t bytes) : bytes_(bytes), data_(data) {
    pinned_ = cudaHostRegister(data, bytes, cudaHostRegisterPortable) == cudaSuccess;
    if (!pinned_) cudaGetLastError();  // there is a limit on locked memory; the next call would report it again
}

HostMemory::~HostMemory() {
    for (const auto& done : copies_) cudaEventSynchronize(event_of(*done));
    if (pinned_) cudaHostUnregister(data_);
}

void HostMemory::outlive(const std::shared_ptr<Event>& copy) { keep_last(copies_, copy); }

std::shared_ptr<Event> upload(const Queue& queue, DeviceMemory& to, uint64_t to_at, HostMemory& from, uint64_t from_at,
                              uint64_t bytes) {
    return copy(queue, to, to_at, from, from_at, bytes, cudaMemcpyHostToDevice);
}

std::shared_ptr<Event> download(const Queue& queue, HostMemory& to, uint64_t to_at, DeviceMemory& from,
                                uint64_t from_at, uint64_t bytes) {
    return copy(queue, from, from_at, to, to_at, bytes, cudaMemcpyDeviceToHost);
}

std::string read(const Queue& queue, const DeviceMemory& memory, uint64_t at, uint64_t bytes) {
    demand_inside(memory.bytes(), at, bytes);
    const OnDevice on(queue.device);
    std::string result(bytes, '\0');
    check(cudaMemcpyAsync(result.data(), reinterpret_cast<const void*>(memory.address() + at), bytes,
                          cudaMemcpyDeviceToHost, stream_of(queue)),
          "copying from the device");
    check(cudaStreamSynchronize(stream_of(queue)), "waiting for the device");
    return result;
}

}  // namespace merge_engine
